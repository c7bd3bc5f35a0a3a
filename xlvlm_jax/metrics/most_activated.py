"""The concepts that a sample activates most, whose words are compared to its image.

N samples, K concepts.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from ports.tracing import is_traced
from xlvlm_jax.metrics.precision import as_real

_TILE_ROWS = 2**14  # rows copied at once
NONE = -1  # instead of a concept: the sample activates none

AnyArray = jax.Array | np.ndarray


def top_concepts(activations: Float[AnyArray, "N K"], count: int) -> Bool[AnyArray, "N K"]:
    """Returns which concepts are among the most active ones of each sample.

    Only positive activations count, so a sample may have fewer or none; ties go to the first.
    Works under jit (count static) and vmap.

    Args:
        activations: float[N, K].
        count: number of concepts per sample.

    Returns:
        bool[N, K].

    Raises:
        ValueError: count < 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if not is_traced(activations):
        return _top_by_rounds(np.asarray(activations), count)
    order = jnp.argsort(-activations, axis=1, stable=True)
    return (jnp.argsort(order, axis=1) < count) & (activations > 0)


def _top_by_rounds(activations: Float[np.ndarray, "N K"], count: int) -> Bool[np.ndarray, "N K"]:
    """Does `top_concepts` without sorting: each round finds the strongest of the rest."""
    chosen = np.zeros(activations.shape, bool)
    for start in range(0, len(activations), _TILE_ROWS):
        left = np.array(activations[start : start + _TILE_ROWS])
        rows = np.arange(len(left))
        for _ in range(min(count, left.shape[1])):
            first = left.argmax(axis=1)
            chosen[start + rows, first] = left[rows, first] > 0
            left[rows, first] = -np.inf
    return chosen


def strongest_concept(activations: Float[np.ndarray, "N K"]) -> Int[np.ndarray, " N"]:
    """Returns the most activated concept of each sample; NONE for a sample of zeros alone."""
    if activations.shape[1] == 0:
        return np.full(len(activations), NONE)
    return np.where(activations.any(axis=1), activations.argmax(axis=1), NONE)


def mean_of_top(
    scores: Float[AnyArray, "N K"], chosen: Bool[AnyArray, "N K"]
) -> Float[AnyArray, " N"]:
    """Returns the mean score of each sample over its chosen concepts.

    Works under jit, vmap and grad.

    Args:
        scores: float[N, K].
        chosen: bool[N, K].

    Returns:
        float[N]; NaN for a sample without chosen concepts.
    """
    xp, (values, taken) = as_real(scores, chosen)
    counts = taken.sum(axis=1)
    totals = xp.where(taken > 0, values, 0).sum(axis=1)
    return xp.where(counts > 0, totals / xp.maximum(counts, 1), xp.nan)
