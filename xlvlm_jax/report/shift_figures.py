"""Figures of a shift as in the paper: T-Overlap, recovery, and words and pictures of concepts.

From "Analyzing Fine-tuning Representation Shift for Multimodal LLMs Steering" (ICCV 2025).
`plot_overlap` and `plot_recovery` take one or several fine-tuned models, {name: analysis}.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten, wrap

import numpy as np

from xlvlm_jax.report.figure import COLOURS, FAINT, figure
from xlvlm_jax.report.sample_figure import picture_strip
from xlvlm_jax.shift import Correlation, ShiftAnalysis, correlation

Path_ = str | os.PathLike[str]
AXES = {
    "consistency": "Consistency of the shift (mean pairwise cosine)",
    "magnitude": "Magnitude of the shift",
    "recovery": "Concept recovery (cosine)",
}
MARKERS = "o^sDvP"
PANEL_TITLES = {"original": "original", "shifted": "shifted", "finetuned": "fine-tuned"}


def draw_all(analysis: ShiftAnalysis, directory: Path, name: str = "fine-tuned") -> list[Path]:
    """Draws the figures of one shift.

    Args:
        analysis: a grounded shift.
        directory: where the figures are written.
        name: what the figures call the fine-tuned model.

    Returns:
        The paths of the figures.

    Raises:
        ValueError: the shift is not grounded.
    """
    drawn = {
        "overlap.svg": lambda path: plot_overlap({name: analysis}, path),
        "recovery.svg": lambda path: plot_recovery({name: analysis}, path),
        "panels.png": lambda path: plot_panels(analysis, path),
    }
    for file, draw in drawn.items():
        draw(directory / file)
    return [directory / file for file in drawn]


def draw_beside(analyses: Mapping[str, ShiftAnalysis], directory: Path) -> list[Path]:
    """Draws overlap and recovery of several shifts in the same figures.

    Args:
        analyses: {name: grounded shift}.
        directory: where the figures are written.

    Returns:
        The paths of the figures.
    """
    paths = [directory / f"{name}-beside.svg" for name in ("overlap", "recovery")]
    plot_overlap(analyses, paths[0])
    plot_recovery(analyses, paths[1])
    return paths


def plot_overlap(analyses: Mapping[str, ShiftAnalysis], path: Path_) -> None:
    """Draws bars of the T-Overlap of original and shifted concepts with their fine-tuned match.

    A concept without a shift has no second bar. The dashed line is the overlap of original
    concepts with fine-tuned concepts that are not their match.

    Args:
        analyses: {name: grounded shift}, a panel each.
        path: the file to write (.svg, .png or .pdf).
    """
    count = len(analyses)
    widest = max(len(analysis.counts) for analysis in analyses.values())
    size = {"width": max(5.0, 0.34 * widest + 1.5), "height": 2.2 * count + 0.6}
    with figure(path, count, 1, **size) as (_, grid):
        for axis, (name, analysis) in zip(grid.flat, analyses.items(), strict=True):
            places = np.arange(len(analysis.counts))
            for number, kind in enumerate(("original", "shifted")):
                shares = 100 * analysis.overlap(kind)
                mean = 100 * analysis.mean_overlap(kind)
                axis.bar(
                    places + 0.4 * (number - 0.5),
                    np.nan_to_num(shares),
                    0.4,
                    color=(FAINT, COLOURS[0])[number],
                    label=f"{kind} concepts, mean {mean:.0f} %",
                )
            chance = 100 * analysis.chance()["mismatched"]
            if np.isfinite(chance):
                axis.axhline(chance, color="black", lw=0.8, ls="--", label="unmatched")
            axis.set_title(name)
            axis.set_xticks(places)
            axis.set_xlim(-0.7, len(places) - 0.3)
            axis.set_ylim(0, 100)
            axis.set_ylabel("T-Overlap (%)")
            axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
        grid[-1, 0].set_xlabel("Concept")


def plot_recovery(analyses: Mapping[str, ShiftAnalysis], path: Path_) -> None:
    """Plots each concept's recovery against the consistency and magnitude of its shift.

    Args:
        analyses: {name: shift}, a colour each.
        path: the file to write (.svg, .png or .pdf).
    """
    with figure(path, 1, 2, width=8.4, height=3.6) as (_, [[left, right]]):
        for axis, name in ((left, "consistency"), (right, "magnitude")):
            for number, (label, analysis) in enumerate(analyses.items()):
                x, y = analysis.figure(name), analysis.figure("recovery")
                style = {"color": COLOURS[number % 6], "marker": MARKERS[number % 6]}
                r = correlation(x, y).r
                axis.scatter(x, y, s=26, label=f"{label} (r = {r:.2f})", **style)
                for k in np.flatnonzero(np.isfinite(x) & np.isfinite(y)):
                    axis.annotate(
                        str(k), (x[k], y[k]), (2, 2), textcoords="offset points", fontsize=6
                    )
            whole = pooled_correlation(analyses, name, "recovery")
            axis.set_title(f"r = {whole.r:.2f}, p = {whole.p_value:.2g}, {whole.count} concepts")
            axis.set_xlabel(AXES[name])
            axis.set_ylabel(AXES["recovery"])
            axis.legend(fontsize=8)


def pooled_correlation(analyses: Mapping[str, ShiftAnalysis], a: str, b: str) -> Correlation:
    """Returns the correlation of figures `a` and `b` over the concepts of all analyses."""
    pooled = [np.concatenate([each.figure(name) for each in analyses.values()]) for name in (a, b)]
    return correlation(*pooled)


def plot_panels(analysis: ShiftAnalysis, path: Path_, num_concepts: int = 8) -> None:
    """Draws the words and pictures of original, shifted and fine-tuned concepts side by side.

    A dot marks a word that the fine-tuned concept has too. A picture that can't be read stays grey.

    Args:
        analysis: a grounded shift.
        path: the file to write (.svg, .png or .pdf).
        num_concepts: how many concepts to draw, starting with the most samples.

    Raises:
        ValueError: the shift is not grounded.
    """
    if analysis.words is None or analysis.images is None:
        raise ValueError("the shift has neither words nor pictures to show; ground its concepts")
    order = np.argsort(-analysis.counts, kind="stable")[:num_concepts]
    rows = len(order)
    with figure(path, rows, 3, width=11, height=1.55 * rows + 0.3) as (_, grid):
        for row, k in zip(grid, order, strict=True):
            wanted = set(analysis.words["finetuned"][k])
            for axis, (kind, title) in zip(row, PANEL_TITLES.items(), strict=True):
                paths = [analysis.pictures.get(name) for name in analysis.images[kind][k]]
                axis.imshow(picture_strip(paths), interpolation="none")
                axis.set_axis_off()
                # The fine-tuned concept trivially has all its own words: no dots.
                marked = wanted if kind != "finetuned" else set()
                words = [f"·{word}" if word in marked else word for word in analysis.words[kind][k]]
                said = "\n".join(wrap(shorten(" ".join(words), 90, placeholder=" …"), 56))
                axis.set_title(f"{k} {title}\n{said or 'no shift'}", fontsize=8)
