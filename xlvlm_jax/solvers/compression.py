"""Z in few columns: optimal atoms and centroids lie in the row space of Z, and mostly in its
leading part. A solver iterates there, at N x R instead of N x D, and ends on Z itself.

Randomised range finder with one product with Z^T Z: Halko, Martinsson and Tropp, "Finding structure
with randomness", SIAM Review 2011, section 4.5. It takes three passes over Z, or one where a sample
of the rows stands for all of them. N samples, D width, R compressed width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from xlvlm_jax.solvers.loop import matmul, weighted_sums
from xlvlm_jax.solvers.orthonormal import orthonormal
from xlvlm_jax.solvers.restarts import draw_rows
from xlvlm_jax.solvers.rows import ONE_DEVICE, Rows

SAMPLE = 12  # rows of a sample, for each direction


class Compressed(NamedTuple):
    """Z ~ X basis^T."""

    basis: Float[Array, "D R"]  # orthonormal
    X: Float[Array, "N R"]  # Z basis


def sketch_directions(key: PRNGKeyArray, D: int, width: int) -> Float[Array, "D R"]:
    """Random directions; all of Z's own where there are no more than `width`."""
    return jax.random.normal(key, (D, width)) if width < D else jnp.eye(D)


def compress(
    Z: Float[Array, "N D"], key: PRNGKeyArray, width: int, rows: Rows = ONE_DEVICE
) -> Compressed:
    """The leading `width` directions of the row space of Z, in no order, and Z in them."""
    if width >= Z.shape[1]:
        return Compressed(jnp.eye(Z.shape[1]), Z.astype(jnp.float32))
    directions = sketch_directions(key, Z.shape[1], width)
    basis = orthonormal(rows.total(weighted_sums(matmul(Z, directions).T, Z).T))
    return Compressed(basis, matmul(Z, basis))


def compress_by_sample(
    Z: Float[Array, "N D"],
    key: PRNGKeyArray,
    width: int,
    num_samples: int,
    rows: Rows = ONE_DEVICE,
) -> Compressed:
    """As `compress`, with directions that lead in a sample of the first `num_samples` rows."""
    basis = directions_of_sample(Z, key, width, SAMPLE * width, num_samples, rows)
    return Compressed(basis, matmul(Z, basis))


def directions_of_sample(
    Z: Float[Array, "N D"],
    key: PRNGKeyArray,
    width: int,
    count: int,
    num_samples: int,
    rows: Rows = ONE_DEVICE,
    mean: Float[Array, " D"] | float = 0.0,
) -> Float[Array, "D R"]:
    """About the leading directions of `count` rows less the mean; orthonormal."""
    row_key, weight_key = jax.random.split(key)
    X = rows.take(Z, draw_rows(row_key, num_samples, count)) - mean
    drawn = orthonormal(matmul(X.T, jax.random.normal(weight_key, (len(X), width))))
    return orthonormal(weighted_sums(matmul(X, drawn).T, X).T)


def turn_to_axes(compressed: Compressed, rows: Rows = ONE_DEVICE) -> Compressed:
    """The same space in principal axes, the direction of largest energy first."""
    basis, X = compressed
    axes = jnp.linalg.eigh(rows.total(matmul(X.T, X)))[1][:, ::-1]
    return Compressed(matmul(basis, axes), matmul(X, axes))
