"""Steering vectors from states, and on disk; `ports.steer` and the edits apply them.

From "Analyzing Fine-tuning Representation Shift for Multimodal LLMs Steering" (ICCV 2025, section
5). N, M samples, D width, K concepts.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float, Int

from ports.steering import Edit, add
from xlvlm_jax import atomic
from xlvlm_jax.concepts import Concepts, decompose
from xlvlm_jax.metrics.vqa import normalise_answer
from xlvlm_jax.store import Features

Array = jax.Array | np.ndarray


def steering_vector(source: Float[Array, "N D"], target: Float[Array, "M D"]) -> Float[Array, "D"]:
    """The coarse vector: mean of the target states minus mean of the source states.

    Raises ValueError for no states, or states of different widths.
    """
    source, target = jnp.asarray(source), jnp.asarray(target)
    if source.ndim != 2 or target.ndim != 2 or source.shape[1] != target.shape[1]:
        raise ValueError(
            f"source and target states have shapes {source.shape} and {target.shape}; expected "
            "[N, D] and [M, D]"
        )
    if not len(source) or not len(target):
        raise ValueError(
            f"there are {len(source)} source and {len(target)} target states; expected at least "
            "one of each"
        )
    kind = jnp.promote_types(source.dtype, jnp.float32)
    return jnp.mean(target, axis=0, dtype=kind) - jnp.mean(source, axis=0, dtype=kind)


class FineVectors(NamedTuple):
    """Vectors from one concept of the source states to another."""

    vectors: Array  # float32[K, K, D]: vectors[i, j] leads from concept i to concept j
    assignment: Int[Array, "N"]  # the concept that each source state belongs to
    concepts: Concepts

    def samples(self, concept: int) -> Int[np.ndarray, "n"]:
        """The source samples to steer with vectors[concept, :]."""
        return np.flatnonzero(np.asarray(self.assignment) == concept)


def fine_vectors(source: Float[Array, "N D"], num_concepts: int, *, key: jax.Array) -> FineVectors:
    """The fine vectors: centroid_j - centroid_i of a k-means on the source states.

    Args:
        source: states of the samples to steer.
        num_concepts: K.
        key: of the k-means.

    Raises ValueError as `decompose` does.
    """
    concepts = decompose(source, num_concepts, "kmeans", key=key)
    centroids = jnp.asarray(concepts.components)
    return FineVectors(
        vectors=centroids[None] - centroids[:, None],
        assignment=jnp.argmax(jnp.asarray(concepts.activations), axis=1),
        concepts=concepts,
    )


@dataclasses.dataclass(frozen=True)
class SteeringVector:
    """A vector with what it is for. Vectors of one site add up, and scale.

    Attributes:
        vector: float32[D].
        site: whose states it is added to.
        source: how it was fitted and on what, JSON values.
    """

    vector: np.ndarray
    site: str
    source: dict[str, Any] = dataclasses.field(default_factory=dict)

    def edits(self, alpha: Any = 1.0, where: Any = "all") -> dict[str, Edit]:
        """What `VLM.generate` takes; see `add`."""
        return {self.site: add(self.vector, alpha, where)}

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        if self.site != other.site or self.vector.shape != other.vector.shape:
            raise ValueError(
                f"vectors for {self.site} {self.vector.shape} and {other.site} "
                f"{other.vector.shape} do not add up; expected the same site and width"
            )
        source = {"sum of": [self.source, other.source]}
        return SteeringVector(self.vector + other.vector, self.site, source)

    def __mul__(self, factor: float) -> "SteeringVector":
        source = {**self.source, "scaled by": factor * self.source.get("scaled by", 1.0)}
        return SteeringVector(np.float32(factor) * self.vector, self.site, source)

    __rmul__ = __mul__

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with the rest as metadata; the directory is made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"site": self.site, "source": json.dumps(self.source)}
        tensors = {"vector": np.ascontiguousarray(self.vector, np.float32)}
        atomic.write(path, safetensors.numpy.save(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Reads what `save` wrote. FileNotFoundError, or ValueError for another kind of file."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected a steering vector")
        try:
            with safetensors.safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                return cls(
                    file.get_tensor("vector"), metadata["site"], json.loads(metadata["source"])
                )
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no steering vector: {error}") from error


def fit_coarse(
    features: Features,
    site: str,
    source: Sequence[str],
    target: Sequence[str],
    *,
    key: str = "prediction",
) -> SteeringVector:
    """The coarse vector from samples answered with the source words to those with the target's.

    Args:
        features: states of the samples' answers.
        site: whose.
        source, target: answers, compared after normalisation.
        key: where a sample's answer is: "prediction", or "answer" for that of people.

    Raises ValueError for a site that is not there, samples without that key, or source or target
    words that no sample was answered with.
    """
    Z = features.matrix(site)
    if any(key not in sample for sample in features.samples):
        raise ValueError(f"{features.path}: its samples have no {key!r}; extract from questions")
    answers = [normalise_answer(str(sample[key])) for sample in features.samples]

    def rows(words: Sequence[str], what: str) -> np.ndarray:
        wanted = {normalise_answer(word) for word in words}
        chosen = np.array([answer in wanted for answer in answers], bool)[features.sample_rows]
        if not chosen.any():
            raise ValueError(
                f"none of {len(answers)} samples has a {key} among the {what} words "
                f"{', '.join(words)}; frequent are {', '.join(_frequent(answers))}"
            )
        return Z[chosen]

    of_source, of_target = rows(source, "source"), rows(target, "target")
    described = {
        "method": "coarse",
        "features": str(features.path),
        "model": features.manifest.get("model"),
        "key": key,
        "source": list(source),
        "target": list(target),
        "source rows": len(of_source),
        "target rows": len(of_target),
    }
    vector = np.asarray(steering_vector(of_source, of_target), np.float32)
    return SteeringVector(vector, site, described)


def _frequent(answers: Sequence[str]) -> list[str]:
    words, numbers = np.unique(list(answers), return_counts=True)
    return [str(word) for word in words[np.argsort(-numbers, kind="stable")][:5]]
