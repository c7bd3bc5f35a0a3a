"""An orthonormal basis of a few columns, in matrix products alone where that is accurate."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xlvlm_jax.solvers.loop import matmul

TINY = 1e-30
ACCURATE = 1e-5  # of the entries of B^T B - 1


def orthonormal(columns: Float[Array, "D R"]) -> Float[Array, "D R"]:
    """B[D, R] with B^T B = 1, whose columns span those of the given ones.

    Cholesky QR, twice (Yamamoto et al., "Roundoff error analysis of the CholeskyQR2 algorithm",
    2015): unlike Householder's it is two products with the columns, fast on every device and on a
    busy machine. It needs columns that are not nearly dependent; where they are, which its result
    shows, Householder's does the work.
    """
    lengths = jnp.linalg.norm(columns, axis=0)
    basis = _by_cholesky(_by_cholesky(columns / jnp.maximum(lengths, TINY)))
    error = jnp.abs(matmul(basis.T, basis) - jnp.eye(basis.shape[1])).max()
    # Not a number where a Gram matrix was not positive: no comparison with it holds.
    return jax.lax.cond(error < ACCURATE, lambda: basis, lambda: jnp.linalg.qr(columns)[0])


def _by_cholesky(columns: Float[Array, "D R"]) -> Float[Array, "D R"]:
    factor = jnp.linalg.cholesky(matmul(columns.T, columns))
    identity = jnp.eye(factor.shape[0])
    return matmul(columns, jax.scipy.linalg.solve_triangular(factor, identity, lower=True).T)
