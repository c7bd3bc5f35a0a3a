"""The summary that the demo prints at the end."""

import numpy as np
from rich.console import Console
from rich.table import Table

from xlvlm_jax.demo.pipeline import FINAL, Result
from xlvlm_jax.demo.steering_part import describe


def show(result: Result, console: Console) -> None:
    """Prints the main results of the run."""
    final = result.concepts[FINAL]
    assigned, words = np.asarray(final.activations).argmax(1), final.words or ()
    table = Table("concept", "share", "words", title="Concepts at the final norm", box=None)
    for k in sorted(range(len(final.components)), key=lambda k: -(assigned == k).sum()):
        share = f"{100 * (assigned == k).mean():.0f} %"
        table.add_row(str(k), share, ", ".join(words[k]))
    console.print(table)

    table = Table(
        "site",
        "attribute",
        "train",
        "test",
        "random",
        title="Attributes and the most activated concept (normalised mutual information)",
        box=None,
    )
    for site, splits in result.scores.items():
        for name, score in splits["train"].items():
            test = splits["test"].get(name)
            shown = "" if test is None else f"{test.nmi:.2f}"
            random = f"{score.random_mean:.2f}"
            table.add_row(site, name, f"{score.nmi:.2f}", shown, random)
    console.print(table)
    table = Table(
        "method",
        "concepts",
        "CLIPScore",
        "word overlap",
        "stability",
        title="Comparison of methods on the test split",
        box=None,
    )
    for row in result.dictionaries:
        clip_score = f"{row.clip[1].mean:.2f}" if row.clip else ""
        figures = (row.overlap, row.stability)
        shown = ("" if value is None else f"{value:.2f}" for value in figures)
        table.add_row(row.method, str(row.num_concepts), clip_score, *shown)
    console.print(table)

    overlap = {kind: 100 * result.shift.mean_overlap(kind) for kind in ("original", "shifted")}
    related = result.shift.correlations["consistency-recovery"]
    console.print(
        f"Fine-tuned to name colours: concepts share {overlap['original']:.0f} % of their words "
        f"with the fine-tuned concepts before the shift, {overlap['shifted']:.0f} % after it; "
        f"consistency and recovery correlate at r = {related.r:.2f}"
    )
    steered = describe(result.steering)
    falls = (
        f"{kind} {100 * before:.0f} -> {100 * after:.0f} %"
        for kind, (before, after) in steered["accuracy"].items()
    )
    console.print(
        f"Steered from yes to no at {steered['site']}, alpha {steered['alpha']:g}: "
        f"{100 * steered['moved']:.0f} % of the yes answers moved; accuracy {', '.join(falls)}"
    )
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items())
    console.print(
        f"{result.rows['train']} training rows, {result.rows['test']} test rows; "
        f"{spent}; {sum(result.seconds.values()):.0f} s in total"
    )
    console.print(f"Open {result.report} in a browser.", style="bold")
