"""The stage of `xlvlm evaluate` and `xlvlm steer apply`: predicts, scores and writes files.

<output>/summary.json        the settings, every score, and the trials of a sweep
<output>/predictions.jsonl   a line per sample: question, the data set's answers, the model's
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ports import VLM
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.evaluation import hallucination, judge
from xlvlm_jax.evaluation.baseline import read_baseline, warn_of_others
from xlvlm_jax.evaluation.method_sweep import require_effect
from xlvlm_jax.evaluation.predict import PLAIN, Condition, Predictions, Stage, predict
from xlvlm_jax.evaluation.sweep import Trial, choose, finite, names, vector_numbers
from xlvlm_jax.evaluation.tasks import Task
from xlvlm_jax.storage import atomic, outputs, pictures, versions
from xlvlm_jax.storage.same_model import adapter_of, checkpoint_of


def evaluate(
    vlm: VLM,
    samples: Sequence[Sample],
    task: Task,
    output: str | Path,
    conditions: Mapping[str, Condition] | None = None,
    *,
    baseline: str | Path | None = None,
    about: dict[str, Any] | None = None,
    sweep: dict[str, Any] | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    strict: bool = False,
    stage: Stage | None = None,
) -> dict[str, Any]:
    """Predicts under each condition, scores the answers and writes the results.

    Args:
        vlm: the model.
        samples: the samples to answer.
        task: what to measure.
        output: the directory to write; replaces an earlier evaluation there.
        conditions: {name: condition}, besides "plain", the unsteered model.
        baseline: an earlier run whose plain answers are taken instead of running the plain model,
            see `read_baseline`.
        about: where samples and vectors come from, in any form; stored in the summary, with the
            model's adapter and dtype.
        sweep: what `describe_sweep` returns, if a sweep chose a condition.
        max_new_tokens: maximum number of tokens per answer; None for the task's default.
        batch_size: samples per batch.
        strict: stop at a sample that can't be read or processed, instead of skipping it.
        stage: stage(name) starts a progress bar and returns advance(done, total).

    Returns:
        The content of summary.json.

    Raises:
        ValueError: words do not occur in the data set, no image can be read, a condition is called
            "plain", or as `predict`. Nothing is written.
        OSError: the directory can't be written; found before anything is answered.
    """
    task.require(samples)
    if "plain" in (conditions or {}):
        raise ValueError("a condition is called 'plain', as the unsteered model is; rename it")
    outputs.require_writable(Path(output))
    conditions = {"plain": PLAIN, **(conditions or {})}
    made_with = {**adapter_of(vlm), "dtype": vlm.dtype.name}
    new_tokens = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    known, unread = [], {}
    if baseline is not None:
        known = [read_baseline(baseline, samples)]
        warn_of_others(
            baseline,
            samples,
            about=made_with,
            **checkpoint_of(vlm),
            max_new_tokens=new_tokens,
            generation_config=vlm.logits_options,
        )
        answered = zip(samples, known[0], strict=True)
        unread = {s.id: "it has no answer in the baseline" for s, text in answered if text is None}
    asked = list(conditions.values())[len(known) :]
    predictions = Predictions([], {})
    if asked:
        predictions = predict(
            vlm,
            samples,
            asked,
            max_new_tokens=new_tokens,
            batch_size=batch_size,
            strict=strict,
            progress=None if stage is None else stage("answering"),
        )
    predictions = Predictions([*known, *predictions.answers], unread | predictions.errors)
    kept, answers = predictions.readable(samples)
    given = dict(zip(conditions, answers, strict=True))
    summary: dict[str, Any] = {
        "version": versions.VERSION,
        **checkpoint_of(vlm),
        "max_new_tokens": new_tokens,
        "about": {
            **made_with,
            **(about or {}),
            **({} if baseline is None else {"baseline": str(baseline)}),
        },
        **({"generation_config": options} if (options := vlm.logits_options) else {}),
        "samples": len(kept),
        "unreadable": predictions.errors,
        **task.describe(),
        "conditions": {
            name: {**condition.describe(), **task.measure(kept, given["plain"], given[name])}
            for name, condition in conditions.items()
        },
        **_paired(task, kept, given),
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
            "prompt": sample.prompt,
            "question": sample.metadata.get("question"),
            "scenario": sample.metadata.get("scenario"),
            "answer": sample.metadata.get("answer"),
            "references": list(sample.references),
            "predictions": {name: given[name][i] for name in conditions},
        }
        lines.append(json.dumps({k: v for k, v in described.items() if v is not None}) + "\n")
    output.mkdir(parents=True, exist_ok=True)
    # A directory without a summary is not an evaluation: removed first, written last.
    # Verdicts on earlier answers go too.
    for name in ("summary.json", judge.SUMMARY, judge.VERDICTS):
        (output / name).unlink(missing_ok=True)
    atomic.write(output / "predictions.jsonl", "".join(lines))
    atomic.write(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _paired(
    task: Task, samples: Sequence[Sample], given: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Returns {"paired": tests of the conditions against the plain model and the instruction}.

    Copies of a question, such as those that the files of POPE share, are one observation.
    """
    places = hallucination.distinct_questions(samples)
    asked = [samples[i] for i in places]
    judged = {name: task.judged(asked, [each[i] for i in places]) for name, each in given.items()}
    tests = hallucination.paired_tests(judged, ("plain", "instruction"))
    return {"paired": tests} if tests else {}


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
    """Tries conditions on samples and chooses the best.

    Args:
        vlm, samples, task, max_new_tokens, batch_size, strict, stage: as for `evaluate`.
        conditions: the conditions to try.

    Returns:
        The chosen trial, and all trials.

    Raises:
        ValueError: as `evaluate` and `choose`.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "strict": strict, "stage": stage}
    trials, _ = _try(vlm, samples, task, conditions, max_new_tokens=max_new_tokens, **options)
    return choose(trials, task.wanted, task.max_cost), trials


def _try(
    vlm: VLM,
    samples: Sequence[Sample],
    task: Task,
    conditions: Sequence[Condition],
    *,
    max_new_tokens: int | None = None,
    stage: Stage | None = None,
    **options: Any,
) -> tuple[list[Trial], dict[str, str]]:
    """Returns the trials of conditions, and why samples were skipped."""
    task.require_trial(samples)
    options["max_new_tokens"] = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    plain = predict(vlm, samples, [PLAIN], **options)
    kept, (unsteered,) = plain.readable(samples)
    require_effect(task, kept, unsteered)
    progress = None if stage is None else stage("trying")
    steered = predict(vlm, kept, conditions, progress=progress, **options)
    read, answers = steered.readable(kept)
    before = [text for s, text in zip(kept, unsteered, strict=True) if s.id not in steered.errors]
    trials = [
        task.trial(read, before, condition, given)
        for condition, given in zip(conditions, answers, strict=True)
    ]
    return trials, plain.errors | steered.errors


def evaluate_steering(
    vlm: VLM,
    samples: Sequence[Sample],
    task: Task,
    output: str | Path,
    conditions: Sequence[Condition],
    *,
    others: Sequence[Sample] = (),
    split: str | None = None,
    instruction: str | None = None,
    baseline: str | Path | None = None,
    about: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates steered conditions, or only the one that does best on other samples.

    Args:
        vlm, samples, task, output, baseline, about: as for `evaluate`.
        conditions: the conditions to evaluate, named after what tells them apart.
        others: samples to choose one of the conditions on; none to evaluate all of them.
        split: name of the split that these samples come from, for the summary.
        instruction: also evaluate the unsteered model with this text appended to the prompt.
        options: `max_new_tokens`, `batch_size`, `strict` and `stage`, as for `evaluate`.

    Returns:
        The content of summary.json; with `others`, its "sweep" holds the choice and all trials.

    Raises:
        ValueError: as `evaluate` and `select`.
        OSError: the directory can't be written.
    """
    sweep = None
    if others:
        trials, skipped = _try(vlm, others, task, conditions, **options)
        best = choose(trials, task.wanted, task.max_cost)
        told: dict[str, Any] = {"split": split, "samples": len(others) - len(skipped)}
        told |= {"unreadable": skipped} if skipped else {}
        sweep = describe_sweep(best, trials, task, **told)
        conditions = [best.condition]
    named = dict(zip(names(conditions), conditions, strict=True))
    if instruction is not None:
        named["instruction"] = Condition(instruction=instruction)
    return evaluate(
        vlm,
        samples,
        task,
        output,
        named,
        baseline=baseline,
        about=about,
        sweep=sweep,
        **options,
    )


def describe_sweep(chosen: Trial, trials: Sequence[Trial], task: Task, **of: Any) -> dict[str, Any]:
    """Returns the trials as JSON values.

    Args:
        chosen: the chosen trial.
        trials: all trials.
        task: the task that they were tried for.
        of: further values, such as the split that they were tried on.

    Returns:
        The further values, what effect and cost are, the task's limits (None if infinite), the
        chosen trial and all trials, each with the number of its vector, see `vector_numbers`.
    """
    *numbers, number = vector_numbers([trial.condition for trial in (*trials, chosen)])
    return {
        **of,
        "quantities": {"effect": task.effect._asdict(), "cost": task.cost._asdict()},
        "wanted": finite(task.wanted),
        "max_cost": finite(task.max_cost),
        "chosen": {**chosen.describe(), "vector": number},
        "trials": [
            {**trial.describe(), "vector": number}
            for trial, number in zip(trials, numbers, strict=True)
        ],
    }
