"""Shows two runs side by side: each concept next to its match in the other run."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ports.messages import few
from ports.tables import as_text, flat
from xlvlm_jax.features.reader import Features
from xlvlm_jax.report.cards import NUM_CONCEPTS, Card, Line, Section, read_section
from xlvlm_jax.solvers.matching import match_any

DIGESTS = ("fingerprint", "samples digest")  # settings that mean nothing to a reader


class Pair(NamedTuple):
    """Two matched concepts, or one without a match; a line is of one not shown in full."""

    ours: Card | Line | None
    theirs: Card | Line | None
    cosine: float | None  # of their components
    shared: frozenset[str]  # words that both have


class BesideSection(NamedTuple):
    """Two dictionaries of one site."""

    site: str
    names: tuple[str, str]  # of the two runs
    ours: Section
    theirs: Section
    pairs: list[Pair]  # in the order of our cards, then unmatched concepts of the other run
    differences: list[tuple[str, str, str]]  # setting, here, there
    cosine: float  # mean of all pairs
    overlap: float | None  # mean share of our words that the match has too; None without words
    anchor: str = ""  # of our section on the page; its cards are {anchor}-{number}
    left_out: int = 0  # number of our concepts that are not shown in full: their pairs


class OtherRun(NamedTuple):
    """The features and concepts of the other run."""

    features: Features
    sections: list[Section]


def read_other(
    run: Path, images: str | os.PathLike[str] | None = None, num_concepts: int = NUM_CONCEPTS
) -> OtherRun:
    """Reads the features and concepts of the other run.

    Args:
        run: its directory.
        images: directory that holds the pictures now, if they were moved.
        num_concepts: maximum number of concepts per directory to show in full.

    Returns:
        The features and a section per directory of concepts.

    Raises:
        FileNotFoundError: the directory holds no features or no concepts.
        ValueError: a file is damaged, or concepts were not learnt on these features.
    """
    directories = sorted(path for path in run.glob("concepts*") if path.is_dir())
    if not (run / "features").is_dir() or not directories:
        raise FileNotFoundError(
            f"{run}: expected features/ and concepts*/ of another run; give a run directory"
        )
    features = Features.open(run / "features", images=images)
    sections = [read_section(directory, features, {}, num_concepts) for directory in directories]
    return OtherRun(features, sections)


def pair_sections(ours: Sequence[Section], theirs: Sequence[Section]) -> list[tuple[int, int]]:
    """Matches the directories of concepts of two runs.

    First those with the same name and site, then those with the same site. If each run has a single
    directory, these two are matched.

    Args:
        ours, theirs: the sections of each run.

    Returns:
        Pairs of indices into `ours` and `theirs`.

    Raises:
        ValueError: there is no match.
    """
    pairs: list[tuple[int, int]] = []
    for alike in (lambda a, b: (a.name, a.site) == (b.name, b.site), lambda a, b: a.site == b.site):
        for i, a in enumerate(ours):
            for j, b in enumerate(theirs):
                free = all(i != x and j != y for x, y in pairs)
                if free and alike(a, b):
                    pairs.append((i, j))
    if not pairs and len(ours) == len(theirs) == 1:
        return [(0, 0)]
    if not pairs:
        raise ValueError(
            f"the runs have no site in common: one has {few(a.site for a in ours)}, the other "
            f"{few(b.site for b in theirs)}; decompose the same site in both"
        )
    return sorted(pairs)


def beside(
    ours: Section,
    theirs: Section,
    names: tuple[str, str],
    settings: tuple[Mapping[str, Any], Mapping[str, Any]],
    anchor: str = "",
) -> BesideSection:
    """Matches two dictionaries and compares their settings.

    Args:
        ours, theirs: the dictionaries; they may have different numbers of concepts.
        names: the names of their runs.
        settings: the manifests of their features.
        anchor: what the page calls our section.

    Returns:
        The section of the page.

    Raises:
        ValueError: their components have different widths.
    """
    a, b = (np.asarray(section.concepts.components) for section in (ours, theirs))
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"concepts of {names[0]} have width {a.shape[1]} and of {names[1]} {b.shape[1]}; "
            "compare runs of one model and site"
        )
    rows, columns, cosines = match_any(a, b)
    found = zip(rows.tolist(), columns.tolist(), cosines.tolist(), strict=True)
    matched = {row: (column, cosine) for row, column, cosine in found}
    of_theirs: dict[int, Card | Line] = {c.number: c for c in (*theirs.rest, *theirs.cards)}
    pairs: list[Pair] = []
    for card in (*ours.cards, *ours.rest):
        other, cosine = matched.get(card.number, (None, None))
        their = of_theirs.pop(other) if other is not None else None
        shared = frozenset(card.words or ()) & frozenset((their and their.words) or ())
        pairs.append(Pair(card, their, cosine, shared))
    paired = [p for p in pairs if p.theirs is not None]
    shares = [len(p.shared) / len(p.ours.words) for p in paired if p.ours and p.ours.words]
    shown = pairs[: len(ours.cards)]
    shown += [Pair(None, c, None, frozenset()) for c in theirs.cards if c.number in of_theirs]
    described = [
        {"method": s.concepts.method, **s.concepts.options, "concepts": s.num_concepts, **manifest}
        for s, manifest in zip((ours, theirs), settings, strict=True)
    ]
    return BesideSection(
        ours.site or ours.name,
        names,
        ours,
        theirs,
        shown,
        list(_differences(*described)),
        cosine=float(cosines.mean()),
        overlap=float(np.mean(shares)) if shares and theirs.concepts.words else None,
        anchor=anchor,
        left_out=len(ours.rest),
    )


def _differences(
    here: Mapping[str, Any], there: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    a, b = (dict(flat(each)) for each in (here, there))
    for name in dict.fromkeys((*a, *b)):
        if a.get(name) != b.get(name) and name not in DIGESTS:
            yield name, as_text(a.get(name, "–")), as_text(b.get(name, "–"))
