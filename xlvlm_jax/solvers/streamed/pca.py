"""Principal components of a source of rows, with one pass over the source per update.

An update finds the best axes in the span of the last axes and their images. For many components
`solvers.pca` adds narrower blocks one by one, each of which would take a pass here.

The covariance is linear, so images of the new axes are sums of images from earlier passes, and a
pass multiplies the rows only with the new directions.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from xlvlm_jax.solvers import pca
from xlvlm_jax.solvers.compression import sketch_directions
from xlvlm_jax.solvers.linalg import complement, matmul, orthonormal, weighted_sums
from xlvlm_jax.solvers.loop import Result
from xlvlm_jax.solvers.phases import Standing, Tell
from xlvlm_jax.solvers.streamed.columns import sketch
from xlvlm_jax.solvers.streamed.tiles import (
    Source,
    Tile,
    Write,
    add_up,
    check_rows,
    origin,
    values_of,
    write_out,
)
from xlvlm_jax.solvers.sums import Wide, total

OVERSAMPLE = 8  # minimum number of axes beyond K


def solve(
    source: Source,
    key: PRNGKeyArray,
    write: Write,
    tell: Tell | None = None,
    *,
    num_concepts: int,
    tol: float = 1e-5,
    max_iter: int = 100,
) -> Result:
    """Does `pca.solve` for one number of components; activations go to `write(start, rows)`."""
    N, D = source.shape
    K = num_concepts
    W = pca.num_axes(K + OVERSAMPLE)
    exact = 2 * W > D  # no room for as many new directions: use the whole space at once

    directions = sketch_directions(key, D, D if exact else W)
    start = jnp.asarray(origin(source))

    def sketched(tile: Tile) -> tuple:
        return sketch(tile.Z, tile.real, directions, start)

    spanned, moment = add_up(source, sketched, check_rows)
    moved = Wide(*(part / N for part in moment))
    mean = Wide(start, jnp.zeros_like(start)) + moved
    off = moved.value
    new = orthonormal(spanned.value - N * jnp.outer(off, matmul(off, directions)))
    basis = images = jnp.zeros((D, 0), jnp.float32)

    history, error = [], np.inf
    while True:

        def on_tile(tile: Tile, new: Array = new) -> tuple:
            return collect(tile.Z, tile.real, mean, new), ()

        new_images, energy = values_of(add_up(source, on_tile))
        basis, images, variances = _best_axes(basis, images, new, new_images, min(W, D))
        history.append(max(float(energy) - 0.5 * float(jnp.sum(variances[:K])), 0.0))
        error = 0.0 if exact else float(_expected_gain(basis, images, variances, K))
        if tell is not None:
            tell(Standing(K, len(history) - 1, max_iter, history[-1], error))
        if error <= tol or len(history) > max_iter:
            break
        new = complement(basis, images)
    components = pca.with_signs(basis[:, :K].T)

    objective = write_out(source, lambda tile: _finish(tile.Z, tile.real, mean, components), write)
    return Result(
        components=components,
        activations=None,
        objective=objective.value,
        iterations=jnp.int32(len(history) - 1),
        converged=jnp.asarray(error <= tol),
        history=jnp.array([*history[:-1], float(objective.value)], jnp.float32),
        mean=mean.high,
    )


def _expected_gain(
    basis: Float[Array, "D V"],
    images: Float[Array, "D V"],
    variances: Float[Array, " V"],
    num_concepts: int,
) -> Float[Array, ""]:
    """Returns what `pca.expected_gain` does, from the images of the axes."""
    # Subtracts what already lies in the span: each axis has a trace of a column of huge variance in
    # its last digit, whose image is not a gain.
    missed = jnp.sum((images - matmul(basis, matmul(basis.T, images))) ** 2, axis=0)
    return pca.expected_gain(missed, variances, num_concepts)


def _best_axes(
    basis: Float[Array, "D W"],
    images: Float[Array, "D W"],
    new: Float[Array, "D R"],
    new_images: Float[Array, "D R"],
    width: int,
) -> tuple[Float[Array, "D V"], Float[Array, "D V"], Float[Array, " V"]]:
    """Returns the leading axes in the span of both bases, their images and their variances."""
    basis = jnp.concatenate([basis, new], axis=1)
    images = jnp.concatenate([images, new_images], axis=1)
    overlaps = matmul(basis.T, images)
    variances, axes = jnp.linalg.eigh((overlaps + overlaps.T) / 2)
    axes = axes[:, ::-1][:, :width]
    return matmul(basis, axes), matmul(images, axes), variances[::-1][:width]


@jax.jit
def collect(Z: Array, real: Array, mean: Wide, basis: Array) -> tuple[Array, Wide]:
    """Returns a tile's share of the images of the basis, and its energy."""
    Z = _centred(Z, real, mean)
    squares = total(jnp.sum(Z**2, axis=1)).times(0.5)
    return weighted_sums(matmul(Z, basis).T, Z).T, squares


@jax.jit
def _finish(Z: Array, real: Array, mean: Wide, components: Array) -> tuple[Wide, Array]:
    Z = _centred(Z, real, mean)
    scores = matmul(Z, components.T)
    return total(jnp.sum((Z - matmul(scores, components)) ** 2, axis=1)).times(0.5), scores


def _centred(Z: Array, real: Array, mean: Wide) -> Array:
    return real[:, None] * ((Z.astype(jnp.float32) - mean.high) - mean.low)
