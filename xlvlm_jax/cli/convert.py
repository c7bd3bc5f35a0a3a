"""`xlvlm convert`: writes a checkpoint in Orbax's format, which each host can read in parts."""

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from xlvlm_jax.cli.console import Model, console, load_model, spinner
from xlvlm_jax.storage import outputs

# Files beside the weights that describe them, the processor and the tokenizer.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model")
_NOT_COPIED = ("*.index.json", "params.json")


def convert(
    model: Model,
    output: Annotated[Path, typer.Option(help="Directory to write; must be new or empty.")],
    dtype: Annotated[
        str, typer.Option(help="Dtype of the written parameters: float32, bfloat16 or float16.")
    ] = "float32",
) -> None:
    """Convert a checkpoint to Orbax parameters, which a sharded load reads in parts."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not empty; name a new directory")
    outputs.require_writable(output.parent)
    vlm = load_model(model, dtype)
    with spinner(f"writing {output}"):
        _write(vlm, output)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    console.print(f"{size / 1e9:,.3f} GB in {output}", highlight=False)


def _write(vlm: Any, output: Path) -> None:
    """Writes under a temporary name, then renames: a directory with the final name is complete."""
    from ports.checkpoint import orbax_io

    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _copy_descriptions(vlm.directory, temporary)
        orbax_io.save(vlm.params, temporary, vlm.fingerprint)
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_descriptions(source: Path, target: Path) -> None:
    left_out = {file for pattern in _NOT_COPIED for file in source.glob(pattern)}
    for file in {file for pattern in _COPIED for file in source.glob(pattern)} - left_out:
        if file.is_file():
            # Files in the Hub's cache are links: copy what they point to.
            shutil.copyfile(file, target / file.name)
