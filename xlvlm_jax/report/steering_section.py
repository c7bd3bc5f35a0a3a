"""The page's section on steering: scores before and after, figures, and examples with pictures."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xlvlm_jax.evaluation.answer_effects import normalise_answer
from xlvlm_jax.metrics.captions import holding
from xlvlm_jax.report.plots import Plot, read_plot
from xlvlm_jax.report.steering_figures import FIGURES
from xlvlm_jax.storage import versions
from xlvlm_jax.storage.pictures import find_all

NUM_EXAMPLES = 6  # of intended changes, and as many of other changes


class Example(NamedTuple):
    """One sample before and after."""

    sample: str
    image: str | None  # file
    question: str | None
    truth: str  # the data set's answer, or its first caption
    before: str
    after: str


class SteeringSection(NamedTuple):
    """One evaluation with steering."""

    name: str
    title: str
    facts: list[str]
    caption: str  # of the table of scores
    columns: list[str]
    rows: list[tuple[str, list[str]]]  # condition, its scores
    plots: list[Plot]
    moved: list[Example]  # changed as intended
    others: list[Example]  # changed although they should not have


def read_steering(run: Path, images: str | os.PathLike[str] | None = None) -> list[SteeringSection]:
    """Reads the sections of all evaluations `steering/*/` in a run directory.

    Args:
        run: the run directory.
        images: directory that holds the pictures now, if they were moved.

    Returns:
        A section per evaluation, in order of directory name.

    Raises:
        ValueError: an evaluation is damaged.
    """
    found = sorted((run / "steering").glob("*/summary.json"))
    return [_section(path.parent, images) for path in found]


def shown_images(sections: Iterable[SteeringSection]) -> Iterator[str]:
    """Yields the image files that the sections show."""
    for section in sections:
        yield from (e.image for e in (*section.moved, *section.others) if e.image)


def _section(directory: Path, images: str | os.PathLike[str] | None) -> SteeringSection:
    try:
        summary = json.loads((directory / "summary.json").read_text("utf-8"))
        versions.require(directory / "summary.json", summary, "evaluate again")
        lines = (directory / "predictions.jsonl").read_text("utf-8").splitlines()
        samples = [json.loads(line) for line in lines]
        names = [sample.get("image") for sample in samples]
        paths = find_all(names, directory, summary.get("pictures"), images)
        samples = [s | {"image": path} for s, path in zip(samples, paths, strict=True)]
        protocol = summary.get("protocol", "official")  # earlier evaluations do not say
        questions = summary["kind"] == "vqa"
        if questions:
            columns, rows = _of_questions(summary["conditions"], protocol.replace("-", "_"))
        else:
            columns, rows = _of_captions(summary["conditions"])
        of_bench, figures = _of_bench(summary["conditions"])
        columns = [*columns, *of_bench]
        rows = [(name, [*shown, *figures[name]]) for name, shown in rows]
        moved, others = _examples(summary, samples)
        return SteeringSection(
            name=directory.name,
            title=_title(summary),
            facts=list(_facts(summary)),
            caption=f"VQA accuracy in percent, {protocol} protocol" if questions else "Scores",
            columns=columns,
            rows=rows,
            plots=[
                read_plot(directory / name, explained)
                for name, explained in FIGURES.items()
                if (directory / name).is_file()
            ],
            moved=moved,
            others=others,
        )
    except versions.UnknownVersionError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, FileNotFoundError) as error:
        raise ValueError(
            f"{directory}: cannot read the evaluation ({type(error).__name__}: {error}); "
            "evaluate again or remove it"
        ) from None


def _title(summary: Mapping[str, Any]) -> str:
    if summary["kind"] == "captions":
        words = summary["words"]
        if not words:
            return "Captions"
        return f"Captions towards {', '.join(words[:4])}{' …' if len(words) > 4 else ''}"
    source, target = (", ".join(summary[name]) for name in ("source", "target"))
    return f"Answers from “{source}” to “{target}”" if source else "Answers"


def _facts(summary: Mapping[str, Any]) -> Iterator[str]:
    yield f"{summary['samples']:,} samples".replace(",", "\N{NARROW NO-BREAK SPACE}")
    for name, measured in summary["conditions"].items():
        if "sites" in measured:
            yield (
                f"{name}: {measured['edit']} at {' + '.join(measured['sites'])}, alpha "
                f"{measured['alpha']:g}, positions {measured['where']}"
            )
        elif "instruction" in measured:
            yield f"{name}: “{measured['instruction']}” in the prompt"
    if sweep := summary.get("sweep"):
        trials, split = len(sweep["trials"]), sweep.get("split")
        yield f"best of {trials} trials on {f'split {split}' if split else 'another split'}"


def _of_questions(
    conditions: Mapping[str, Any], protocol: str
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    kinds = list(conditions["plain"]["scores"])
    changed = "changes" in conditions["plain"]
    told = ["source", "target", "source to target", "others changed"] if changed else []
    rows = []
    for name, measured in conditions.items():
        figures = [f"{100 * measured['scores'][kind][protocol]:.1f}" for kind in kinds]
        if changed:
            c = measured["changes"]
            figures += [
                _difference(c["source_after"], c["source_before"]),
                _difference(c["target_after"], c["target_before"]),
                _percent(c["moved_share"]),
                _percent(c["others_changed_share"]),
            ]
        rows.append((name, figures))
    return [*kinds, *told], rows


def _of_captions(conditions: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    # A condition may lack one, whose Java program failed.
    scores = [each["scores"] for each in conditions.values()]
    metrics = list(dict.fromkeys(name for each in scores for name in each if name != "left out"))
    changed = "changes" in conditions["plain"]
    rows = []
    for name, measured in conditions.items():
        known = [measured["scores"].get(metric) for metric in metrics]
        figures = ["–" if score is None else f"{score:.3f}" for score in known]
        if changed:
            c = measured["changes"]
            figures += [_percent(c["holding_after"] / c["samples"]), f"{c['length_after']:.1f}"]
        rows.append((name, figures))
    return [*metrics, *(["with class words", "words"] if changed else [])], rows


def _of_bench(conditions: Mapping[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Returns the scores of POPE, CHAIR and AMBER, by the plain protocol where there is one."""
    columns, figures = [], {name: [] for name in conditions}
    for metric in ("POPE", "CHAIR", "AMBER"):
        if metric not in conditions["plain"]:
            continue
        protocols = conditions["plain"][metric]
        protocol = "plain" if "plain" in protocols else list(protocols)[-1]
        for score in protocols[protocol]:
            unit = "" if score == "length" else " %"
            columns.append(f"{metric} {score.replace('_', ' ')}{unit}, {protocol}")
            for name, measured in conditions.items():
                value, scale = measured[metric][protocol][score], 100 if unit else 1
                figures[name].append("–" if value is None else f"{scale * value:.1f}")
    return columns, figures


def _difference(after: int, before: int) -> str:
    return f"{after} ({after - before:+d})" if after != before else str(after)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f}\N{NARROW NO-BREAK SPACE}%"


def _examples(
    summary: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> tuple[list[Example], list[Example]]:
    """Returns samples that the first steered condition changed: as intended, and otherwise."""
    steered = next((n for n, m in summary["conditions"].items() if "sites" in m), None)
    if steered is None:
        return [], []
    changed = [s for s in samples if s["predictions"]["plain"] != s["predictions"][steered]]
    before, after = (
        [sample["predictions"][name] for sample in changed] for name in ("plain", steered)
    )
    if summary["kind"] == "vqa":
        source, target = (set(map(normalise_answer, summary[n])) for n in ("source", "target"))
        wanted = [
            normalise_answer(a) in source and normalise_answer(b) in target
            for a, b in zip(before, after, strict=True)
        ]
    elif summary["words"]:
        wanted = list(holding(after, summary["words"]) & ~holding(before, summary["words"]))
    else:
        wanted = [False] * len(changed)
    examples = [
        Example(
            sample=str(sample["id"]),
            image=sample.get("image"),
            question=sample.get("question"),
            truth=str(sample.get("answer") or next(iter(sample["references"]), "")),
            before=old,
            after=new,
        )
        for sample, old, new in zip(changed, before, after, strict=True)
    ]
    groups: tuple[list[Example], list[Example]] = ([], [])
    for example, as_wanted in zip(examples, wanted, strict=True):
        groups[not as_wanted].append(example)
    return groups[0][:NUM_EXAMPLES], groups[1][:NUM_EXAMPLES]
