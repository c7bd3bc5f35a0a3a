"""Plots scores of dictionaries: one panel per score, one line per method."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import NullLocator, ScalarFormatter

from xlvlm_jax.concepts.scores.records import DictionaryScores
from xlvlm_jax.report.figure import figure
from xlvlm_jax.report.scores_section import Figure

_PANELS: tuple[tuple[str, Figure], ...] = (
    ("CLIPScore", lambda row: row.clip[min(row.clip)].mean if row.clip else None),
    ("BERTScore", lambda row: row.bert[min(row.bert)].mean if row.bert else None),
    ("Word overlap (lower is better)", lambda row: row.overlap),
    ("Variance explained", lambda row: row.explained_variance),
    ("Stability over seeds", lambda row: row.stability),
    ("Monosemanticity", lambda row: row.monosemanticity),
)


def plot(rows: Sequence[DictionaryScores], path: str | os.PathLike[str]) -> None:
    """Plots each score against the number of concepts, one line per method.

    CLIPScore and BERTScore are drawn at the smallest number of top concepts they were computed for.

    Args:
        rows: scored dictionaries; a score that none of them has gets no panel.
        path: the file to write (.svg, .png or .pdf).

    Raises:
        ValueError: no dictionary has a score to plot, or the suffix of `path` is another.
    """
    panels = [
        (title, value) for title, value in _PANELS if any(value(row) is not None for row in rows)
    ]
    if not panels:
        raise ValueError(f"none of {len(rows)} dictionaries has a score to plot; score them first")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    methods = list(dict.fromkeys(row.method for row in rows))
    counts = sorted({row.num_concepts for row in rows})
    with figure(path, lines, columns, width=3.1 * columns, height=2.5 * lines) as (drawn, grid):
        axes = list(np.ravel(grid))
        for axis, (title, value) in zip(axes, panels, strict=False):
            for number, method in enumerate(methods):
                points = sorted(
                    (row.num_concepts, found)
                    for row in rows
                    if row.method == method and (found := value(row)) is not None
                )
                # A method without this score keeps its colour and its place in the legend.
                axis.plot(*np.reshape(points, (-1, 2)).T, "o-", color=f"C{number}", label=method)
            axis.set_title(title)
            axis.set_xscale("log")
            axis.set_xticks(counts)
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_xlabel("concepts")
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def draw_all(rows: Sequence[DictionaryScores], directory: str | os.PathLike[str]) -> None:
    """Draws scores.svg if the scores cover several numbers of concepts; otherwise removes it.

    Args:
        rows: scored dictionaries.
        directory: where scores.svg is written; created if missing.
    """
    image = Path(directory) / "scores.svg"
    if len({row.num_concepts for row in rows}) > 1:
        image.parent.mkdir(parents=True, exist_ok=True)
        plot(rows, image)
    else:
        image.unlink(missing_ok=True)  # left by earlier scores
