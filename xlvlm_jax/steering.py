"""Steering vectors from states; `ports.steer` and the edits apply them.

From "Analyzing Fine-tuning Representation Shift for Multimodal LLMs Steering" (ICCV 2025, section
5). N, M samples, D width, K concepts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from xlvlm_jax.concepts import Concepts, decompose

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
