"""`xlvlm train-demo`: makes the embedded model again, from nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from xlvlm_jax.cli.console import Seed, bars, console, progress_bars
from xlvlm_jax.cli.runtime import resumes


def train_demo(
    work: Annotated[Path, typer.Option(help="Checkpoints and log; training goes on from it.")],
    output: Annotated[Path, typer.Option(help="Where the trained models are written.")],
    seed: Seed = 0,
    num_test: Annotated[int, typer.Option(help="Test pictures to evaluate on.")] = 500,
) -> None:
    """Makes the embedded model again, from nothing: up to two hours on two free cores."""
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
