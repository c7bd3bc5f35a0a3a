"""Commands that exchange features with the reference implementation."""

from pathlib import Path
from typing import Annotated

import typer

from xlvlm_jax.cli.console import Overwrite, console, refuse_existing

Sites = Annotated[
    list[str] | None, typer.Option(help="A module, or a pattern; may be repeated. By default all.")
]


def import_pth(
    file: Annotated[Path, typer.Argument(help="Hidden states that XL-VLMs saved (.pth).")],
    output: Annotated[Path, typer.Option(help="The directory of features to write.")],
    site: Sites = None,
    rows: Annotated[
        str, typer.Option(help="each position of a sample is a row, or their mean.")
    ] = "each",
    dtype: Annotated[
        str | None, typer.Option(help="Of the states on disk, if not the file's own.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Where the pictures lie now, if they were moved.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model's name, for the record.")] = None,
) -> None:
    """The reference's saved features -> features/. Nothing in the file is executed."""
    from xlvlm_jax.features.pth import import_features

    features = import_features(
        file, output, sites=site or (), rows=rows, dtype=dtype, images=images, model=model
    )
    console.print(
        f"{len(features.samples)} samples, {len(features.tokens)} rows of"
        f" {', '.join(features.sites)} -> {output}"
    )


def export_pth(
    features: Annotated[Path, typer.Argument(help="A directory of features.")],
    output: Annotated[Path, typer.Option(help="The file to write (.pth).")],
    site: Sites = None,
    overwrite: Overwrite = False,
) -> None:
    """features/ -> a file that XL-VLMs (and torch.load) reads."""
    from xlvlm_jax import Features
    from xlvlm_jax.features.pth import export_features

    refuse_existing(output, overwrite)
    opened = Features.open(features)
    export_features(opened, output, sites=site or ())
    console.print(f"{len(opened.samples)} samples, {len(opened.tokens)} rows -> {output}")
