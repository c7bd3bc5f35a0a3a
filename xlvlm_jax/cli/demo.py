"""Commands about the model and the data set that ship with the package."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from xlvlm_jax.cli.console import (
    Overwrite,
    Seed,
    bars,
    console,
    progress_bars,
    refuse_existing,
)
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
    from xlvlm_jax import demo as module

    refuse_existing(output / "run.json", overwrite)  # written last: another run goes on
    with progress_bars() as progress:
        result = module.run(
            output, word=word, num_concepts=num_concepts, seed=seed, stage=bars(progress)
        )
    module.show(result, console)


def scenes(
    output: Annotated[Path, typer.Argument(help="The directory to write.")],
    train: Annotated[int, typer.Option(help="Pictures of the training split.")] = 2000,
    val: Annotated[int, typer.Option(help="Pictures of the validation split.")] = 500,
    test: Annotated[int, typer.Option(help="Pictures of the test split.")] = 500,
    overwrite: Overwrite = False,
    seed: Seed = 0,
) -> None:
    """Draws the embedded data set, in the file layouts of COCO and VQAv2."""
    from xlvlm_jax.data import scenes as module

    refuse_existing(output, overwrite)
    with progress_bars() as progress:
        advance = bars(progress)("drawing")
        module.write(output, train=train, val=val, test=test, seed=seed, progress=advance)
    console.print(f"{train + val + test} pictures in {output}")


def train_demo(
    work: Annotated[Path, typer.Option(help="Checkpoints and log; training goes on from it.")],
    output: Annotated[Path, typer.Option(help="Where the trained models are written.")],
    seed: Seed = 0,
    num_test: Annotated[int, typer.Option(help="Test pictures to evaluate on.")] = 500,
) -> None:
    """Makes the embedded model again, from nothing: up to two hours on two free cores."""
    resumes()
    from xlvlm_jax.embedded import evaluate, train

    with progress_bars() as progress:
        started: dict[str, Callable[[int, int], None]] = {}
        stage = bars(progress)

        def log(figures: dict[str, Any]) -> None:
            name = figures.pop("stage")
            started.setdefault(name, stage(name))(figures.pop("step"), figures.pop("of"))
            shown = "  ".join(f"{key} {value:.3f}" for key, value in figures.items())
            progress.console.print(f"{name}  {shown}", style="dim")

        train.train(work, output / "clip", output / "llava", seed=seed, log=log)
        result = evaluate.evaluate(output / "llava", num_test, progress=stage("evaluating"))
    evaluate.show(result, console)
    (output / "llava" / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
