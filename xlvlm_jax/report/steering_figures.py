"""Figures of steering: answers before and after, and the effect and cost of every trial.

Each takes the summary that `evaluation.evaluate` writes.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from xlvlm_jax.evaluation.hallucination_tasks import quantities_of
from xlvlm_jax.evaluation.method_sweep import pareto_front
from xlvlm_jax.evaluation.sweep import OFF_TARGET, Quantity, with_vector_numbers
from xlvlm_jax.metrics.vqa import normalise_answer
from xlvlm_jax.report.figure import COLOURS, FAINT, figure

FIGURES = {
    "answers.svg": "Answers before and after steering",
    "sweep.svg": "Effect and cost of steering by strength and layer",
    "tradeoff.svg": "Effect and side effect of every trial, by method",
}
NUM_BARS = 12


def draw_all(summary: Mapping[str, Any], directory: str | Path) -> list[Path]:
    """Draws the figures that `summary` has numbers for.

    Args:
        summary: what `evaluation.evaluate` writes.
        directory: where the figures are written; those without numbers are removed from it.

    Returns:
        The paths of the figures drawn.
    """
    directory, drawn = Path(directory), []
    for name, draw, wanted in (
        ("answers.svg", plot_answers, len(summary["conditions"]) > 1),
        ("sweep.svg", plot_sweep, "sweep" in summary),
        ("tradeoff.svg", plot_tradeoff, "axis" in summary.get("sweep", {})),
    ):
        path = directory / name
        if wanted:
            draw(summary, path)
            drawn.append(path)
        else:
            path.unlink(missing_ok=True)  # left by an earlier evaluation
    return drawn


def plot_answers(summary: Mapping[str, Any], path: str | Path) -> None:
    """Draws bars of how often each answer was given under each condition.

    For captions, class words are counted instead of answers. For questions, a second panel counts
    the types of answers, which shows how steering disturbs other questions.

    Args:
        summary: what `evaluation.evaluate` writes.
        path: the file to write (.svg, .png or .pdf).
    """
    conditions = summary["conditions"]
    questions = summary["kind"] == "vqa"
    kind = "answers" if questions else "class words" if summary["words"] else "words"
    highest: dict[str, int] = {}
    for measured in conditions.values():
        for word, count in measured[kind].items():
            highest[word] = max(count, highest.get(word, 0))
    asked = [normalise_answer(w) for name in ("source", "target") for w in summary.get(name, ())]
    shown = sorted(highest, key=lambda word: (word not in asked, -highest[word]))[:NUM_BARS]
    columns = 2 if questions else 1
    height = 1.2 + 0.09 * len(shown) * (len(conditions) + 0.5)
    with figure(path, 1, columns, width=4.4 * columns, height=height) as (_, [axes]):
        _bars(axes[0], {name: measured[kind] for name, measured in conditions.items()}, shown)
        axes[0].set_title("Answers" if questions else f"Captions: {kind}")
        axes[0].legend(loc="lower right")
        if questions:
            types = {name: measured["answer types"] for name, measured in conditions.items()}
            _bars(axes[1], types, list(types["plain"]))
            axes[1].set_title("Answer types")


def _bars(axes: Axes, counts: Mapping[str, Mapping[str, int]], labels: Sequence[str]) -> None:
    """Draws horizontal bars: a group per label, a bar per condition."""
    width = 0.8 / len(counts)
    colours = [FAINT, *COLOURS]
    for number, (name, counted) in enumerate(counts.items()):
        places = [i + width * (number - (len(counts) - 1) / 2) for i in range(len(labels))]
        values = [counted.get(label, 0) for label in labels]
        axes.barh(places, values, width, color=colours[number % len(colours)], label=name)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("count")


def plot_sweep(summary: Mapping[str, Any], path: str | Path) -> None:
    """Plots effect and cost against strength (a line per site) and site (a line per strength).

    If trials differ in method, vector, kind of edit or the positions they steer, only those like
    the chosen one are drawn. The dashed lines mark the wanted effect and the maximum cost, the ring
    marks the chosen trial. Of a sweep over methods, what its budget is of takes the place of the
    cost, and the dashed line marks the budget.

    Args:
        summary: what `evaluation.evaluate` writes, with a sweep.
        path: the file to write (.svg, .png or .pdf).
    """
    sweep = with_vector_numbers(summary["sweep"])
    chosen = sweep["chosen"]
    alike = ("where", "method", "edit", "vector")
    trials = [
        trial
        for trial in sweep["trials"]
        if all(trial.get(name) == chosen.get(name) for name in alike)
    ]
    sites = list(dict.fromkeys(", ".join(trial["sites"]) for trial in trials))
    alphas = sorted({trial["alpha"] for trial in trials})
    by = {(", ".join(trial["sites"]), trial["alpha"]): trial for trial in trials}
    labels = short_names(sites)
    told = {**quantities_of(summary), "off_target": OFF_TARGET}
    limits = {"effect": sweep.get("wanted"), "cost": sweep.get("max_cost")}
    if "axis" in sweep:  # chosen by the budget alone
        limits = {"effect": None, sweep["axis"]: sweep["budget"]}

    def value(site: str, alpha: float, name: str) -> float:
        found = by.get((site, alpha), {}).get(name)
        return math.nan if found is None else found

    with figure(path, 2, 2, width=8.6, height=5.6) as (_, grid):
        for (left, right), (name, limit) in zip(grid, limits.items(), strict=True):
            quantity = told[name]
            title, scale = f"{quantity.name}, {quantity.unit}", quantity.scale
            for site, label in zip(sites, labels, strict=True):
                values = [scale * value(site, alpha, name) for alpha in alphas]
                left.plot(alphas, values, marker="o", ms=3, label=label)
            for alpha in alphas:
                values = [scale * value(site, alpha, name) for site in sites]
                right.plot(range(len(sites)), values, marker="o", ms=3, label=f"{alpha:g}")
            place = sites.index(", ".join(chosen["sites"]))
            for axes, x in ((left, chosen["alpha"]), (right, place)):
                if chosen[name] is not None:
                    axes.plot(x, scale * chosen[name], "o", ms=10, mfc="none", color="black")
                if limit is not None:
                    axes.axhline(scale * limit, color="black", lw=0.8, ls="--")
            left.set(xlabel="strength alpha", ylabel=title)
            right.set_xticks(range(len(sites)), labels)
            right.set_xlabel("site")
        grid[0][0].legend(title="site", fontsize="small")
        grid[0][1].legend(title="alpha", fontsize="small")


def plot_tradeoff(summary: Mapping[str, Any], path: str | Path) -> None:
    """Plots the effect of every trial against its side effect, with each method's Pareto front.

    The dashed line marks the budget, the ring marks the chosen trial.

    Args:
        summary: its "sweep" is what `evaluation.Sweep.describe` returns.
        path: the file to write (.svg, .png or .pdf).
    """
    sweep = summary["sweep"]
    axis, chosen = sweep["axis"], sweep["chosen"]
    usable = [t for t in sweep["trials"] if None not in (t["effect"], t[axis])]
    with figure(path, width=5.2, height=3.6) as (_, [[axes]]):
        for number, method in enumerate(dict.fromkeys(trial["method"] for trial in usable)):
            own = [trial for trial in usable if trial["method"] == method]
            x, y = (np.array([trial[name] for trial in own]) for name in (axis, "effect"))
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(x, y, "o", ms=3, color=colour, alpha=0.4)
            on_front = np.flatnonzero(pareto_front(y, x))
            order = on_front[np.argsort(x[on_front], kind="stable")]
            axes.plot(
                x[order],
                y[order],
                drawstyle="steps-post",
                marker="o",
                ms=3,
                color=colour,
                ls=("-", "--", ":")[number // len(COLOURS) % 3],
                label=method,
            )
        axes.plot(chosen[axis], chosen["effect"], "o", ms=10, mfc="none", color="black")
        if sweep["budget"] is not None:
            axes.axvline(sweep["budget"], color="black", lw=0.8, ls="--")
        told = quantities_of(summary)
        x = "share of other answers that changed"
        if axis == "cost":
            x = _share_or_unit(told["cost"])
        axes.set(xlabel=x, ylabel=_share_or_unit(told["effect"]))
        axes.legend(title="method", fontsize="small")


def _share_or_unit(quantity: Quantity) -> str:
    """Returns the label of a quantity that is drawn without its scale."""
    return f"{quantity.name}, {'share' if quantity.scale != 1 else quantity.unit}"


def short_names(sites: Sequence[str]) -> list[str]:
    """Returns the sites without their common prefix: "layers.3", "layers.4" -> "3", "4"."""
    if len(sites) < 2:
        return [site.split(".")[-1] for site in sites]
    parts = [site.split(".") for site in sites]
    common = 0
    while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    return [".".join(p[common:]) for p in parts]
