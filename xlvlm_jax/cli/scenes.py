"""`xlvlm scenes`: draws the bundled data set."""

from pathlib import Path
from typing import Annotated

import typer

from xlvlm_jax.cli.console import Overwrite, Seed, bars, console, progress_bars, refuse_existing


def scenes(
    output: Annotated[Path, typer.Argument(help="Directory to write.")],
    train: Annotated[int, typer.Option(help="Images in the training split.")] = 2000,
    val: Annotated[int, typer.Option(help="Images in the validation split.")] = 500,
    test: Annotated[int, typer.Option(help="Images in the test split.")] = 500,
    companions: Annotated[
        float,
        typer.Option(
            help="Share of captions and answers that claim an object that usually goes with the "
            "place but is not drawn: data to make a model hallucinate."
        ),
    ] = 0.0,
    overwrite: Overwrite = False,
    seed: Seed = 0,
) -> None:
    """Draw the bundled data set of simple scenes, in the file layouts of COCO and VQAv2."""
    from ports.messages import counted
    from xlvlm_jax.data import scenes as module

    refuse_existing(output, overwrite, directory=True)
    module.require_drawn(output)
    with progress_bars() as progress:
        advance = bars(progress)("drawing")
        module.write(
            output,
            train=train,
            val=val,
            test=test,
            seed=seed,
            companions=companions,
            overwrite=True,  # what exists was refused above
            progress=advance,
        )
    console.print(f"{counted(train + val + test, 'image')} -> {output}")
