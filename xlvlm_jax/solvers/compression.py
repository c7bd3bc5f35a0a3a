"""Z in few columns: optimal atoms and centroids lie in the row space of Z, and mostly in its
leading part. A solver iterates there, at N x R instead of N x D, and ends on Z itself.

Randomised range finder with one product with Z^T Z: Halko, Martinsson and Tropp, "Finding structure
with randomness", SIAM Review 2011, section 4.5. N samples, D width, R compressed width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from xlvlm_jax.solvers.loop import matmul, weighted_sums
from xlvlm_jax.solvers.orthonormal import orthonormal
from xlvlm_jax.solvers.rows import ONE_DEVICE, Rows


class Compressed(NamedTuple):
    """Z ~ X basis^T."""

    basis: Float[Array, "D R"]  # orthonormal, the direction of largest energy first
    X: Float[Array, "N R"]  # Z basis


def sketch_directions(key: PRNGKeyArray, D: int, width: int) -> Float[Array, "D R"]:
    """Random directions; all of Z's own where there are no more than `width`."""
    return jax.random.normal(key, (D, width)) if width < D else jnp.eye(D)


def compress(
    Z: Float[Array, "N D"], key: PRNGKeyArray, width: int, rows: Rows = ONE_DEVICE
) -> Compressed:
    """The leading `width` directions of the row space of Z, and Z in them."""
    if width >= Z.shape[1]:
        return turn_to_axes(jnp.eye(Z.shape[1]), Z, rows)
    directions = sketch_directions(key, Z.shape[1], width)
    basis = orthonormal(rows.total(weighted_sums(matmul(Z, directions).T, Z).T))
    return turn_to_axes(basis, matmul(Z, basis), rows)


def turn_to_axes(
    basis: Float[Array, "D R"], X: Float[Array, "N R"], rows: Rows = ONE_DEVICE
) -> Compressed:
    """The same space in principal axes, largest first."""
    axes = jnp.linalg.eigh(rows.total(matmul(X.T, X)))[1][:, ::-1]
    return Compressed(matmul(basis, axes), matmul(X, axes))
