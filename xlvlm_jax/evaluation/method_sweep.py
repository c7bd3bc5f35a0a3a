"""Sweeps over methods, sites and strengths: resumable trials, their Pareto front, a table.

<directory>/sweep.json     the settings that all trials share
<directory>/plain.json     {sample: the plain model's answer, or {"skipped": why there is none}}
<directory>/trials.jsonl   a line per finished trial
<directory>/trials.csv     the same as a table, once all are finished

Trials are tried in groups, and each finished group is written. A run that was killed resumes after
the last group; further methods, sites or strengths can be added to the same directory.
"""

import csv
import dataclasses
import hashlib
import io
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

from ports import VLM
from ports.messages import few
from xlvlm_jax.data.frames import pandas_module
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.evaluation.predict import PLAIN, Condition, Stage, predict
from xlvlm_jax.evaluation.sweep import Trial, finite, vector_numbers
from xlvlm_jax.evaluation.tasks import Task
from xlvlm_jax.steering.methods import Steering
from xlvlm_jax.storage import atomic, versions
from xlvlm_jax.storage.same_model import model_of, with_adapter_of

Axis = Literal["off_target", "cost"]
AXES = ("off_target", "cost")
AT_ONCE = 32  # trials per group: what a killed run loses at most
COLUMNS = (
    *("method", "site", "vector", "edit", "alpha", "where"),
    *("effect", "cost", "off_target", "on_front", "chosen"),
)


class Attempt(NamedTuple):
    """A condition to try, and the method that its vector comes from."""

    method: str
    condition: Condition


class Sweep(NamedTuple):
    """All trials of a sweep.

    Attributes:
        methods: the method of each trial.
        trials: N trials.
        axis: what the budget limits, "off_target" or "cost", see `Trial`.
        budget: the highest cost of a trial that may be chosen.
        skipped: {sample: why it was not answered}; None if all were.
    """

    methods: tuple[str, ...]
    trials: tuple[Trial, ...]
    axis: Axis = "off_target"
    budget: float = math.inf
    skipped: Mapping[str, str] | None = None

    @property
    def on_front(self) -> Bool[np.ndarray, " N"]:
        """bool[N]: trials that no other one beats both in effect and on the axis."""
        return pareto_front(
            np.array([trial.effect for trial in self.trials]),
            np.array([getattr(trial, self.axis) for trial in self.trials]),
        )

    @property
    def _numbers(self) -> list[int]:
        return vector_numbers([trial.condition for trial in self.trials], self.methods)

    def chosen(self, method: str | None = None) -> Trial:
        """Returns the best trial within the budget, see `best_within`.

        Args:
            method: the method whose trials to choose from; None for all.

        Raises:
            ValueError: as `best_within`.
        """
        kept = [
            trial
            for name, trial in zip(self.methods, self.trials, strict=True)
            if method in (None, name)
        ]
        return best_within(kept, self.budget, self.axis)

    def rows(self) -> list[dict[str, Any]]:
        """Returns a row per trial, of plain values by the names in COLUMNS.

        None is chosen if no trial has an effect to choose by.
        """
        usable = any(is_usable(trial, self.axis) for trial in self.trials)
        best, numbers = self.chosen() if usable else None, self._numbers
        rows = []
        for method, trial, number, on_front in zip(
            self.methods, self.trials, numbers, self.on_front, strict=True
        ):
            told = trial.describe()
            where = told.get("where")
            known = {
                "method": method,
                "site": " + ".join(told.get("sites", ())),
                "vector": number,
                "where": where if isinstance(where, str | None) else json.dumps(where),
                "on_front": bool(on_front),
                "chosen": trial is best,
            }
            rows.append({name: known.get(name, told.get(name)) for name in COLUMNS})
        return rows

    def describe(self, task: Task, **of: Any) -> dict[str, Any]:
        """Returns JSON values, in the form of `describe_sweep`.

        Args:
            task: the task that the trials were tried for.
            of: further values, such as the split that they were tried on.
        """
        best = self.chosen()
        told = [
            {"method": method, **trial.describe(), "vector": number}
            for method, trial, number in zip(self.methods, self.trials, self._numbers, strict=True)
        ]
        (chosen,) = (each for each, trial in zip(told, self.trials, strict=True) if trial is best)
        return {
            **of,
            "quantities": {"effect": task.effect._asdict(), "cost": task.cost._asdict()},
            **({"unreadable": dict(self.skipped)} if self.skipped else {}),
            "wanted": finite(task.wanted),
            "max_cost": finite(task.max_cost),
            "axis": self.axis,
            "budget": finite(self.budget),
            "chosen": chosen,
            "trials": told,
        }

    def to_csv(self) -> str:
        """Returns the rows as CSV, with the names of the columns; unknown numbers are empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        return text.getvalue()

    def to_pandas(self) -> Any:
        """Returns the rows as a pandas table.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        return pandas_module().DataFrame(self.rows(), columns=list(COLUMNS))


def pareto_front(
    effects: Float[np.ndarray, " N"], costs: Float[np.ndarray, " N"]
) -> Bool[np.ndarray, " N"]:
    """Returns which points no other point beats: a larger effect at no larger cost, or the reverse.

    Args:
        effects: float[N], larger is better.
        costs: float[N], smaller is better.

    Returns:
        bool[N]; equal points are on the front together, points with NaN never are.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import evaluation
        >>> effects, costs = np.array([0.9, 0.5, 0.4]), np.array([0.3, 0.1, 0.2])
        >>> evaluation.pareto_front(effects, costs).tolist()
        [True, True, False]
    """
    effects, costs = (np.asarray(values, np.float64) for values in (effects, costs))
    usable = np.isfinite(effects) & np.isfinite(costs)
    no_worse = (effects >= effects[:, None]) & (costs <= costs[:, None])
    better = (effects > effects[:, None]) | (costs < costs[:, None])
    return usable & ~(no_worse & better & usable).any(axis=1)


def best_within(trials: Sequence[Trial], budget: float, axis: Axis = "off_target") -> Trial:
    """Returns the trial with the largest effect within a budget.

    Args:
        trials: the trials to choose from.
        budget: maximum of the axis.
        axis: "off_target", the share of other answers that change, or "cost", see `Trial`.

    Returns:
        The trial; ties go to the smaller value on the axis, then to the weaker strength. If nothing
        is within the budget, the trial with the smallest value on the axis.

    Raises:
        ValueError: no trial has a finite effect and a finite value on the axis.
    """
    usable = [trial for trial in trials if is_usable(trial, axis)]
    if not usable:
        raise ValueError(
            f"none of {len(trials)} trials has an effect and {axis} to choose by; use a split with "
            "more answers to steer from, and others"
        )
    within = [t for t in usable if getattr(t, axis) <= budget]
    if not within:
        return min(usable, key=lambda t: (getattr(t, axis), -t.effect, abs(t.condition.alpha)))
    return min(within, key=lambda t: (-t.effect, getattr(t, axis), abs(t.condition.alpha)))


def is_usable(trial: Trial, axis: Axis) -> bool:
    """Returns whether a trial has an effect and a value on the axis to choose by."""
    return math.isfinite(trial.effect) and math.isfinite(getattr(trial, axis))


def attempts(
    fitted: Sequence[tuple[str, Steering]],
    alphas: Sequence[float],
    wheres: Sequence[Any] = (None,),
    edit: str = "add",
) -> list[Attempt]:
    """Returns every combination of vectors, positions and strengths.

    Args:
        fitted: (name of the method, vector at one site).
        alphas: strengths.
        wheres: token positions, see `ports.add`; None for those each vector is meant for.
        edit: the kind of edit, see `Condition`.
    """
    return [
        Attempt(method, Condition((steering,), alpha, where, edit))
        for method, steering in fitted
        for where in wheres
        for alpha in alphas
    ]


def run_sweep(
    vlm: VLM,
    samples: Sequence[Sample],
    task: Task,
    tried: Sequence[Attempt],
    directory: str | Path,
    *,
    budget: float = math.inf,
    axis: Axis = "off_target",
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    at_once: int = AT_ONCE,
    strict: bool = False,
    stage: Stage | None = None,
) -> Sweep:
    """Tries every condition on samples, continuing what an earlier run has left in a directory.

    Args:
        vlm: the model.
        samples: the samples to answer, such as a validation split.
        task: defines effect, cost and off-target change (`task.trial`).
        tried: the conditions.
        directory: see the head of this file.
        budget, axis: as for `best_within`.
        max_new_tokens: maximum number of tokens per answer; None for the task's default.
        batch_size: samples per batch.
        at_once: trials per group; those of a group share compiled programs and pictures.
        strict: stop at a sample that can't be read or processed, instead of skipping it.
        stage: stage(name) starts a progress bar and returns advance(done, total).

    Returns:
        The trials, in the order of `tried`.

    Raises:
        ValueError: the directory holds a sweep of another model, other samples or another task;
            there is nothing to try; a picture that was read for the plain answers can't be read for
            a trial, which is then not stored; the plain answers leave no effect to choose by; or as
            `predict` and the task.
        OSError: the directory can't be written.
    """
    task.require_trial(samples)
    if not tried:
        raise ValueError("there is nothing to try; give methods, sites and strengths")
    if axis not in AXES:
        raise ValueError(f"axis is {axis!r}; expected one of {', '.join(AXES)}")
    directory = Path(directory)
    new_tokens = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    settings = {
        "version": versions.VERSION,
        **model_of(vlm),
        "generation_config": vlm.logits_options,
        "task": task.describe(),
        "max_new_tokens": new_tokens,
        "samples": _digest([(s.id, s.prompt, str(s.image), s.references) for s in samples]),
        "dtype": vlm.dtype.name,
        "metadata": _digest_of_json([dict(s.metadata) for s in samples]),
        "word lists": _digest_of_json(getattr(task, "lists", None)),
    }
    _require_same(directory, settings)
    common: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "batch_size": batch_size,
        "strict": strict,
    }
    kept, plain, skipped = _plain(vlm, samples, directory, **common)
    require_effect(task, kept, plain, axis)
    known = _finished(directory / "trials.jsonl")
    keys = [_key(attempt) for attempt in tried]
    missing = [i for i, key in enumerate(keys) if key not in known]
    advance = None if stage is None else stage("trying")
    for first in range(0, len(missing), at_once):
        group = missing[first : first + at_once]
        conditions = [tried[i].condition for i in group]
        predictions = predict(vlm, kept, conditions, **common)
        for name, reason in predictions.errors.items():
            raise ValueError(
                f"sample {name} was answered by the plain model, and can't be read for the trials "
                f"({reason}); restore it and run again, which continues after the last group"
            )
        for i, given in zip(group, predictions.answers, strict=True):
            trial = task.trial(kept, plain, tried[i].condition, [str(answer) for answer in given])
            known[keys[i]] = {"method": tried[i].method, **trial.describe()}
        lines = (json.dumps({"key": key, **row}) + "\n" for key, row in known.items())
        atomic.write(directory / "trials.jsonl", "".join(lines))
        if advance is not None:
            advance(len(tried) - len(missing) + first + len(group), len(tried))
    trials = tuple(
        Trial(attempt.condition, *(_or_nan(known[key][name]) for name in Trial._fields[1:]))
        for attempt, key in zip(tried, keys, strict=True)
    )
    methods = tuple(attempt.method for attempt in tried)
    sweep = Sweep(methods, trials, axis, budget, skipped)
    atomic.write(directory / "trials.csv", sweep.to_csv())
    return sweep


_TOLD_SINCE_0_2 = ("dtype", "metadata", "word lists")


def require_effect(
    task: Task, samples: Sequence[Sample], plain: Sequence[str], axis: Axis = "cost"
) -> None:
    """Checks, before anything is tried, that the plain answers leave something to choose by.

    Args:
        task: defines effect and cost.
        samples: the samples that were answered.
        plain: the plain answers to them.
        axis: what is compared besides the effect.

    Raises:
        ValueError: effect or cost of a trial is undefined whatever it answers, such as where there
            is no false yes to lose; or as `task.trial`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of means of nothing, which are told here
        unchanged = task.trial(samples, plain, PLAIN, plain)
    for name, quantity in (("effect", task.effect), (axis, task.cost)):
        if not math.isfinite(getattr(unchanged, name)):
            what = quantity.name if name != "off_target" else "share of other answers that change"
            raise ValueError(
                f"the plain answers to {len(samples)} samples leave nothing to choose by: "
                f"'{what}' is undefined; choose on a split with more samples"
            )


def _require_same(directory: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings of a sweep; raises ValueError if the directory has others."""
    path = directory / "sweep.json"
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        before = json.loads(path.read_text("utf-8"))
        versions.require(path, before, "sweep again")
        before = with_adapter_of(before, settings)
        # Sweeps of earlier releases do not tell these.
        before = {name: settings[name] for name in _TOLD_SINCE_0_2} | before
        if differ := [name for name in settings if before.get(name) != settings[name]]:
            raise ValueError(
                f"{directory} holds a sweep with another {few(differ)}; give another output, or "
                "replace it with --overwrite"
            )
        return
    directory.mkdir(parents=True, exist_ok=True)
    atomic.write(path, json.dumps(settings, indent=2) + "\n")


def _plain(
    vlm: VLM, samples: Sequence[Sample], directory: Path, **common: Any
) -> tuple[list[Sample], list[str], dict[str, str]]:
    """Returns the readable samples, the plain answers to them and why others were skipped.

    They are read from the directory if they are there.
    """
    path = directory / "plain.json"
    if path.is_file():
        given = json.loads(path.read_text("utf-8"))
    else:
        predictions = predict(vlm, samples, [PLAIN], **common)
        kept, (answers,) = predictions.readable(samples)
        given = {sample.id: answer for sample, answer in zip(kept, answers, strict=True)}
        given |= {name: {"skipped": reason} for name, reason in predictions.errors.items()}
        atomic.write(path, json.dumps(given) + "\n")
    # Earlier releases left skipped samples out.
    unknown = {"skipped": "it could not be read when the sweep began"}
    found = [(sample, given.get(sample.id, unknown)) for sample in samples]
    skipped = {s.id: answer["skipped"] for s, answer in found if isinstance(answer, dict)}
    kept = [(sample, answer) for sample, answer in found if not isinstance(answer, dict)]
    return [sample for sample, _ in kept], [answer for _, answer in kept], skipped


def _finished(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the finished trials by their keys."""
    if not path.is_file():
        return {}
    rows = (json.loads(line) for line in path.read_text("utf-8").splitlines())
    return {row.pop("key"): row for row in rows}


def _key(attempt: Attempt) -> str:
    """Returns what identifies a trial: method, condition and the numbers of its vectors."""
    fields = [
        {f.name: getattr(vector, f.name) for f in dataclasses.fields(vector)}  # type: ignore
        if dataclasses.is_dataclass(vector)
        else vars(vector)
        for vector in attempt.condition.vectors
    ]
    numbers = [{k: v for k, v in each.items() if k != "source"} for each in fields]
    return _digest([attempt.method, attempt.condition.describe(), numbers])


def _digest(values: Any) -> str:
    """Returns a short digest of nested values and arrays."""
    digest = hashlib.sha256()
    leaves, tree = jax.tree.flatten(values)
    digest.update(str(tree).encode())
    for leaf in leaves:
        array = hasattr(leaf, "shape")
        digest.update(np.asarray(leaf).tobytes() if array else repr(leaf).encode())
    return digest.hexdigest()[:16]


def _digest_of_json(values: Any) -> str:
    """Returns a short digest of values of JSON and sets, whatever their order."""

    def ordered(value: Any) -> Any:
        return sorted(value) if isinstance(value, set | frozenset) else str(value)

    text = json.dumps(values, sort_keys=True, default=ordered)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
