"""The page's section on a shift: figures, and each concept original, shifted and fine-tuned."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xlvlm_jax.report.cards import NUM_CONCEPTS
from xlvlm_jax.report.plots import Plot, read_plot
from xlvlm_jax.shift import ShiftAnalysis
from xlvlm_jax.shift.record import KINDS

NUM_PICTURES, NUM_WORDS = 4, 10
_FIGURES = {
    "overlap.svg": "T-Overlap of each concept: the words that it shares with its match",
    "recovery.svg": "Recovery against consistency and magnitude of the shift",
}
_TITLES = {"original": "Original", "shifted": "Shifted", "finetuned": "Fine-tuned"}


class Face(NamedTuple):
    """A concept as words and pictures."""

    title: str
    words: list[tuple[str, bool]]  # word, whether the fine-tuned concept has it too
    pictures: list[tuple[str, str | None]]  # sample, image file


class Moved(NamedTuple):
    """One concept of a shift."""

    number: int
    samples: int
    overlap: tuple[float, float] | None  # T-Overlap original and shifted; None without a shift
    figures: list[tuple[str, float]]
    faces: list[Face]
    shift_words: list[str]  # decoded from the shift vector itself


class ShiftSection(NamedTuple):
    """One shift directory; concepts with more samples come first."""

    name: str
    analysis: ShiftAnalysis
    rows: list[tuple[str, str, str, str]]  # name, original, shifted, chance
    correlations: list[tuple[str, float, float, int]]  # name, r, p, concepts
    concepts: list[Moved]
    plots: list[Plot]
    num_words: int
    without: int  # concepts without a shift
    left_out: int = 0  # concepts with fewer samples that are not shown


def read_shifts(
    run: Path, images: str | os.PathLike[str] | None = None, num_concepts: int = NUM_CONCEPTS
) -> list[ShiftSection]:
    """Reads the sections of all `shift*/` in a run directory.

    Args:
        run: the run directory.
        images: directory that holds the pictures now, if they were moved.
        num_concepts: maximum number of concepts per shift to show.

    Returns:
        A section per shift, in order of directory name.

    Raises:
        ValueError: a shift is damaged.
    """
    directories = sorted(path for path in run.glob("shift*") if (path / "shift.json").is_file())
    return [
        _section(directory, ShiftAnalysis.load(directory, images=images), num_concepts)
        for directory in directories
    ]


def shown_images(sections: Iterable[ShiftSection]) -> Iterator[str]:
    """Yields the image files that the sections show."""
    for section in sections:
        for concept in section.concepts:
            for face in concept.faces:
                yield from (image for _, image in face.pictures if image)


def overlap_rows(analysis: ShiftAnalysis) -> list[tuple[str, str, str, str]]:
    """Returns rows of mean overlap of words and images: name, original, shifted, by chance."""
    rows = []
    for name, of in (("words (T-Overlap)", "words"), ("images", "images")):
        if getattr(analysis, of) is not None:
            shares = [analysis.mean_overlap(kind, of) for kind in ("original", "shifted")]
            shares.append(analysis.chance(of)["mismatched"])
            rows.append((name, *(_percent(share) for share in shares)))
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if np.isfinite(share) else "–"


def _section(directory: Path, analysis: ShiftAnalysis, num_concepts: int) -> ShiftSection:
    plots = [
        read_plot(directory / file, explained)
        for file, explained in _FIGURES.items()
        if (directory / file).is_file()
    ]
    correlations = [
        (name.replace("-", " and "), c.r, c.p_value, c.count)
        for name, c in analysis.correlations.items()
        if np.isfinite(c.r)
    ]
    order = np.argsort(-analysis.counts, kind="stable").tolist()
    return ShiftSection(
        name=directory.name,
        analysis=analysis,
        rows=overlap_rows(analysis),
        correlations=correlations,
        concepts=[_moved(analysis, k) for k in order[:num_concepts]],
        plots=plots,
        num_words=analysis.num_words,
        without=int((~analysis.moved).sum()),
        left_out=len(order[num_concepts:]),
    )


def _moved(analysis: ShiftAnalysis, k: int) -> Moved:
    has_shift = bool(analysis.moved[k])
    words, images = analysis.words or {}, analysis.images or {}
    faces = []
    for kind in KINDS:
        if kind == "shifted" and not has_shift:
            continue
        shown = words[kind][k][:NUM_WORDS] if words else []
        wanted = words["finetuned"][k] if words and kind != "finetuned" else ()
        samples = images[kind][k][:NUM_PICTURES] if images else []
        pictures = [(name, analysis.pictures.get(name)) for name in samples]
        faces.append(Face(_TITLES[kind], [(word, word in wanted) for word in shown], pictures))
    overlap = None
    if has_shift and words:
        overlap = float(analysis.overlap("original")[k]), float(analysis.overlap("shifted")[k])
    names = ("recovery", "consistency", "magnitude")
    figures = [(name, float(analysis.figure(name)[k])) for name in names] if has_shift else []
    figures = [(name, value) for name, value in figures if np.isfinite(value)]
    return Moved(
        number=k,
        samples=int(analysis.counts[k]),
        overlap=overlap,
        figures=figures,
        faces=faces,
        shift_words=words["shift"][k][:NUM_WORDS] if words else [],
    )
