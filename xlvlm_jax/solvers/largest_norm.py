"""The simplest concepts: the K rows of largest norm, scored like k-means centroids.

    components = the K rows z_n of largest |z_n|_2, largest first; ties go to the earlier row
    activations = 1 / (1 + distance to each component)

The objective is the inertia, the sum of squared distances to the nearest component, so that it can
be compared to that of k-means. The method is neither iterative nor random. This is the baseline
"simple" of Parekh et al., "A concept-based explainability framework for large multimodal models",
NeurIPS 2024.
"""

from functools import partial

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from xlvlm_jax.solvers import kmeans
from xlvlm_jax.solvers.buckets import bucket_of_concepts
from xlvlm_jax.solvers.collectives import Rows, solve_on
from xlvlm_jax.solvers.compiling import jit
from xlvlm_jax.solvers.linalg import real_dtype
from xlvlm_jax.solvers.loop import Result
from xlvlm_jax.solvers.phases import Counts, scalar
from xlvlm_jax.solvers.sums import column_sums


def solve(
    Z: Float[Array, "N D"],
    key: PRNGKeyArray,
    *,
    num_samples: int,
    num_concepts: tuple[int, ...],
    unit: Float[Array, ""] | float = 1.0,
    mesh: Mesh | None = None,
) -> Result:
    """Picks the rows of largest norm.

    Args:
        Z: float[N, D].
        key: ignored.
        num_samples: number of leading rows of Z that count.
        num_concepts: Q numbers of concepts.
        unit: Z is in multiples of it; the activations' distances are not.
        mesh: devices that hold the rows along "data"; None for one device.

    Returns:
        the result, with a leading axis Q; fewer concepts are the first ones of more.
    """
    most = bucket_of_concepts(max(num_concepts), num_samples, Z.shape[1])
    counts = Counts.of(num_samples, num_concepts, 0)
    return _solve(Z, scalar(unit), counts, most=most, mesh=mesh)


@partial(jit, static_argnames=("most", "mesh"))
def _solve(
    Z: Float[Array, "N D"],
    unit: Float[Array, ""],
    counts: Counts,
    *,
    most: int,
    mesh: Mesh | None,
) -> Result:
    def local(Z: Array, unit: Array, counts: Counts, rows: Rows) -> Result:
        num_samples, num_concepts, _ = counts
        real = rows.numbers(len(Z)) < num_samples
        squared_norms = jnp.sum(Z.astype(real_dtype(Z)) ** 2, axis=1)
        components = rows.take(Z, rows.largest(jnp.where(real, squared_norms, -1), most))
        squared = kmeans.assign(Z, components)[1]
        active = jnp.arange(len(components)) < num_concepts[:, None, None]
        least = jnp.min(jnp.where(active, squared, jnp.inf), axis=2)
        inertia = rows.total(column_sums((real * least).T).value)
        Q = len(num_concepts)
        return Result(
            components=jnp.broadcast_to(components, (Q, *components.shape)),
            activations=jnp.broadcast_to(kmeans.similarity(squared, unit), (Q, *squared.shape)),
            objective=inertia,
            iterations=jnp.zeros(Q, jnp.int32),
            converged=jnp.ones(Q, bool),
            history=inertia[:, None],
        )

    return solve_on(mesh, local, Z, (unit.astype(real_dtype(Z)), counts))
