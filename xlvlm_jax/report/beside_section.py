"""Shows two runs side by side: each concept next to its match in the other run."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ports.messages import few
from ports.tables import as_text, flat
from xlvlm_jax.features.reader import Features
from xlvlm_jax.report.cards import Card, Section, read_section
from xlvlm_jax.solvers.matching import match_any

DIGESTS = ("fingerprint", "samples digest")  # settings that mean nothing to a reader


class Pair(NamedTuple):
    """Two matched concepts, or one without a match."""

    ours: Card | None
    theirs: Card | None
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
    anchor: str = ""  # of our section on the page; its cards are {anchor}-{number}

    @property
    def cosine(self) -> float:
        """The mean cosine of the pairs."""
        return float(np.mean([pair.cosine for pair in self.pairs if pair.cosine is not None]))

    @property
    def overlap(self) -> float | None:
        """The mean share of our words that the matched concept has too; None without words."""
        paired = [p for p in self.pairs if p.ours is not None and p.theirs is not None]
        shares = [len(p.shared) / len(p.ours.words) for p in paired if p.ours and p.ours.words]
        return float(np.mean(shares)) if shares and self.theirs.concepts.words else None


class OtherRun(NamedTuple):
    """The features and concepts of the other run."""

    features: Features
    sections: list[Section]


def read_other(run: Path, images: str | os.PathLike[str] | None = None) -> OtherRun:
    """Reads the features and concepts of the other run.

    Args:
        run: its directory.
        images: directory that holds the pictures now, if they were moved.

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
    sections = [read_section(directory, features, {}) for directory in directories]
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
    of_theirs = {card.number: card for card in theirs.cards}
    pairs = []
    for card in ours.cards:
        other, cosine = matched.get(card.number, (None, None))
        their = of_theirs.pop(other) if other is not None else None
        shared = frozenset(card.words or ()) & frozenset((their and their.words) or ())
        pairs.append(Pair(card, their, cosine, shared))
    pairs += [Pair(None, card, None, frozenset()) for card in of_theirs.values()]
    described = [
        {"method": s.concepts.method, **s.concepts.options, "concepts": len(s.cards), **manifest}
        for s, manifest in zip((ours, theirs), settings, strict=True)
    ]
    site = ours.site or ours.name
    return BesideSection(site, names, ours, theirs, pairs, list(_differences(*described)), anchor)


def _differences(
    here: Mapping[str, Any], there: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    a, b = (dict(flat(each)) for each in (here, there))
    for name in dict.fromkeys((*a, *b)):
        if a.get(name) != b.get(name) and name not in DIGESTS:
            yield name, as_text(a.get(name, "–")), as_text(b.get(name, "–"))
