"""Matrix products in float32, or of bfloat16 factors with float32 sums, and their derivatives."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xlvlm_jax.solvers.linalg import matmul

PRODUCTS = ("float32", "bfloat16")


def product(
    a: Float[Array, "M N"], b: Float[Array, "N P"], factors: str = "float32"
) -> Float[Array, "M P"]:
    """Returns `a @ b`, in float32.

    Args:
        a: float32[M, N].
        b: float32[N, P].
        factors: "float32", or "bfloat16", to which the factors of this product and of those of its
            derivative are rounded. Their sums stay float32. Fast on accelerators; a CPU has no
            such units and is slower for it.
    """
    found: Any = _product(a, b, factors)  # the checker does not know what custom_vjp returns
    return found


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(a: Array, b: Array, factors: str) -> Array:
    if factors == "float32":
        return matmul(a, b)
    rounded = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.matmul(*rounded, preferred_element_type=jnp.float32)


def _forward(a: Array, b: Array, factors: str) -> tuple[Array, tuple[Array, Array]]:
    return _product(a, b, factors), (a, b)


def _backward(factors: str, kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    # By itself JAX would round the derivatives to the factors' type.
    a, b = kept
    return product(g, b.T, factors), of_columns(a, g, factors)


def of_columns(
    a: Float[Array, "M N"], g: Float[Array, "M P"], factors: str = "float32"
) -> Float[Array, "N P"]:
    """Returns `a^T @ g`."""
    if a.shape[1] <= g.shape[1]:
        return product(a.T, g, factors)
    # A CPU takes half as long again with the wider factor transposed. The barrier keeps the
    # compiler from undoing this.
    small: Any = jax.lax.optimization_barrier(product(g.T, a, factors))
    return small.T


_product.defvjp(_forward, _backward)
