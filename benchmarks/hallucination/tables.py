"""Tables and the figure of the trade-off."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xlvlm_jax.evaluation import Sweep
from xlvlm_jax.evaluation.method_sweep import pareto_front
from xlvlm_jax.report.figure import COLOURS, figure

SHOWN = 4.0  # points of cost that the figure shows
AXES = "accuracy on the rest that is lost, points", "false yes that are gone, %"


def draw(sweep: Sweep, path: Path) -> None:
    """Draws each method's Pareto front on the validation split, the largest effect first.

    The dashed line marks the budget; rings mark what was chosen of each method within it.
    """
    fronts: dict[str, np.ndarray] = {}
    for method in dict.fromkeys(sweep.methods):
        own = np.array(
            [
                (trial.cost, 100 * trial.effect)
                for name, trial in zip(sweep.methods, sweep.trials, strict=True)
                if name == method and np.isfinite(trial.effect)
            ]
        )
        front = own[pareto_front(own[:, 1], own[:, 0])]
        fronts[method] = np.unique(front, axis=0)
    chosen = {name: sweep.chosen(name) for name in fronts}
    order = sorted(fronts, key=lambda name: -_effect(chosen[name], sweep.budget))
    with figure(path, width=7.2, height=4.4) as (_, [[axes]]):
        for number, name in enumerate(order):
            colour = COLOURS[number % len(COLOURS)]
            style = ("-", "--", ":", "-.")[number // len(COLOURS) % 4]
            x, y = fronts[name].T
            x = np.append(np.maximum(x, 0), SHOWN + 1)  # a gain counts as no cost
            axes.step(x, np.append(y, y[-1]), where="post", color=colour, ls=style, label=name)
            if chosen[name].cost <= sweep.budget:
                place = max(chosen[name].cost, 0), 100 * chosen[name].effect
                axes.plot(*place, "o", ms=6, mfc="none", color=colour)
        axes.axvline(sweep.budget, color="black", lw=0.8, ls="--")
        low = min(0.0, *(100 * trial.effect for trial in chosen.values()))
        axes.set(xlabel=AXES[0], ylabel=AXES[1], xlim=(-0.1, SHOWN), ylim=(low - 3, 103))
        axes.legend(title="method", fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))


def _effect(trial: Any, budget: float) -> float:
    return trial.effect if trial.cost <= budget else -1.0


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table in Markdown; the best of all in bold."""
    lines = [
        "| method | strength | val: false yes gone, points lost | test: false yes | gone | "
        "points lost on the rest | p, plain | p, instruction |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        tested = [""] * 5
        if "of" in row:
            tested = [
                f"{row['false yes']} of {row['of']}",
                _range(row, "gone", 100),
                _range(row, "lost", 1),
                f"{row['p against plain']:.2g}",
                f"{row['p against instruction']:.2g}",
            ]
        lines.append(f"| {' | '.join([_name(row), _choice(row), _val(row), *tested])} |")
    return "\n".join(lines) + "\n"


def _name(row: Mapping[str, Any]) -> str:
    return f"**{row['method']}**" if row.get("best of all") else str(row["method"])


def _choice(row: Mapping[str, Any]) -> str:
    if row["method"] == "plain":
        return ""
    if row["strength"] is None:
        return f"'{row['setting']}'"
    return f"{row['strength']:g}"


def _val(row: Mapping[str, Any]) -> str:
    if row["method"] == "plain":
        return ""
    over = "" if row["within budget"] else " (over)"
    return f"{100 * row['val gone']:.0f} %, {row['val cost']:.2f}{over}"


def _range(row: Mapping[str, Any], name: str, scale: float) -> str:
    if row["method"] == "plain":
        return ""
    low, high = (scale * end if scale == 100 else end for end in row[f"{name} interval"])
    value = scale * row[name]
    unit = " %" if scale == 100 else ""
    digits = 0 if scale == 100 else 2
    return f"{value:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"
