"""Products of matrices in full precision, and orthonormal bases of a few columns."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

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


# Up to FEW rows of a thin matrix, and from WIDE columns of Z on, a CPU multiplies faster with each
# sample's numbers together: [N, K] instead of [K, N]. Measured for XLA's own products at K = 8 to
# 276 and D = 64 to 4096; of narrow Z, turning the thin matrix costs more than the product.
FEW, WIDE = 64, 2048


def real_dtype(*arrays: Array) -> Any:
    """What is computed with: float32, or float64 where that is switched on and given."""
    return jnp.result_type(jnp.float32, *(array.dtype for array in arrays))


def matmul(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """`a @ b` in full float32 or wider, whatever the backend's default precision."""
    return jnp.matmul(a, b, precision="highest", preferred_element_type=real_dtype(a, b))


def inner_products(atoms: Float[Array, "K D"], Z: Float[Array, "N D"]) -> Float[Array, "K N"]:
    """`atoms Z^T`."""
    if len(atoms) > FEW or Z.shape[1] < WIDE:
        return matmul(atoms, Z.T)
    # The barrier keeps the compiler from turning it back into that product, for a layout's sake.
    return jax.lax.optimization_barrier(matmul(Z, atoms.T)).T


def weighted_sums(codes: Float[Array, "K N"], Z: Float[Array, "N D"]) -> Float[Array, "K D"]:
    """`codes Z`: the rows of Z added up with weights."""
    if len(codes) <= FEW and Z.shape[1] >= WIDE:
        codes = jax.lax.optimization_barrier(codes.T).T
    # As above: `Z^T codes^T` would take several times as long.
    return jax.lax.optimization_barrier(matmul(codes, Z))
