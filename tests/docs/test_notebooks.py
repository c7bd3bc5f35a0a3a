"""The notebooks run, and print what they store and what the site shows."""

import importlib.util
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "notebooks.py"
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def runner():
    """Returns docs/notebooks.py, loaded as a file."""
    specification = importlib.util.spec_from_file_location("docs_notebooks", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def printed(cell) -> str:
    """Returns what a cell printed, without numbers, because their last digits may differ."""
    texts = (output.text for output in cell.get("outputs", ()) if output.output_type == "stream")
    return _NUMBER.sub("#", "".join(texts))


def pictures(cell) -> int:
    """Counts the pictures that a cell shows."""
    return sum("image/png" in output.get("data", {}) for output in cell.get("outputs", ()))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_what_is_stored(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    stored = nbformat.read(path, as_version=4)
    ran = runner().run(path, tmp_path)
    for number, (before, after) in enumerate(zip(stored.cells, ran.cells, strict=True)):
        assert printed(after) == printed(before), f"{path.name}: cell {number}"
        assert pictures(after) == pictures(before), f"{path.name}: cell {number}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_as_it_ran(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(map(printed, cells)) and any(map(pictures, cells))
