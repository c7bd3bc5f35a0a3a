"""The stage behind `xlvlm evaluate` and `xlvlm steer apply`: answers, scores, files.

<output>/summary.json        what was asked how, every figure, and the trials of a sweep
<output>/predictions.jsonl   a line a sample: question, people's answers, the model's
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ports import VLM
from ports.checkpoint import hub
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.evaluation.predict import PLAIN, Condition, predict
from xlvlm_jax.evaluation.sweep import Trial, choose
from xlvlm_jax.evaluation.tasks import Task
from xlvlm_jax.storage import atomic, pictures

Stage = Callable[[str], Callable[..., None]]


def evaluate(
    vlm: VLM,
    samples: Sequence[Sample],
    task: Task,
    output: str | Path,
    conditions: Mapping[str, Condition] | None = None,
    *,
    about: dict[str, Any] | None = None,
    sweep: dict[str, Any] | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    strict: bool = False,
    stage: Stage | None = None,
) -> dict[str, Any]:
    """Answers under each condition, measured and written; returns the summary.

    Args:
        vlm: the model.
        samples: what is asked.
        task: what is measured.
        output: a directory; what an earlier evaluation left there is replaced.
        conditions: by name, besides "plain", the model as it is.
        about: where samples and vectors come from, free for the caller; kept in the summary.
        sweep: what `describe_sweep` made of the trials by which a condition was chosen.
        max_new_tokens: of an answer at most; None for the task's own.
        batch_size: samples a batch.
        strict: stop at a sample that can't be read or processed, instead of passing it over.
        stage: stage(name) begins a progress bar and returns advance(done, total).

    Raises ValueError for words that are not of the data set, no readable image, and as `predict`
    does; OSError if the directory can't be written. Then nothing is written.
    """
    task.require(samples)
    conditions = {"plain": PLAIN, **(conditions or {})}
    predictions = predict(
        vlm,
        samples,
        list(conditions.values()),
        max_new_tokens=max_new_tokens or task.max_new_tokens,
        batch_size=batch_size,
        strict=strict,
        progress=None if stage is None else stage("answering"),
    )
    kept, answers = predictions.readable(samples)
    given = dict(zip(conditions, answers, strict=True))
    summary: dict[str, Any] = {
        "model": None if vlm.directory is None else hub.name_of(vlm.directory),
        "about": about or {},
        **({"generation_config": options} if (options := vlm.logits_options) else {}),
        "samples": len(kept),
        "unreadable": predictions.errors,
        **task.describe(),
        "conditions": {
            name: {**condition.describe(), **task.measure(kept, given["plain"], given[name])}
            for name, condition in conditions.items()
        },
        **({} if sweep is None else {"sweep": sweep}),
    }
    output = Path(output)
    root = pictures.root_of(os.path.abspath(sample.image) for sample in kept)
    summary["pictures"] = pictures.describe(root, output)
    lines = []
    for i, sample in enumerate(kept):
        described = {
            "id": sample.id,
            "image": pictures.name_in(root, sample.image),
            "question": sample.metadata.get("question"),
            "answer": sample.metadata.get("answer"),
            "references": list(sample.references),
            "predictions": {name: given[name][i] for name in conditions},
        }
        lines.append(json.dumps({k: v for k, v in described.items() if v is not None}) + "\n")
    output.mkdir(parents=True, exist_ok=True)
    # Without its summary a directory is no evaluation: it goes first and comes last.
    (output / "summary.json").unlink(missing_ok=True)
    atomic.write(output / "predictions.jsonl", "".join(lines))
    atomic.write(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def select(
    vlm: VLM,
    samples: Sequence[Sample],
    task: Task,
    conditions: Sequence[Condition],
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    strict: bool = False,
    stage: Stage | None = None,
) -> tuple[Trial, list[Trial]]:
    """Tries conditions on samples: the one to take, and all of them.

    Args are those of `evaluate`. Raises ValueError as `evaluate` and `choose` do.
    """
    task.require(samples)
    predictions = predict(
        vlm,
        samples,
        [PLAIN, *conditions],
        max_new_tokens=max_new_tokens or task.max_new_tokens,
        batch_size=batch_size,
        strict=strict,
        progress=None if stage is None else stage("trying"),
    )
    kept, (plain, *answers) = predictions.readable(samples)
    trials = [
        task.trial(kept, plain, condition, given)
        for condition, given in zip(conditions, answers, strict=True)
    ]
    return choose(trials, task.wanted, task.max_cost), trials


def describe_sweep(chosen: Trial, trials: Sequence[Trial], task: Task, **of: Any) -> dict[str, Any]:
    """Trials as JSON values: what they were tried on, which was chosen, and each."""
    return {
        **of,
        "wanted": task.wanted,
        "max_cost": task.max_cost,
        "chosen": chosen.describe(),
        "trials": [trial.describe() for trial in trials],
    }
