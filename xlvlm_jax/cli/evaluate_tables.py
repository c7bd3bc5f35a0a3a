"""The tables of `xlvlm evaluate` and `xlvlm steer apply`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def show(summary: Mapping[str, Any], console: Console) -> None:
    """Prints the scores and changes under each condition, and what a sweep chose."""
    if "sweep" in summary:
        _show_chosen(summary, console)
    if summary["kind"] == "vqa":
        _show_questions(summary["conditions"], summary["protocol"], console)
    else:
        _show_captions(summary["conditions"], console)
    if "paired" in summary:
        _show_paired(summary["paired"], console)


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
    if "AMBER" in conditions["plain"]:
        _show_protocols("AMBER", conditions, console)
    if "false yes" in conditions["plain"]:
        _show_presence(conditions, console)
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
    """Prints a line per condition, kind of negatives and protocol, and where protocols differ.

    A protocol may lack some of the figures. Scores of all samples come with their intervals.
    """
    figures = list(next(iter(conditions["plain"][metric].values())))
    table = Table(f"{metric} %", *figures, box=None)
    for name, measured in conditions.items():
        intervals = measured.get(f"{metric} intervals", {})
        for protocol, values in measured[metric].items():
            shown = (_figure(figure, values) for figure in figures)
            table.add_row(f"{name}, {protocol}", *shown)
            if any(map(_interval, (known := intervals.get(protocol, {})).values())):
                table.add_row("95 %", *(_interval(known.get(figure)) for figure in figures))
        for kind, scores in measured.get(f"{metric} by negatives", {}).items():
            for protocol, values in scores.items():
                shown = (_figure(figure, values) for figure in figures)
                table.add_row(f"{name}, {protocol}, {kind}", *shown)
    console.print(table)
    if metric == "AMBER":  # told below the table of POPE, whose official protocol it is of
        return
    for name, measured in conditions.items():
        if (differ := measured.get("read differently")) and differ["count"]:
            examples = "; ".join(repr(text) for text in differ["examples"][:3])
            console.print(
                f"{name}: the protocols read {differ['count']} answers differently, such as "
                f"{examples}",
                style="dim",
            )


def _show_presence(conditions: Mapping[str, Any], console: Console) -> None:
    """Prints how often what is not there was seen, and how right the other answers are."""
    table = Table("hallucination", "false yes", "accuracy on the rest %", box=None)
    for name, measured in conditions.items():
        rest = measured["rest"]
        table.add_row(
            name,
            _share(measured["false yes"]["count"], measured["false yes"]["of"]),
            f"{_percent(rest['accuracy'])} ({_interval(rest['interval']) or 'one picture'}) of "
            f"{rest['count']}",
        )
    console.print(table)


def _show_paired(tests: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints the paired tests of conditions."""
    table = Table("McNemar", "right answers of", "lost", "gained", "p", box=None)
    for test in tests:
        table.add_row(
            f"{test['first']} -> {test['second']}",
            test["what"],
            str(test["lost"]),
            str(test["gained"]),
            f"{test['p_value']:.3g}",
        )
    console.print(table)


def _figure(name: str, values: Mapping[str, float | None]) -> str:
    """Returns a score in percent, a length as it is, nothing for what is not among the values."""
    if name not in values:
        return ""
    value = values[name]
    return f"{value:.1f}" if name == "length" else _percent(value)


def _interval(ends: Sequence[float | None] | None) -> str:
    return "" if ends is None or None in ends else "-".join(f"{100 * (e or 0):.1f}" for e in ends)


def _percent(share: float | None) -> str:
    return "undefined" if share is None else f"{100 * share:.2f}"


def _show_captions(conditions: Mapping[str, Any], console: Console) -> None:
    # A condition may lack one, whose Java program failed.
    scores = [each["scores"] for each in conditions.values()]
    metrics = list(dict.fromkeys(name for each in scores for name in each if name != "left out"))
    changed = "changes" in conditions["plain"]
    words = ["with class words", "words per caption"] if changed else []
    deference = ["ED-score"] if conditions["plain"].get("ED-score") is not None else []
    table = Table("captions", *metrics, *deference, *words, box=None)
    for name, measured in conditions.items():
        row = [_score(measured["scores"].get(metric)) for metric in metrics]
        row += [_score(measured[each]) for each in deference]
        if changed:
            c = measured["changes"]
            row += [_share(c["holding_after"], c["samples"]), f"{c['length_after']:.1f}"]
        table.add_row(name, *row)
    console.print(table)
    for metric in ("CHAIR", "AMBER"):
        if metric in conditions["plain"]:
            _show_protocols(metric, conditions, console)
    usual = conditions["plain"]["scores"].get("left out", {})
    for name, measured in conditions.items():
        reasons = measured["scores"].get("left out", {})
        told = [
            f"{metric}, {reason}"
            for metric, reason in reasons.items()
            if name == "plain" or usual.get(metric) != reason
        ]
        if told:
            of = "" if name == "plain" else f"{name}, "
            console.print(f"{of}left out: {'; '.join(told)}", style="dim")


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _show_chosen(summary: Mapping[str, Any], console: Console) -> None:
    from xlvlm_jax.evaluation.hallucination_tasks import quantities_of
    from xlvlm_jax.evaluation.sweep import OFF_TARGET

    sweep = summary["sweep"]
    chosen, trials = sweep["chosen"], sweep["trials"]
    quantities = {**quantities_of(summary), "off_target": OFF_TARGET}

    def shown(name: str, limit: str | None = None) -> str:
        return quantities[name].shown(sweep[limit] if limit else chosen[name])

    by_budget = "axis" in sweep  # a sweep over methods knows no wanted effect
    against = sweep["axis"] if by_budget else "cost"
    several = len({trial.get("vector") for trial in trials}) > 1
    vector = f", vector {chosen['vector']}" if several else ""
    figures = (f"{quantities[name].name} {shown(name)}" for name in ("effect", against))
    console.print(
        f"best of {len(trials)} trials on {sweep.get('split', 'another split')}: "
        f"{', '.join(chosen['sites'])}{vector}, alpha {chosen['alpha']:g}, where "
        f"{chosen['where']}: {', '.join(figures)}"
    )
    missed = None
    if by_budget:
        if _exceeds(chosen[against], sweep["budget"]):
            limit = f"{quantities[against].name}: {shown(against, 'budget')}"
            missed = f"no trial is within the budget ({limit}); see tradeoff.svg"
    elif _exceeds(sweep["wanted"], chosen["effect"]) or _exceeds(chosen["cost"], sweep["max_cost"]):
        missed = f"no trial reached the wanted effect ({shown('effect', 'wanted')})"
        if sweep["max_cost"] is not None:
            missed += f" within the maximum cost ({shown('cost', 'max_cost')})"
        missed += "; see sweep.svg"
    if missed is not None:
        console.print(missed, style="yellow")


def _exceeds(value: float | None, limit: float | None) -> bool:
    """Returns whether a value is more than a limit, if both are known."""
    return value is not None and limit is not None and value > limit


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
