"""`xlvlm train-demo`: trains the bundled model from scratch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from xlvlm_jax.cli.console import Seed, bars, console, progress_bars
from xlvlm_jax.cli.runtime import resumes


def train_demo(
    work: Annotated[
        Path,
        typer.Option(help="Directory of training states and logs; training resumes from it."),
    ],
    output: Annotated[Path, typer.Option(help="Directory to write the trained models to.")],
    seed: Seed = 0,
    num_test: Annotated[int, typer.Option(help="Number of test images to evaluate on.")] = 500,
) -> None:
    """Train the bundled model from scratch: about an hour on two cores."""
    resumes()
    from xlvlm_jax.demo.embedded import evaluate, train

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
