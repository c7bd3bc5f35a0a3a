"""`xlvlm report`: writes a run directory as one HTML page."""

import functools
from pathlib import Path
from typing import Annotated

import typer

from xlvlm_jax.cli.console import (
    Images,
    Overwrite,
    console,
    errors,
    refuse_existing,
)


def report(
    run: Annotated[Path, typer.Argument(help="Run directory, with features/ and concepts*/.")],
    output: Annotated[
        Path | None, typer.Option(help="File to write. Default: RUN/report.html.")
    ] = None,
    images: Images = None,
    beside: Annotated[
        Path | None,
        typer.Option(help="Another run directory whose concepts to show next to those of RUN."),
    ] = None,
    picture_mb: Annotated[
        float,
        typer.Option(
            help="Maximum size of all pictures in megabytes; more shows more per concept.", min=0
        ),
    ] = 3.0,
    overwrite: Overwrite = False,
) -> None:
    """Write a run directory as one self-contained HTML page."""
    from xlvlm_jax.report import write_report

    refuse_existing(output or run / "report.html", overwrite)
    tell = functools.partial(errors.print, style="yellow")
    room = round(picture_mb * 1e6)
    path = write_report(run, output, images=images, beside=beside, picture_bytes=room, tell=tell)
    console.print(f"{path}")
