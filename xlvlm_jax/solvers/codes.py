"""Sparse codes on fixed atoms, a lasso for each sample:

    minimise   1/2 u G u - u (p - alpha)   over u >= 0,       G = V V^T,  p = V z
    or         1/2 u G u - u p + alpha |u|_1                  where codes may have any sign

for all samples at once. Up to DESCENT atoms by coordinate descent (exact in one coordinate of all
samples after the other); beyond, where its matrix-vector products are slower than matrix products,
by accelerated projected gradient with a restart for each sample (Beck and Teboulle, FISTA, 2009;
O'Donoghue and Candes, "Adaptive restart for accelerated gradient schemes", 2015).

Codes are [K, N] and not [N, K]: a coordinate's values are then contiguous.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xlvlm_jax.solvers.loop import matmul

DESCENT = 128
GRADIENT_STEPS = 3  # of the accelerated method, for one sweep of the other
POWER_STEPS = 12
SAFETY = 1.05  # the power method comes to the largest eigenvalue from below
TINY = 1e-30


def improve(
    codes: Float[Array, "K N"],
    products: Float[Array, "K N"],
    gram: Float[Array, "K K"],
    alpha: Float[Array, ""] | float,
    sweeps: int,
    nonnegative: bool = True,
) -> Float[Array, "K N"]:
    """Better codes, from given ones; `products` are V Z^T."""
    if gram.shape[0] <= DESCENT:
        return _descend(codes, products, gram, alpha, sweeps, nonnegative)
    return _accelerate(codes, products, gram, alpha, GRADIENT_STEPS * sweeps, nonnegative)


def encode(
    products: Float[Array, "K N"],
    gram: Float[Array, "K K"],
    alpha: Float[Array, ""] | float,
    codes: Float[Array, "K N"] | None = None,
    *,
    nonnegative: bool = True,
    tol: float = 1e-7,
    max_sweeps: int = 1000,
) -> Float[Array, "K N"]:
    """The best codes: until none moves by more than `tol` times the largest of all."""

    def unfinished(carry: tuple) -> Array:
        _, change, sweeps = carry
        return (change > tol) & (sweeps < max_sweeps)

    def step(carry: tuple) -> tuple:
        old, _, sweeps = carry
        new = improve(old, products, gram, alpha, 1, nonnegative)
        largest = jnp.max(jnp.abs(new), initial=TINY)
        change = jnp.max(jnp.abs(new - old), initial=0) / largest
        return new, change, sweeps + 1

    codes = jnp.zeros_like(products) if codes is None else codes
    start = (codes, jnp.float32(jnp.inf), jnp.int32(0))
    return jax.lax.while_loop(unfinished, step, start)[0]


def shrink(
    x: Float[Array, "..."], threshold: Float[Array, "..."] | float, nonnegative: bool
) -> Float[Array, "..."]:
    """The proximal map of threshold |x|_1, within x >= 0 where codes may not be negative."""
    if nonnegative:
        return jnp.maximum(x - threshold, 0)
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - threshold, 0)


def _descend(
    codes: Float[Array, "K N"],
    products: Float[Array, "K N"],
    gram: Float[Array, "K K"],
    alpha: Float[Array, ""] | float,
    sweeps: int,
    nonnegative: bool,
) -> Float[Array, "K N"]:
    K = gram.shape[0]

    def coordinate(i: Array, codes: Array) -> Array:
        k = i % K
        curvature = jnp.maximum(gram[k, k], TINY)
        best = codes[k] + (products[k] - matmul(gram[k], codes)) / curvature
        best = shrink(best, alpha / curvature, nonnegative)
        return codes.at[k].set(jnp.where(gram[k, k] > 0, best, 0))

    return jax.lax.fori_loop(0, sweeps * K, coordinate, codes)


def _accelerate(
    codes: Float[Array, "K N"],
    products: Float[Array, "K N"],
    gram: Float[Array, "K K"],
    alpha: Float[Array, ""] | float,
    steps: int,
    nonnegative: bool,
) -> Float[Array, "K N"]:
    bound = jnp.maximum(_largest_eigenvalue(gram), TINY)
    used = (jnp.diagonal(gram) > 0)[:, None]

    def step(_: Array, carry: tuple) -> tuple:
        codes, ahead, momentum = carry
        new = ahead - (matmul(gram, ahead) - products) / bound
        new = jnp.where(used, shrink(new, alpha / bound, nonnegative), 0)
        # A sample whose last step went uphill starts again without momentum.
        uphill = jnp.sum((ahead - new) * (new - codes), axis=0) > 0
        following = jnp.where(uphill, 1, (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2)
        weight = jnp.where(uphill, 0, (momentum - 1) / following)
        return new, new + weight * (new - codes), following

    start = (codes, codes, jnp.ones(codes.shape[1]))
    return jax.lax.fori_loop(0, steps, step, start)[0]


def _largest_eigenvalue(gram: Float[Array, "K K"]) -> Float[Array, ""]:
    """By the power method, slightly enlarged."""

    def step(_: Array, v: Array) -> Array:
        v = matmul(gram, v)
        return v / jnp.maximum(jnp.linalg.norm(v), TINY)

    # The sum of a row's absolute values has a part in every direction that matters.
    start = jnp.sum(jnp.abs(gram), axis=1)
    v = jax.lax.fori_loop(0, POWER_STEPS, step, start / jnp.maximum(jnp.linalg.norm(start), TINY))
    return SAFETY * jnp.linalg.norm(matmul(gram, v))
