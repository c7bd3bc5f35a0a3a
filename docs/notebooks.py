"""Runs the notebooks and stores them with their outputs: `python docs/notebooks.py`."""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent / "notebooks").glob("*.ipynb"))


def run(path: Path, directory: Path) -> nbformat.NotebookNode:
    """Runs a notebook in a directory and returns it with its outputs, without standard error."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(directory)}}
    options = {"timeout": 600, "kernel_name": "python3", "record_timing": False}
    NotebookClient(notebook, resources=resources, **options).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output for output in cell.outputs if output.get("name", "stdout") == "stdout"
            ]
    return notebook


def main() -> None:
    """Runs all notebooks, each in its own directory."""
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as directory:
            notebook = run(path, Path(directory))
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
