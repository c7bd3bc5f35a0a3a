"""Computes what the page shows of a directory of concepts: a section with a card per concept.

A row of features belongs to the concept it activates most, or to none if it activates none. Axes:
N rows of the features, K concepts, V values of an attribute.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ports.messages import few
from xlvlm_jax.causal.record import read
from xlvlm_jax.concepts.grounding import largest
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.features.reader import Features
from xlvlm_jax.metrics.labels import Labels
from xlvlm_jax.metrics.most_activated import NONE, strongest_concept
from xlvlm_jax.report.thumbnails import Histogram, histogram

NUM_CONCEPTS = 500  # concepts shown in full; a card takes about 2 KB beside its pictures
NUM_PICTURES = 5
NUM_ATTRIBUTES = 4
SPARSE = 0.2  # a concept that is active in no larger share of rows is sparse
COLUMNS = 16  # concepts copied at a time: one cache line of float32, so each row is read once


class Picture(NamedTuple):
    """One of the samples that activate a concept most."""

    image: str | None  # path
    caption: str  # the model's prediction
    activation: float
    sample: str
    asked: str = ""  # the question and people's answer to it, if there are
    number: int = -1  # of the sample
    overlay: str | None = None  # data URI of the concept's map over the picture


class Attribute(NamedTuple):
    """An attribute value that is more frequent among a concept's rows than among all rows."""

    name: str
    value: str
    share: float  # among the concept's rows for which the attribute is known
    base: float  # among all rows for which it is known

    @property
    def lift(self) -> float:
        """Ratio of the share to the base rate."""
        return self.share / self.base


class Causal(NamedTuple):
    """How much of what a concept changes are its own words (see `xlvlm_jax.causal`)."""

    score: float
    low: float  # of the interval over samples
    high: float
    shuffled: float  # most lists of shuffled words score below this
    includes_null: bool


class Own(NamedTuple):
    """The n rows that activate a concept more than any other, the strongest first; of a sparse
    concept, all rows that activate it.
    """

    rows: Int[np.ndarray, " n"]
    activations: Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Card:
    """One concept."""

    number: int
    words: list[str] | None  # None before grounding
    count: int  # rows that belong to it
    share: float  # count / number of all rows
    mean: float  # mean activation over all rows
    active: int  # rows with a non-zero activation
    histogram: Histogram
    pictures: list[Picture]  # strongest activation first
    attributes: list[Attribute]
    own: Own
    stability: float | None = None
    causal: Causal | None = None  # None if it was not measured
    more: list[Picture] = field(default_factory=list)  # more of its own rows, as many as fit
    has_all: bool = True  # whether all of its own rows' pictures fit


@dataclass(frozen=True)
class Line:
    """A concept beyond those shown in full: a row of a table."""

    number: int
    words: list[str] | None
    count: int
    share: float
    mean: float
    active: int
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Section:
    """One directory of concepts; cards with larger shares come first."""

    name: str
    site: str | None
    concepts: Concepts
    cards: list[Card]
    num_rows: int
    unassigned: int  # rows that activate no concept
    rest: list[Line] = field(default_factory=list)  # after the cards, in the same order

    @property
    def num_concepts(self) -> int:
        """The number of concepts, K."""
        return len(self.cards) + len(self.rest)

    @property
    def explained(self) -> float | None:
        """The share of variance that the concepts explain; None if unknown."""
        return self.concepts.source.get("explained_variance")


class Table(NamedTuple):
    """How often each value of an attribute occurs."""

    values: list[str]
    everywhere: Int[np.ndarray, " V"]  # among all rows
    here: Int[np.ndarray, "K V"]  # among the rows of each concept


def count_attributes(
    assignment: Int[np.ndarray, " N"], num_concepts: int, attributes: Mapping[str, Labels]
) -> dict[str, Table]:
    """Counts the values of all attributes for all concepts.

    Args:
        assignment: int[N], the concept that each row belongs to.
        num_concepts: K.
        attributes: {attribute: labels of the N rows}.

    Returns:
        {attribute: Table}.
    """
    return {
        name: Table(labels.values, labels.counts(), labels.counts_by(assignment, num_concepts))
        for name, labels in attributes.items()
    }


def read_section(
    directory: Path,
    features: Features,
    attributes: Mapping[str, Labels],
    num_concepts: int = NUM_CONCEPTS,
) -> Section:
    """Reads a directory of concepts that were learnt on `features`.

    Args:
        directory: the directory of concepts.
        features: the features they were learnt on.
        attributes: {attribute: labels of the rows of `features`}.
        num_concepts: maximum number of cards; the concepts after the first have a line each.

    Returns:
        The section.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the concepts were not learnt on these features.
    """
    concepts = Concepts.load(directory)
    if concepts.activations is None:
        raise ValueError(
            f"{directory}: the concepts have no activations; project the features on them"
        )
    activations = np.asarray(concepts.activations)
    N, K = activations.shape
    if features.num_rows != N:
        raise ValueError(
            f"{directory}: the activations have {N} rows, but {features.path} has"
            f" {features.num_rows}; decompose these features again"
        )
    if not np.isfinite(activations).all():
        raise ValueError(f"{directory}: activations hold NaN or Inf; decompose again")
    if concepts.words is not None and len(concepts.words) != K:
        raise ValueError(
            f"{directory}: words for {len(concepts.words)} concepts, expected {K}; ground again"
        )

    site = concepts.source.get("site")
    if site is None and len(features.sites) == 1:
        site = features.sites[0]
    if site is not None and site not in features.sites:
        raise ValueError(
            f"{directory}: the concepts are of site {site!r}, but {features.path} holds"
            f" {few(features.sites)}; decompose these features again"
        )

    assignment = strongest_concept(activations)
    tables = count_attributes(assignment, K, attributes)
    stability = concepts.stability
    causal = _causal_scores(directory, K)
    counts = np.bincount(assignment[assignment != NONE], minlength=K).tolist()
    lines = [
        Line(
            number=k,
            words=None if concepts.words is None else list(concepts.words[k]),
            count=counts[k],
            share=counts[k] / N,
            mean=float(column.mean(dtype=np.float64)),
            active=int(np.count_nonzero(column)),
        )
        for k, column in _columns(activations)
    ]
    lines.sort(key=lambda line: (-line.count, -line.mean, line.number))

    def card_of(line: Line) -> Card:
        k = line.number
        own, column = assignment == k, np.ascontiguousarray(activations[:, k])
        return Card(
            number=k,
            words=line.words,
            count=line.count,
            share=line.share,
            mean=line.mean,
            active=line.active,
            pictures=top_pictures(column, features),
            histogram=histogram(column, own),
            attributes=typical_attributes(k, tables),
            own=_own(column, own),
            stability=None if stability is None else float(stability[k]),
            causal=causal[k],
        )

    cards = [card_of(line) for line in lines[:num_concepts]]
    unassigned = int((assignment == NONE).sum())
    return Section(directory.name, site, concepts, cards, N, unassigned, rest=lines[num_concepts:])


def _causal_scores(directory: Path, num_concepts: int) -> list[Causal | None]:
    """Returns the score of each concept; None for those without one."""
    described = read(directory)
    if described is None:
        return [None] * num_concepts
    names = ("score", "low", "high", "null_high", "includes_null")
    columns = [described["concepts"][name] for name in names]
    return [
        None if any(value is None for value in values) else Causal(*values)
        for values in zip(*columns, strict=True)
    ]


def _columns(
    activations: Float[np.ndarray, "N K"],
) -> Iterator[tuple[int, Float[np.ndarray, " N"]]]:
    """Yields (concept, its activations as a contiguous array), copied in blocks of concepts."""
    for first in range(0, activations.shape[1], COLUMNS):
        together = np.ascontiguousarray(activations[:, first : first + COLUMNS].T)
        yield from enumerate(together, first)


def _own(activations: Float[np.ndarray, " N"], own: Bool[np.ndarray, " N"]) -> Own:
    """Returns the rows whose pictures a click shows.

    A dense concept is active nearly everywhere: its own rows are those that activate it most. A
    sparse one, as of autoencoders, may be the strongest nowhere: its rows are all that activate it.
    """
    active = activations > 0
    is_sparse = np.count_nonzero(active) <= SPARSE * len(active)
    rows = np.flatnonzero(active if is_sparse else own & active)
    rows = rows[np.argsort(-activations[rows], kind="stable")]
    return Own(rows, activations[rows])


def own_pictures(card: Card, features: Features, most: int) -> Iterator[Picture]:
    """Yields the pictures of a concept's own rows that are not among its `pictures`, each once.

    Samples are read one by one, as they are asked for; the strongest activation comes first.

    Args:
        card: the concept.
        features: the features that it was learnt on.
        most: maximum number of rows to look at; many may show the same few pictures.
    """
    seen = {_key(picture) for picture in card.pictures}
    for row, activation in itertools.islice(zip(*card.own, strict=True), most):
        picture = _picture(int(row), float(activation), features)
        if _key(picture) not in seen:
            seen.add(_key(picture))
            yield picture


def top_pictures(
    activations: Float[np.ndarray, " N"], features: Features, count: int = NUM_PICTURES
) -> list[Picture]:
    """Returns the samples with the largest positive activations, each image once.

    Args:
        activations: float[N], one concept's activations of the rows of `features`.
        features: the features.
        count: maximum number of pictures.

    Returns:
        Pictures, the strongest activation first.
    """
    pictures: dict[str, Picture] = {}
    for row in _strongest_first(activations, count):
        if len(pictures) == count or activations[row] <= 0:
            break
        picture = _picture(int(row), float(activations[row]), features)
        pictures.setdefault(_key(picture), picture)
    return list(pictures.values())


def _picture(row: int, activation: float, features: Features) -> Picture:
    number = int(features.sample_rows[row])
    sample = features.samples[number]
    image, question, answer = (sample.get(name) for name in ("image", "question", "answer"))
    return Picture(
        image=image and str(image),
        caption=str(sample.get("prediction") or ""),
        activation=activation,
        sample=str(sample.get("id", number)),
        asked=" – ".join(str(text) for text in (question, answer) if text),
        number=number,
    )


def _key(picture: Picture) -> str:
    """Tells pictures apart: several rows may show one."""
    return picture.image or f"sample {picture.sample}"


def _strongest_first(activations: Float[np.ndarray, " N"], count: int) -> Iterator[int]:
    """Yields all rows in order of activation; the caller takes `count` or a few more."""
    done = 0
    while done < len(activations):
        # Several rows may belong to one picture, so how many are needed is not known in advance.
        count = min(4 * count, len(activations))
        found = largest(activations, count)
        yield from found[done:]
        done = count


def typical_attributes(
    concept: int, tables: Mapping[str, Table], count: int = NUM_ATTRIBUTES
) -> list[Attribute]:
    """Returns the attribute values that are over-represented among a concept's rows.

    A value is over-represented if its share p among the n rows of the concept exceeds its share q
    among all rows by three standard errors sqrt(q (1 - q) / n).

    Args:
        concept: the concept's number.
        tables: what `count_attributes` returns.
        count: maximum number of values.

    Returns:
        Attributes in descending order of p log(p / q), their term of the KL divergence between
        the two distributions.
    """
    found = []
    for name, (values, everywhere, of_concepts) in tables.items():
        here = of_concepts[concept]
        n = here.sum()
        p, q = here / max(n, 1), everywhere / max(everywhere.sum(), 1)
        telling = (here > 0) & (q < 1) & (p - q >= 3 * np.sqrt(q * (1 - q) / max(n, 1)))
        for v in np.flatnonzero(telling):
            found.append(Attribute(name, values[v], float(p[v]), float(q[v])))
    return sorted(found, key=lambda a: -a.share * np.log(a.lift))[:count]
