"""The concepts that a sample activates most: those whose words are held against its image.

N samples, K concepts.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from xlvlm_jax.metrics.precision import as_real, is_traced

AnyArray = jax.Array | np.ndarray


def top_concepts(activations: Float[AnyArray, "N K"], count: int) -> Bool[np.ndarray, "N K"]:
    """Which concepts are among the `count` most activated ones of each sample.

    Only activations above zero count, so that a sample may have fewer, even none; of equal ones the
    first counts. Traces under jit (count static) and vmap.

    Raises ValueError unless 1 <= count.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    xp = jnp if is_traced(activations) else np
    activations = xp.asarray(activations)
    order = xp.argsort(-activations, axis=1, stable=True)
    return (xp.argsort(order, axis=1) < count) & (activations > 0)


def mean_of_top(
    scores: Float[AnyArray, "N K"], chosen: Bool[np.ndarray, "N K"]
) -> Float[np.ndarray, " N"]:
    """The mean score of each sample over its chosen concepts; NaN where there is none.

    Traces under jit, vmap and grad.
    """
    xp, (scores, chosen) = as_real(scores, chosen)
    counts = chosen.sum(axis=1)
    totals = xp.where(chosen > 0, scores, 0).sum(axis=1)
    return xp.where(counts > 0, totals / xp.maximum(counts, 1), xp.nan)
