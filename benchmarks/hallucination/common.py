"""What both parts share: a setting, kept fits, trials on one split, and the test on another."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import ports
from xlvlm_jax import Features, evaluation, steering
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.evaluation import Attempt, Condition, Sweep, Trial
from xlvlm_jax.features import ExtractionSettings, extract
from xlvlm_jax.metrics.uncertainty import bootstrap, mcnemar
from xlvlm_jax.storage import atomic

HEADS = "language_model.model.layers.*.self_attn.heads"
BATCH = 32
INSTRUCTION = "instruction"


@dataclasses.dataclass(frozen=True)
class Setting:
    """The model, drawn pictures, where results go, and the maximum cost."""

    vlm: ports.VLM
    pictures: Path
    output: Path
    budget: float
    counts: Mapping[str, int | None]  # of a split's pictures that are used; None for all
    say: Callable[[str], None]

    def few(self, samples: Sequence[Sample], split: str) -> list[Sample]:
        """The samples of the first pictures of a split."""
        pictures = list(dict.fromkeys(sample.image_id for sample in samples))
        used = {*pictures[: self.counts[split]]}
        return [sample for sample in samples if sample.image_id in used]


class Entry(NamedTuple):
    """A method with one choice of its settings, and the strengths to try."""

    method: str
    key: str  # tells it from the method's other entries
    applied: Any  # a vector or the like, or several at once, or an instruction
    alphas: Sequence[float] = (1.0,)

    def conditions(self) -> list[Condition]:
        """A condition per strength."""
        if isinstance(self.applied, str):
            return [Condition(instruction=self.applied)]
        vectors = self.applied if isinstance(self.applied, tuple) else (self.applied,)
        return [Condition(vectors, alpha) for alpha in self.alphas]


class Trials(NamedTuple):
    """Everything that was tried on the validation split."""

    sweep: Sweep
    keys: list[str]  # of each trial's entry

    def best(self, method: str) -> tuple[Trial, str]:
        """A method's best trial, and the key of its entry."""
        trial = self.sweep.chosen(method)
        (place,) = (i for i, each in enumerate(self.sweep.trials) if each is trial)
        return trial, self.keys[place]


class Found(NamedTuple):
    """What a part found."""

    rows: list[dict[str, Any]]  # per method: what was chosen, and what it does on the test split
    sweep: Sweep


def layer(number: int) -> str:
    """The site of a decoder layer."""
    return f"language_model.model.layers.{number}"


def kept(directory: Path, name: str, fit: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What fit(*args, **options) gives, from its file if it was fitted before."""
    path = directory / f"{name}.safetensors"
    if not path.is_file():
        fit(*args, **options).save(path)
    return steering.load(path)


def features_of(
    setting: Setting, samples: Sequence[Sample], name: str, settings: ExtractionSettings
) -> Features:
    """The states of samples, from disk if they were extracted before."""
    directory = setting.output / "features" / name
    extract(setting.vlm, samples, directory, settings)
    return Features.open(directory)


def plain_answers(
    setting: Setting, samples: Sequence[Sample], name: str, new_tokens: int
) -> list[str]:
    """The model's answers without steering, from disk if they were given before."""
    path = setting.output / "features" / f"{name}.json"
    if not path.is_file():
        found = evaluation.predict(
            setting.vlm, samples, max_new_tokens=new_tokens, batch_size=BATCH
        )
        (answers,) = found.answers
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, json.dumps(answers))
    return json.loads(path.read_text("utf-8"))


def try_all(
    setting: Setting,
    samples: Sequence[Sample],
    task: Any,
    directory: Path,
    families: Iterable[Callable[[], list[Entry]]],
    new_tokens: int,
) -> Trials:
    """Tries families of entries on the validation samples; a family shares one program."""
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "batch_size": BATCH, "axis": "cost"}
    options["budget"] = setting.budget
    tried: list[Attempt] = []
    keys: list[str] = []
    for make in families:
        own: list[Attempt] = []
        for entry in make():
            own += [Attempt(entry.method, condition) for condition in entry.conditions()]
            keys += [entry.key] * (len(tried) + len(own) - len(keys))
        found = evaluation.run_sweep(
            setting.vlm, samples, task, own, directory, at_once=len(own), **options
        )
        for name in dict.fromkeys(found.methods):
            best = found.chosen(name)
            setting.say(
                f"{name}: {100 * best.effect:.0f} % gone, {best.cost:.2f} points lost, "
                f"strength {best.condition.alpha:g}"
            )
        tried += own
    whole = evaluation.run_sweep(setting.vlm, samples, task, tried, directory, **options)
    return Trials(whole, keys)


def strongest(sweep: Sweep, method: str) -> Trial:
    """A method's trial with the largest effect at any cost."""
    own = [t for name, t in zip(sweep.methods, sweep.trials, strict=True) if name == method]
    return evaluation.best_within(own, np.inf, "cost")


def test(
    setting: Setting,
    samples: Sequence[Sample],
    task: Any,
    directory: Path,
    trials: Trials,
    methods: Sequence[str],
    new_tokens: int,
    of_split: Mapping[str, Any],
) -> dict[str, list[str]]:
    """Answers the test samples under each method's best condition.

    Args:
        setting, task, directory, new_tokens: as for `try_all`.
        samples: the test samples.
        trials: what was tried on the validation split.
        methods: the methods to test, besides the instruction.
        of_split: {key of an entry: what to apply in its place}, for vectors of samples.

    Returns:
        {condition: answers}; "plain" and the strongest instruction are among them.
    """
    conditions: dict[str, Condition] = {}
    for name in dict.fromkeys((*methods, INSTRUCTION)):
        trial, key = trials.best(name)
        conditions[name] = trial.condition
        if key in of_split:
            (conditions[name],) = Entry(
                name, key, of_split[key], [trial.condition.alpha]
            ).conditions()
    strong = strongest(trials.sweep, INSTRUCTION).condition
    conditions[f"{INSTRUCTION}, strongest"] = strong
    evaluation.evaluate(
        setting.vlm,
        samples,
        task,
        directory,
        conditions,
        sweep=trials.sweep.describe(task, split="val"),
        max_new_tokens=new_tokens,
        batch_size=BATCH,
    )
    lines = (directory / "predictions.jsonl").read_text("utf-8").splitlines()
    given = [json.loads(line)["predictions"] for line in lines]
    return {name: [each[name] for each in given] for name in given[0]}


def chosen_row(trials: Trials, name: str) -> dict[str, Any]:
    """What was chosen of a method on the validation split."""
    if name not in trials.sweep.methods:  # the strongest instruction
        trial, key = strongest(trials.sweep, INSTRUCTION), ""
    else:
        trial, key = trials.best(name)
    return {
        "method": name,
        "setting": trial.condition.instruction or key,
        "strength": None if trial.condition.instruction else trial.condition.alpha,
        "val gone": trial.effect,
        "val cost": trial.cost,
        "within budget": trial.cost <= trials.sweep.budget,
        "best of all": trial is trials.sweep.chosen(),
    }


def share_gone(
    before: np.ndarray, after: np.ndarray, samples: Sequence[Sample]
) -> tuple[float, list[float]]:
    """The share of events that are gone, with its 95 % interval over pictures."""
    counts = np.stack([before, after], axis=1).astype(float)
    groups = [sample.image_id for sample in samples]
    interval = bootstrap(counts, groups, lambda x: {"gone": 1 - x[:, 1] / x[:, 0]})["gone"]
    return float(1 - after.sum() / before.sum()), list(interval)


def p_value(first: np.ndarray, second: np.ndarray) -> float:
    """McNemar's exact test of two bool[N]."""
    return mcnemar(first.tolist(), second.tolist()).p_value
