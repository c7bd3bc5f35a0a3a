"""Principal components of a source of rows, with a pass over the source an update.

Subspace iteration with Rayleigh-Ritz steps: the image of a basis gives both its best axes and the
next basis.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from xlvlm_jax.solvers import pca
from xlvlm_jax.solvers.compression import sketch_directions
from xlvlm_jax.solvers.loop import Result, matmul, weighted_sums
from xlvlm_jax.solvers.orthonormal import orthonormal
from xlvlm_jax.solvers.streamed.tiles import Source, Tile, Write, add_up, check_rows, write_out


def solve(
    source: Source,
    key: PRNGKeyArray,
    write: Write,
    *,
    num_concepts: int,
    tol: float = 1e-5,
    max_iter: int = 100,
) -> Result:
    """As `pca.solve`, for one number of components; activations go to `write(start, rows)`.

    Halko, Martinsson and Tropp, "Finding structure with randomness", 2011, sections 4.5 and 5.
    """
    N, D = source.shape
    K = num_concepts
    R = min(pca.width(K + pca.OVERSAMPLE), N, D)

    directions = sketch_directions(key, D, R)
    total, spanned = add_up(source, lambda tile: _sketch(tile.Z, tile.real, directions), check_rows)
    mean = total / N
    basis = orthonormal(spanned - N * jnp.outer(mean, matmul(mean, directions)))

    history, error = [], np.inf
    while True:

        def on_tile(tile: Tile, basis: Array = basis) -> tuple:
            return _collect(tile.Z, tile.real, mean, basis), ()

        spanned, gram, energy = add_up(source, on_tile)
        variances, axes = jnp.linalg.eigh(gram)
        variances, axes = variances[::-1], axes[:, ::-1]
        basis, images = matmul(basis, axes), matmul(spanned, axes)
        history.append(max(float(energy) - 0.5 * float(jnp.sum(variances[:K])), 0.0))
        error = float(pca.expected_gain(basis, images, variances, K))
        if error <= tol or len(history) > max_iter or min(N, D) == R:
            break
        basis = orthonormal(images)
    components = pca.with_signs(basis[:, :K].T)

    objective = write_out(source, lambda tile: _finish(tile.Z, tile.real, mean, components), write)
    return Result(
        components=components,
        activations=None,
        objective=objective,
        iterations=len(history) - 1,
        converged=bool(error <= tol or min(N, D) == R),
        history=np.array(history, np.float32),
        mean=mean,
    )


@jax.jit
def _sketch(Z: Array, real: Array, directions: Array) -> tuple[Any, Array]:
    Z = Z.astype(jnp.float32)
    return (matmul(real, Z), weighted_sums(matmul(Z, directions).T, Z).T), jnp.sum(Z**2, axis=1)


@jax.jit
def _collect(Z: Array, real: Array, mean: Array, basis: Array) -> tuple[Array, Array, Array]:
    Z = real[:, None] * (Z.astype(jnp.float32) - mean)
    scores = matmul(Z, basis)
    return weighted_sums(scores.T, Z).T, matmul(scores.T, scores), 0.5 * jnp.sum(Z**2)


@jax.jit
def _finish(Z: Array, real: Array, mean: Array, components: Array) -> tuple[Array, Array]:
    Z = real[:, None] * (Z.astype(jnp.float32) - mean)
    scores = matmul(Z, components.T)
    return 0.5 * jnp.sum((Z - matmul(scores, components)) ** 2), scores
