"""Sweeps over vectors, strengths and positions: combinations to try, and choosing the best."""

import collections
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from xlvlm_jax.evaluation.predict import Condition, Steering


class Quantity(NamedTuple):
    """What effect or cost is of a task.

    Attributes:
        name: what it is, in words.
        unit: of the value times the scale.
        scale: what values are multiplied by to be shown.
    """

    name: str
    unit: str
    scale: float = 1.0

    def shown(self, value: float | None) -> str:
        """Returns a value with its unit; "undefined" for NaN, and for None, its form in JSON."""
        if value is None or math.isnan(value):
            return "undefined"
        return f"{self.scale * value:.1f} {self.unit}"


# Of a trial, whatever its task.
OFF_TARGET = Quantity("other answers that changed", "%", 100)


class Trial(NamedTuple):
    """The effect and cost of one condition, as its task defines them (`task.effect`, `.cost`).

    Attributes:
        condition: the vectors and their strength.
        effect: as the task defines it, see `Quantity`.
        cost: as the task defines it.
        off_target: share of other answers that changed; for captions, share of all that changed.
    """

    condition: Condition
    effect: float
    cost: float
    off_target: float

    def describe(self) -> dict[str, Any]:
        """Returns JSON values; None for a number that is undefined."""
        values = {name: getattr(self, name) for name in ("effect", "cost", "off_target")}
        known = {name: finite(value) for name, value in values.items()}
        return {**self.condition.describe(), **known}


def grid(
    vectors: Sequence[Steering | tuple[Steering, ...]],
    alphas: Sequence[float],
    wheres: Sequence[Any] = (None,),
    edit: str = "add",
) -> list[Condition]:
    """Returns the conditions of a grid: each vector with each strength at each set of positions.

    Args:
        vectors: vectors, or tuples of vectors that are applied together.
        alphas: strengths.
        wheres: token positions, see `ports.add`; None for those each vector is meant for.
        edit: the kind of edit.

    Returns:
        A condition per combination.
    """
    together = [vector if isinstance(vector, tuple) else (vector,) for vector in vectors]
    return [
        Condition(several, alpha, where, edit)
        for several, where, alpha in itertools.product(together, wheres, alphas)
    ]


def names(conditions: Sequence[Condition]) -> list[str]:
    """Returns a distinct name per condition, made of what differs; "steered" for a single one."""
    if len(conditions) == 1:
        return ["steered"]
    parts = []
    for condition in conditions:
        described = condition.describe()
        place = described.get("where", "")
        parts.append(
            {
                "edit": condition.edit,
                "sites": " + ".join(site.split(".")[-1] for site in described.get("sites", ())),
                "alpha": f"x {condition.alpha:g}",
                "where": f"from {place['from']}" if isinstance(place, dict) else str(place),
            }
        )
    telling = [key for key in parts[0] if len({part[key] for part in parts}) > 1]
    named = [" ".join(part[key] for key in telling) for part in parts]
    if len(set(named)) < len(named):  # vectors of the same site
        named = [f"{i} {name}".strip() for i, name in enumerate(named, start=1)]
    return named


def vector_numbers(
    conditions: Sequence[Condition], methods: Sequence[str] | None = None
) -> list[int]:
    """Returns which of the vectors at its sites each condition steers with, from 1.

    Conditions that differ in nothing but the strength, the positions or the kind of edit have the
    same number. The first vectors of each site are number 1, so that they can be compared.

    Args:
        conditions: the conditions.
        methods: the method of each, if vectors are numbered for each method.
    """
    known: dict[Any, list[Any]] = {}
    numbers = []
    for i, condition in enumerate(conditions):
        sites = tuple(vector.site for vector in condition.vectors)
        there = known.setdefault((None if methods is None else methods[i], sites), [])
        identity = tuple(map(id, condition.vectors))
        if identity not in there:
            there.append(identity)
        numbers.append(1 + there.index(identity))
    return numbers


def with_vector_numbers(sweep: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a described sweep whose trials say which vector they steered with.

    Earlier releases did not write it. A grid tries one vector after the other, so the second trial
    that is like an earlier one in all but its figures is of the second vector at these sites.

    Args:
        sweep: what `describe_sweep` returned in this release or an earlier one.

    Returns:
        The same with "vector", a number from 1, in every trial and in the chosen one, which is the
        first with its figures.
    """
    if all("vector" in trial for trial in (*sweep["trials"], sweep["chosen"])):
        return dict(sweep)
    known: collections.Counter[str] = collections.Counter()
    trials = []
    for trial in sweep["trials"]:
        names = ("method", "sites", "edit", "alpha", "where", "instruction")
        alike = json.dumps([trial.get(name) for name in names])
        known[alike] += 1
        trials.append({**trial, "vector": known[alike]})
    told = dict(sweep["chosen"])
    number = next((t["vector"] for t in trials if told.items() <= t.items()), 1)
    return {**sweep, "trials": trials, "chosen": {**told, "vector": number}}


def finite(value: float) -> float | None:
    """Returns a number; None for NaN and infinities, which JSON does not have."""
    return value if math.isfinite(value) else None


def choose(trials: Sequence[Trial], wanted: float, max_cost: float) -> Trial:
    """Chooses the trial with the wanted effect at the lowest cost.

    Among trials whose effect is at least `wanted` and whose cost is at most `max_cost`, takes the
    lowest cost, then the largest effect, then the weakest strength. If there are none, takes the
    largest effect within `max_cost`, then the lowest cost; if there are none either, the lowest
    cost of all.

    Args:
        trials: the trials to choose from.
        wanted: the wanted effect.
        max_cost: the maximum cost.

    Returns:
        The chosen trial.

    Raises:
        ValueError: there are no trials with a finite effect and cost.
    """
    usable = [t for t in trials if math.isfinite(t.effect) and math.isfinite(t.cost)]
    if not usable:
        raise ValueError(
            f"none of {len(trials)} trials has an effect to choose by, because the split has no "
            "answer to steer from; use a larger one"
        )
    within = [t for t in usable if t.cost <= max_cost]
    good = [t for t in within if t.effect >= wanted]
    if within and not good:
        return min(within, key=lambda t: (-t.effect, t.cost, abs(t.condition.alpha)))
    return min(good or usable, key=lambda t: (t.cost, -t.effect, abs(t.condition.alpha)))
