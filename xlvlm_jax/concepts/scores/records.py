"""Scores of a dictionary: plain records, as in scores.json."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Fit:
    """How well the words of the r most active concepts fit the samples.

    A sample's score is the mean over its r most active concepts with positive activation; samples
    that activate none are left out. Concepts without words score 0.
    """

    mean: float
    std: float  # over samples
    random: float  # mean with random words, as many per concept
    random_std: float  # over samples
    num_samples: float  # a mean over seeds may lie between two numbers
    noise: float | None = None  # mean with noise images (CLIPScore)
    precision: float | None = None  # mean; `mean` is then F1 (BERTScore)
    recall: float | None = None


@dataclasses.dataclass(frozen=True)
class DictionaryScores:
    """Scores of one dictionary. None if a score is undefined or its inputs are missing.

    Attributes:
        name, method, num_concepts: of the dictionary.
        clip, bert: {r: Fit}, CLIPScore and BERTScore's F1.
        overlap: overlap of words between concepts, in [0, 1].
        explained_variance: 1 - |Z - reconstruction|^2 / |Z - mean|^2.
        hoyer, active: sparsity of the codes; share of nonzero codes.
        dead: number of concepts that are not the most active one of any sample.
        stability: mean cosine of matched concepts between seeds.
        monosemanticity: mean over concepts.
        attributes: {attribute: {"concepts": mutual information, "random": of shuffled concepts}}.
        words: of each concept.
        through_norm: whether they were read through the model's final norm.
        seeds: the number of decompositions that the scores are means over, each with its own seed.
        spread: their standard deviation over the seeds, by name: "clip top-1", "overlap", ...
        arrays: what the means are of: "clip top-1" float[N] and so on, NaN for samples without a
            score, and "overlap" float[K, K]. Not part of `to_dict`.
    """

    name: str
    method: str
    num_concepts: int
    clip: Mapping[int, Fit] = dataclasses.field(default_factory=dict)
    bert: Mapping[int, Fit] = dataclasses.field(default_factory=dict)
    overlap: float | None = None
    explained_variance: float | None = None
    hoyer: float | None = None
    active: float | None = None
    dead: float | None = None
    stability: float | None = None
    monosemanticity: float | None = None
    attributes: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    words: Sequence[Sequence[str]] | None = None
    through_norm: bool | None = None
    seeds: int = 1
    spread: Mapping[str, float] = dataclasses.field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values; numbers with six digits, NaN as None."""
        described = dataclasses.asdict(dataclasses.replace(self, arrays={}))
        described.pop("arrays")
        return plain(described)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DictionaryScores":
        """Inverts `to_dict`.

        Raises:
            TypeError, ValueError, AttributeError: the values are not from `to_dict`.
        """
        fits = {
            name: {int(r): Fit(**fit) for r, fit in (values.get(name) or {}).items()}
            for name in ("clip", "bert")
        }
        return cls(**{**values, **fits})


_AVERAGED = (
    "overlap",
    "explained_variance",
    "hoyer",
    "active",
    "dead",
    "stability",
    "monosemanticity",
)


def mean_over_seeds(rows: Sequence[DictionaryScores]) -> DictionaryScores:
    """Returns the scores of one method and number of concepts as means over seeds.

    Args:
        rows: the scores of each seed's dictionary; words and per-sample scores stay those of the
            first.

    Returns:
        The means, with their sample standard deviations as `spread`.
    """
    first = rows[0]
    if len(rows) == 1:
        return first
    spread: dict[str, float] = {}

    def mean(name: str, values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        if len(known) < len(rows):
            return None
        spread[name] = float(np.std(known, ddof=1))
        found = float(np.mean(known))
        whole = all(isinstance(value, int) for value in known) and found.is_integer()
        return int(found) if whole else found

    fits = {
        of: {
            r: dataclasses.replace(
                fit,
                **{
                    name: mean(
                        f"{of} top-{r}" if name == "mean" else f"{of} top-{r} {name}",
                        [getattr(getattr(row, of)[r], name) for row in rows],
                    )
                    for name in (field.name for field in dataclasses.fields(Fit))
                },
            )
            for r, fit in getattr(first, of).items()
        }
        for of in ("clip", "bert")
    }
    means = {name: mean(name, [getattr(row, name) for row in rows]) for name in _AVERAGED}
    attributes: dict[str, Any] = {
        attribute: {
            of: mean(
                f"attribute {attribute}" if of == "concepts" else f"attribute {attribute} {of}",
                [row.attributes.get(attribute, {}).get(of) for row in rows],
            )
            for of in scores
        }
        for attribute, scores in first.attributes.items()
    }
    return dataclasses.replace(
        first, **fits, **means, attributes=attributes, seeds=len(rows), spread=spread
    )


def plain(value: Any) -> Any:
    """Returns JSON values: keys are text, numbers have six digits, NaN is None."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
