"""`xlvlm import-pth` and `export-pth`: exchange features with XL-VLMs."""

from pathlib import Path
from typing import Annotated

import typer

from xlvlm_jax.cli.console import Overwrite, console, refuse_existing

Sites = Annotated[
    list[str] | None, typer.Option(help="Site or pattern; may be repeated. Default: all.")
]


def import_pth(
    file: Annotated[Path, typer.Argument(help="Hidden states saved by XL-VLMs (.pth).")],
    output: Annotated[Path, typer.Option(help="Directory of features to write.")],
    site: Sites = None,
    rows: Annotated[
        str,
        typer.Option(help="Rows per sample: each of its positions (each) or their mean (mean)."),
    ] = "each",
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the stored states. Default: that of the file.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Directory that holds the images now, if they were moved.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of the model, recorded in the manifest.")
    ] = None,
) -> None:
    """Import features saved by XL-VLMs; executes nothing in the file."""
    from ports.messages import counted
    from xlvlm_jax.features.pth import import_features

    features = import_features(
        file, output, sites=site or (), rows=rows, dtype=dtype, images=images, model=model
    )
    console.print(
        f"{counted(len(features.samples), 'sample')}, {counted(len(features.tokens), 'row')} of"
        f" {', '.join(features.sites)} -> {output}"
    )


def export_pth(
    features: Annotated[Path, typer.Argument(help="Directory of features.")],
    output: Annotated[Path, typer.Option(help="File to write (.pth).")],
    site: Sites = None,
    overwrite: Overwrite = False,
) -> None:
    """Export features to a file that XL-VLMs and torch.load can read."""
    from ports.messages import counted
    from xlvlm_jax import Features
    from xlvlm_jax.features.pth import export_features

    refuse_existing(output, overwrite)
    opened = Features.open(features)
    export_features(opened, output, sites=site or ())
    samples, rows = counted(len(opened.samples), "sample"), counted(len(opened.tokens), "row")
    console.print(f"{samples}, {rows} -> {output}")
