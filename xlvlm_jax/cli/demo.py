"""`xlvlm demo`: runs the full pipeline on the bundled model."""

from pathlib import Path
from typing import Annotated

import typer

from xlvlm_jax.cli.console import Overwrite, Seed, bars, console, progress_bars, refuse_existing
from xlvlm_jax.cli.runtime import resumes


def demo(
    output: Annotated[Path, typer.Option(help="Run directory to write.")] = Path("xlvlm-demo"),
    word: Annotated[
        str,
        typer.Option(
            help="Token of interest: explain the model's states at this word of its captions."
        ),
    ] = "dog",
    num_concepts: Annotated[int, typer.Option(help="Number of concepts, K.")] = 20,
    overwrite: Overwrite = False,
    seed: Seed = 0,
) -> None:
    """Run the full pipeline on the bundled model: concepts, scores, shift, steering, report."""
    resumes()
    from xlvlm_jax.demo import pipeline, summary

    refuse_existing(
        output / "run.json", overwrite, directory=False
    )  # written last: without it, a run resumes
    with progress_bars() as progress:
        result = pipeline.run(
            output,
            word=word,
            num_concepts=num_concepts,
            seed=seed,
            overwrite=overwrite,
            stage=bars(progress),
        )
    summary.show(result, console)
