"""Full-precision matrix products, and orthonormal bases of a few columns."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

TINY = 1e-30
ACCURATE = 1e-5  # of the entries of B^T B - I
SHIFT = 1e-4  # relative to the squared column lengths, which are one


def orthonormal(columns: Float[Array, "D R"]) -> Float[Array, "D R"]:
    """Returns an orthonormal basis of the span of the columns.

    Shifted Cholesky QR: unlike Householder QR it needs only a few products with the columns, which
    is fast on every device and on a busy machine. If the columns are numerically dependent it
    fails, which shows in its result; Householder QR then takes over.

    Args:
        columns: float[D, R], R <= D.

    Returns:
        B[D, R] with B^T B = I.

    Source: Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of
    ill-conditioned matrices", 2020.
    """

    def good(basis: Array) -> Array:
        return _small(matmul(basis.T, basis) - jnp.eye(basis.shape[1], dtype=basis.dtype))

    return _rounds(_unit(columns), _by_cholesky, good, lambda: jnp.linalg.qr(columns)[0])


def complement(basis: Float[Array, "D W"], columns: Float[Array, "D R"]) -> Float[Array, "D R"]:
    """Returns C[D, R] that extends an orthonormal basis to the span of the basis and the columns.

    Uses the method of `orthonormal`. Columns that lie in the span of the basis are replaced by
    others.

    Args:
        basis: float[D, W], orthonormal; some columns may be zero.
        columns: float[D, R], W + R <= D.

    Returns:
        C[D, R] with C^T C = I and B^T C = 0.
    """

    def in_basis(found: Array) -> Array:
        # As sums of rows: a CPU takes four times as long for the product with basis^T.
        return weighted_sums(found.T, basis).T

    def off_basis(found: Array) -> Array:
        return _unit(found - matmul(basis, in_basis(found)))

    def better(found: Array, shift: float) -> Array:
        return _by_cholesky(off_basis(found), shift)

    def good(found: Array) -> Array:
        straight = _small(matmul(found.T, found) - jnp.eye(found.shape[1], dtype=found.dtype))
        return straight & _small(in_basis(found))

    def by_householder() -> Array:
        # Twice: the first time leaves what rounding adds to columns that hardly leave the basis.
        both = jnp.concatenate([basis, off_basis(off_basis(columns))], axis=1)
        # For a zero column of the basis, QR would take a direction from the columns: it comes last.
        W, is_zero = basis.shape[1], ~jnp.any(basis, axis=0)
        order = jnp.argsort(jnp.append(2 * is_zero, jnp.ones(len(columns.T), int)), stable=True)
        turned = jnp.linalg.qr(both[:, order])[0]
        start = W - jnp.sum(is_zero)
        return jax.lax.dynamic_slice_in_dim(turned, start, columns.shape[1], axis=1)

    return _rounds(columns, better, good, by_householder)


def _rounds(
    columns: Float[Array, "D R"],
    better: Callable[[Array, float], Array],
    good: Callable[[Array], Array],
    otherwise: Callable[[], Array],
) -> Float[Array, "D R"]:
    """Runs two rounds of Cholesky QR, a third if needed, and falls back to `otherwise`."""
    # The shift keeps the first Gram matrix positive definite; the unshifted round corrects for it.
    found = better(better(columns, SHIFT), 0.0)
    found = jax.lax.cond(good(found), lambda: found, lambda: better(found, 0.0))
    return jax.lax.cond(good(found), lambda: found, otherwise)


def _unit(columns: Float[Array, "D R"]) -> Float[Array, "D R"]:
    return columns / jnp.maximum(jnp.linalg.norm(columns, axis=0), TINY)


def _small(errors: Float[Array, "R C"]) -> Bool[Array, ""]:
    # Compares each entry by itself: a maximum may skip NaN.
    return jnp.all(jnp.abs(errors) < ACCURATE)


def _by_cholesky(columns: Float[Array, "D R"], shift: float) -> Float[Array, "D R"]:
    identity = jnp.eye(columns.shape[1], dtype=columns.dtype)
    factor = jnp.linalg.cholesky(matmul(columns.T, columns) + shift * identity)
    return matmul(columns, jax.scipy.linalg.solve_triangular(factor, identity, lower=True).T)


# With up to FEW rows in the thin matrix and at least WIDE columns in Z, a CPU multiplies faster if
# each sample's numbers are contiguous: [N, K] instead of [K, N]. Measured with XLA's own products
# at K = 8 to 276 and D = 64 to 4096; for a narrow Z, transposing the thin matrix costs more than
# the product.
FEW, WIDE = 64, 2048


def real_dtype(*arrays: Array | np.ndarray) -> Any:
    """Returns the dtype to compute in: float32, or float64 if enabled and given."""
    return jnp.result_type(jnp.float32, *(array.dtype for array in arrays))


def matmul(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `a @ b` in full float32 or wider, whatever the backend's default precision."""
    return jnp.matmul(a, b, precision="highest", preferred_element_type=real_dtype(a, b))


def inner_products(atoms: Float[Array, "K D"], Z: Float[Array, "N D"]) -> Float[Array, "K N"]:
    """Returns `atoms Z^T`."""
    if len(atoms) > FEW or Z.shape[1] < WIDE:
        return matmul(atoms, Z.T)
    # The barrier stops the compiler from rewriting this as the product above for its layout.
    return jax.lax.optimization_barrier(matmul(Z, atoms.T)).T


def weighted_sums(codes: Float[Array, "K N"], Z: Float[Array, "N D"]) -> Float[Array, "K D"]:
    """Returns `codes Z`, the weighted sums of the rows of Z."""
    if len(codes) <= FEW and Z.shape[1] >= WIDE:
        codes = jax.lax.optimization_barrier(codes.T).T
    # The barrier is needed here too: `Z^T codes^T` would take several times as long.
    return jax.lax.optimization_barrier(matmul(codes, Z))
