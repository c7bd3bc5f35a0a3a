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
    require_counts,
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
    num_concepts: Annotated[
        int,
        typer.Option(
            help="Maximum number of concepts per directory to show in full; the others are rows of "
            "a table."
        ),
    ] = 500,
    overwrite: Overwrite = False,
) -> None:
    """Write a run directory as one self-contained HTML page."""
    from xlvlm_jax.report import write_report

    require_counts(num_concepts=num_concepts)
    refuse_existing(output or run / "report.html", overwrite, directory=False)
    tell = functools.partial(errors.print, style="yellow")
    room = round(picture_mb * 1e6)
    path = write_report(
        run,
        output,
        images=images,
        beside=beside,
        picture_bytes=room,
        num_concepts=num_concepts,
        tell=tell,
    )
    console.print(f"{path}")
