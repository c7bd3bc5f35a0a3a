"""An orthonormal basis of a few columns, in matrix products alone where that is accurate."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from xlvlm_jax.solvers.loop import matmul

TINY = 1e-30
ACCURATE = 1e-5  # of the entries of B^T B - 1
SHIFT = 1e-4  # of the squared lengths of the columns, which are one


def orthonormal(columns: Float[Array, "D R"]) -> Float[Array, "D R"]:
    """B[D, R] with B^T B = 1, whose columns span those of the given ones.

    Shifted Cholesky QR (Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of
    ill-conditioned matrices", 2020): unlike Householder's it is a few products with the columns,
    fast on every device and on a busy machine. Columns that are dependent up to rounding are
    beyond it, which its result shows; there Householder's does the work.
    """

    def good(basis: Array) -> Array:
        return _small(matmul(basis.T, basis) - jnp.eye(basis.shape[1], dtype=basis.dtype))

    return _rounds(_unit(columns), _by_cholesky, good, lambda: jnp.linalg.qr(columns)[0])


def complement(basis: Float[Array, "D W"], columns: Float[Array, "D R"]) -> Float[Array, "D R"]:
    """C[D, R] with [B C]^T [B C] = 1, for an orthonormal B: they span what B and the columns span.

    As `orthonormal`, W + R <= D; where columns lie in the span of B, others take their place.
    """

    def better(found: Array, shift: float) -> Array:
        return _by_cholesky(_unit(found - matmul(basis, matmul(basis.T, found))), shift)

    def good(found: Array) -> Array:
        straight = _small(matmul(found.T, found) - jnp.eye(found.shape[1], dtype=found.dtype))
        return straight & _small(matmul(basis.T, found))

    def by_householder() -> Array:
        both = jnp.concatenate([basis, _unit(columns)], axis=1)
        return jnp.linalg.qr(both)[0][:, basis.shape[1] :]

    return _rounds(columns, better, good, by_householder)


def _rounds(
    columns: Float[Array, "D R"],
    better: Callable[[Array, float], Array],
    good: Callable[[Array], Array],
    otherwise: Callable[[], Array],
) -> Float[Array, "D R"]:
    """Two rounds; a third, and what never fails, where they were not enough."""
    # The shift keeps the first Gram matrix positive, and leaves columns that the others can do.
    found = better(better(columns, SHIFT), 0.0)
    found = jax.lax.cond(good(found), lambda: found, lambda: better(found, 0.0))
    return jax.lax.cond(good(found), lambda: found, otherwise)


def _unit(columns: Float[Array, "D R"]) -> Float[Array, "D R"]:
    return columns / jnp.maximum(jnp.linalg.norm(columns, axis=0), TINY)


def _small(errors: Float[Array, "R C"]) -> Bool[Array, ""]:
    # Each entry by itself: a maximum may pass over what is not a number.
    return jnp.all(jnp.abs(errors) < ACCURATE)


def _by_cholesky(columns: Float[Array, "D R"], shift: float) -> Float[Array, "D R"]:
    identity = jnp.eye(columns.shape[1], dtype=columns.dtype)
    factor = jnp.linalg.cholesky(matmul(columns.T, columns) + shift * identity)
    return matmul(columns, jax.scipy.linalg.solve_triangular(factor, identity, lower=True).T)
