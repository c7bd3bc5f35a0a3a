"""The simplest concepts: the K rows of largest norm, scored like k-means centroids.

    components = the rows z_n of the K largest |z_n|_2, largest first; of equal ones the earlier row
    activations = 1 / (1 + distance to each component)

The objective is the inertia, the sum of squared distances to the nearest component, so that it can
be held against that of k-means. Nothing is iterated and nothing is random. This is the baseline
"simple" of Parekh et al., "A concept-based explainability framework for large multimodal models",
NeurIPS 2024.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from xlvlm_jax.solvers import kmeans
from xlvlm_jax.solvers.loop import Result, real_rows


@partial(jax.jit, static_argnames=("num_samples", "num_concepts"))
def solve(
    Z: Float[Array, "N D"], key: PRNGKeyArray, *, num_samples: int, num_concepts: int
) -> Result:
    """Pick the rows; those from `num_samples` on are ignored, and so is the key."""
    rows = real_rows(Z, num_samples)
    squared_norms = jnp.sum(Z.astype(jnp.float32) ** 2, axis=1)
    largest = jax.lax.top_k(jnp.where(rows > 0, squared_norms, -1), num_concepts)[1]
    components = Z[largest].astype(jnp.float32)
    squared = kmeans.assign(Z, components)[1]
    inertia = jnp.sum(rows * jnp.min(squared, axis=1))
    return Result(
        components=components,
        activations=(1 / (1 + jnp.sqrt(squared)))[:num_samples],
        objective=inertia,
        iterations=jnp.int32(0),
        converged=jnp.bool_(True),
        history=inertia[None],
    )
