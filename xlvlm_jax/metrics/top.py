"""The concepts that a sample activates most: those whose words are held against its image.

N samples, K concepts.
"""

import jax
import numpy as np
from jaxtyping import Bool, Float

AnyArray = jax.Array | np.ndarray


def top_concepts(activations: Float[AnyArray, "N K"], count: int) -> Bool[np.ndarray, "N K"]:
    """Which concepts are among the `count` most activated ones of each sample.

    Only activations above zero count, so that a sample may have fewer, even none; of equal ones the
    first counts.

    Raises ValueError unless 1 <= count.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    activations = np.asarray(activations)
    order = np.argsort(-activations, axis=1, kind="stable")[:, :count]
    chosen = np.zeros(activations.shape, bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen & (activations > 0)


def mean_of_top(
    scores: Float[AnyArray, "N K"], chosen: Bool[np.ndarray, "N K"]
) -> Float[np.ndarray, " N"]:
    """The mean score of each sample over its chosen concepts; NaN where there is none."""
    counts = chosen.sum(axis=1)
    totals = np.where(chosen, np.asarray(scores, np.float64), 0).sum(axis=1)
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)
