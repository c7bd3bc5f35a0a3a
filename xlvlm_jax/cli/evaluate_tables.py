"""The tables of `xlvlm evaluate` and `xlvlm steer apply`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def show(summary: Mapping[str, Any], console: Console) -> None:
    """Prints the scores and changes under each condition, and what a sweep chose."""
    if "sweep" in summary:
        _show_chosen(summary["sweep"], summary["kind"], console)
    if summary["kind"] == "vqa":
        _show_questions(summary["conditions"], summary["protocol"], console)
    else:
        _show_captions(summary["conditions"], console)


def _show_questions(conditions: Mapping[str, Any], protocol: str, console: Console) -> None:
    from xlvlm_jax.metrics.vqa import PROTOCOLS

    kinds = conditions["plain"]["scores"]
    first, *others = sorted(PROTOCOLS, key=lambda each: each != protocol)
    table = Table(f"accuracy %, {first} ({'; '.join(others)})", *kinds, box=None)
    for name, measured in conditions.items():
        table.add_row(name, *(_accuracies(s, first, others) for s in measured["scores"].values()))
    table.add_row("questions", *(str(score["count"]) for score in kinds.values()))
    console.print(table)
    if "POPE" in conditions["plain"]:
        _show_protocols("POPE", conditions, console)
    if "changes" not in conditions["plain"]:
        return
    table = Table(
        "answers", "changed", "source", "target", "source to target", "others changed", box=None
    )
    for name, measured in conditions.items():
        c = measured["changes"]
        table.add_row(
            name,
            f"{c['changed']} of {c['samples']}",
            _change(c["source_before"], c["source_after"]),
            _change(c["target_before"], c["target_after"]),
            _share(c["moved"], c["source_before"]),
            _share(c["others_changed"], c["others"]),
        )
    console.print(table)


def _show_protocols(metric: str, conditions: Mapping[str, Any], console: Console) -> None:
    """Prints a line per condition and protocol; a protocol may lack some of the figures."""
    figures = list(conditions["plain"][metric]["official"])
    table = Table(f"{metric} %", *figures, box=None)
    for name, measured in conditions.items():
        for protocol, values in measured[metric].items():
            shown = (_percent(values[figure]) if figure in values else "" for figure in figures)
            table.add_row(f"{name}, {protocol}", *shown)
    console.print(table)


def _percent(share: float | None) -> str:
    return "undefined" if share is None else f"{100 * share:.2f}"


def _show_captions(conditions: Mapping[str, Any], console: Console) -> None:
    metrics = [name for name in conditions["plain"]["scores"] if name != "left out"]
    changed = "changes" in conditions["plain"]
    words = ["with class words", "words per caption"] if changed else []
    table = Table("captions", *metrics, *words, box=None)
    for name, measured in conditions.items():
        row = [f"{measured['scores'][metric]:.3f}" for metric in metrics]
        if changed:
            c = measured["changes"]
            row += [_share(c["holding_after"], c["samples"]), f"{c['length_after']:.1f}"]
        table.add_row(name, *row)
    console.print(table)
    if "CHAIR" in conditions["plain"]:
        _show_protocols("CHAIR", conditions, console)
    if left_out := conditions["plain"]["scores"]["left out"]:
        reasons = "; ".join(f"{name}, {reason}" for name, reason in left_out.items())
        console.print(f"left out: {reasons}", style="dim")


def _show_chosen(sweep: Mapping[str, Any], kind: str, console: Console) -> None:
    chosen = sweep["chosen"]
    effect = "moved" if kind == "vqa" else "gained"
    cost = f"{chosen['cost']:.1f} points" if kind == "vqa" else f"{100 * chosen['cost']:.0f} %"
    console.print(
        f"best of {len(sweep['trials'])} trials on {sweep.get('split', 'another split')}: "
        f"{', '.join(chosen['sites'])}, alpha {chosen['alpha']:g}, where {chosen['where']}: "
        f"{100 * chosen['effect']:.1f} % {effect} at a cost of {cost}"
    )
    if chosen["effect"] < sweep["wanted"] or chosen["cost"] > sweep["max_cost"]:
        console.print(
            f"no trial reached the wanted effect ({100 * sweep['wanted']:.0f} %) within the "
            f"maximum cost ({sweep['max_cost']:g}); see sweep.svg",
            style="yellow",
        )


def _accuracies(score: Mapping[str, float], first: str, others: Sequence[str]) -> str:
    figures = (f"{100 * score[name.replace('-', '_')]:.2f}" for name in (first, *others))
    return f"{next(figures)} ({'; '.join(figures)})"


def _change(before: int, after: int) -> str:
    return f"{before} -> {after} ({after - before:+d})"


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.1f} %)" if whole else "0 of 0"


def show_needs(needs: Any, console: Console) -> None:
    """Prints what answering the samples under all conditions will need."""
    missing = f", {len(needs.missing)} images missing" if needs.missing else ""
    console.print(
        f"samples: {needs.samples}{missing}; {needs.answers} answers, "
        f"{needs.conditions_at_once} conditions per batch at once"
    )
    console.print(
        f"memory per device: parameters {needs.parameters / 1e9:,.3f} GB, everything else "
        f"{needs.temporaries / 1e9:,.3f} GB for a batch under one condition, with prompts of "
        f"{needs.prompt_tokens} tokens"
    )
