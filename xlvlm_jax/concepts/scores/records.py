"""What a dictionary scored: plain records, as scores.json holds them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Fit:
    """How well the words of the r most activated concepts fit the samples.

    A sample's score is the mean over its r most activated concepts, of those above zero; samples
    that activate none are left out. Concepts without words score 0.
    """

    mean: float
    std: float  # over samples
    random: float  # the mean with random words, as many for each concept
    random_std: float  # over samples
    num_samples: int
    noise: float | None = None  # the mean with images of noise (CLIPScore)
    precision: float | None = None  # means, where `mean` is that of F1 (BERTScore)
    recall: float | None = None


@dataclasses.dataclass(frozen=True)
class DictionaryScores:
    """One dictionary, scored. None where a figure has no meaning or nothing to be computed from.

    Attributes:
        name, method, num_concepts: of the dictionary.
        clip, bert: {r: Fit}, CLIPScore and BERTScore's F1.
        overlap: of words, in [0, 1].
        explained_variance: 1 - |Z - reconstruction|^2 / |Z - mean|^2.
        hoyer, active: sparsity of the codes; share of them that are not zero.
        dead: how many concepts are the most activated one of no sample.
        stability: mean cosine of matched concepts of other seeds.
        monosemanticity: mean over concepts.
        attributes: {attribute: {"concepts": mutual information, "random": of shuffled concepts}}.
        words: of each concept.
        through_norm: whether they were read through the model's final norm.
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
    dead: int | None = None
    stability: float | None = None
    monosemanticity: float | None = None
    attributes: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    words: Sequence[Sequence[str]] | None = None
    through_norm: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; figures to six digits, NaN as None."""
        return plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DictionaryScores":
        """What `to_dict` gave; TypeError, ValueError or AttributeError for anything else."""
        fits = {
            name: {int(r): Fit(**fit) for r, fit in (values.get(name) or {}).items()}
            for name in ("clip", "bert")
        }
        return cls(**{**values, **fits})


def plain(value: Any) -> Any:
    """As JSON values: keys are text, figures have six digits, NaN is None."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
