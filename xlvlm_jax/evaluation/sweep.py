"""Which site and strength: every combination tried on one split, and the best of them chosen."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from xlvlm_jax.evaluation.predict import Condition, Steering


class Trial(NamedTuple):
    """What one condition did; effect and cost as its task defines them."""

    condition: Condition
    effect: float  # questions: share of source answers moved; captions: gain of the class's share
    cost: float  # largest fall of another answer type, in points; captions: relative fall of CIDEr
    off_target: float  # share of the other answers that changed; of captions: of all

    def describe(self) -> dict[str, Any]:
        """As JSON values; None for a number that is not known, as when nothing was to be moved."""
        values = {name: getattr(self, name) for name in ("effect", "cost", "off_target")}
        known = {name: x if math.isfinite(x) else None for name, x in values.items()}
        return {**self.condition.describe(), **known}


def grid(
    vectors: Sequence[Steering | tuple[Steering, ...]],
    alphas: Sequence[float],
    wheres: Sequence[Any] = (None,),
    edit: str = "add",
) -> list[Condition]:
    """Each vector (or several at once) with each strength at each choice of positions."""
    together = [vector if isinstance(vector, tuple) else (vector,) for vector in vectors]
    return [
        Condition(several, alpha, where, edit)
        for several, where, alpha in itertools.product(together, wheres, alphas)
    ]


def names(conditions: Sequence[Condition]) -> list[str]:
    """A name for each condition, by what tells them apart; "steered" for one alone."""
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


def choose(trials: Sequence[Trial], wanted: float, max_cost: float) -> Trial:
    """The trial that does what is wanted at the least cost.

    Of those whose effect is at least `wanted` and whose cost at most `max_cost`, the one of the
    least cost; if there is none, the largest effect within that cost; if there is none either,
    the least cost. Among equals, the weakest strength.

    Raises ValueError for no trials, or none whose effect and cost are numbers.
    """
    usable = [t for t in trials if math.isfinite(t.effect) and math.isfinite(t.cost)]
    if not usable:
        raise ValueError(
            f"none of {len(trials)} trials has an effect to choose by; the split holds no answer "
            "to steer from, take a larger one"
        )
    within = [t for t in usable if t.cost <= max_cost]
    good = [t for t in within if t.effect >= wanted]
    if within and not good:
        return min(within, key=lambda t: (-t.effect, t.cost, abs(t.condition.alpha)))
    return min(good or usable, key=lambda t: (t.cost, -t.effect, abs(t.condition.alpha)))
