"""`xlvlm demo`: the whole of it on the embedded model."""

from pathlib import Path
from typing import Annotated

import typer

from xlvlm_jax.cli.console import Overwrite, Seed, bars, console, progress_bars, refuse_existing
from xlvlm_jax.cli.runtime import resumes


def demo(
    output: Annotated[Path, typer.Option(help="The run directory.")] = Path("xlvlm-demo"),
    word: Annotated[str, typer.Option(help="The token of interest.")] = "dog",
    num_concepts: Annotated[int, typer.Option(help="K.")] = 20,
    overwrite: Overwrite = False,
    seed: Seed = 0,
) -> None:
    """The whole of it on the embedded model: concepts, scores, shift, steering, report."""
    resumes()
    from xlvlm_jax.demo import pipeline, summary

    refuse_existing(output / "run.json", overwrite)  # written last: another run goes on
    with progress_bars() as progress:
        result = pipeline.run(
            output, word=word, num_concepts=num_concepts, seed=seed, stage=bars(progress)
        )
    summary.show(result, console)
