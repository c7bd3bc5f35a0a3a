"""Sparse codes on fixed atoms, a lasso per sample:

    minimise   1/2 u G u - u (p - alpha)   over u >= 0,       G = V V^T,  p = V z
    or         1/2 u G u - u p + alpha |u|_1                  if codes may have any sign

for all samples at once. An update improves them by coordinate descent: it computes the gradients of
a few atoms in one product, then minimises exactly over one coordinate of all samples after another.
Optimal codes come from repeating this if there are up to DESCENT atoms. With more atoms they come
from accelerated projected gradient with a restart per sample, which takes fewer products (Beck and
Teboulle, FISTA, 2009; O'Donoghue and Candes, "Adaptive restart for accelerated gradient schemes",
2015).

Codes are [K, N] rather than [N, K], so that the values of a coordinate are contiguous.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xlvlm_jax.solvers.linalg import matmul

DESCENT = 128
# Atoms whose gradients share one product: with more than FEW atoms that is twice as fast on a CPU
# as atom by atom.
FEW, BLOCK = 32, 8
# If atoms hardly differ, many codes are equally good and a run never settles.
MAX_STEPS, MAX_GRADIENT_STEPS = 500, 300
FIRST_SPAN = 4  # steps before the codes are first measured from where they are
PER_STEP = 2  # sweeps: for few atoms, whether a code moved takes as long to see as a sweep
STILL = 1e-7
POWER_STEPS = 12
SAFETY = 1.05  # the power method approaches the largest eigenvalue from below
RIDGE = 1e-6  # relative to the longest atom's square
SOLVED = 256  # samples whose [K, K] systems are solved together in a derivative
# Samples that are encoded together, until none of them moves: few enough that their codes stay in a
# CPU's cache, and that a slow sample keeps few others at work. An accelerator runs few large steps
# faster than many small ones, so there all samples go together.
TOGETHER = 4096
TINY = 1e-30


def improve(
    codes: Float[Array, "K N"],
    products: Float[Array, "K N"],
    gram: Float[Array, "K K"],
    alpha: Float[Array, ""] | float,
    sweeps: int,
    nonnegative: bool = True,
    base: Float[Array, "K N"] | None = None,
) -> Float[Array, "K N"]:
    """Returns improved codes: each is set `sweeps` times.

    Args:
        codes: float[K, N], the codes, or by how much they differ from `base`.
        products: float[K, N], V Z^T; with a base, V (Z - base^T V)^T.
        gram: float[K, K], V V^T.
        alpha: weight of the l1 penalty.
        sweeps: number of times that each code is set.
        nonnegative: whether codes must be >= 0.
        base: float[K, N], what the codes are measured from; None for zeros. Rounding is relative to
            the differences, so that codes that are far from zero come to rest.
    """
    K = gram.shape[0]
    size = BLOCK if K > FEW else 1
    blocks = -(-K // size)

    def block(i: Array, codes: Array) -> Array:
        first = jnp.minimum((i % blocks) * size, K - size)  # the last block overlaps
        rows, given = (jax.lax.dynamic_slice_in_dim(x, first, size) for x in (gram, products))
        within = jax.lax.dynamic_slice_in_dim(rows, first, size, axis=1)
        old = jax.lax.dynamic_slice_in_dim(codes, first, size)
        gradients = given - matmul(rows, codes)
        new: list[Array] = []
        for j in range(size):
            gradient = gradients[j]
            for k in range(j):
                gradient = gradient - within[j, k] * (new[k] - old[k])
            curvature = jnp.maximum(within[j, j], TINY)
            step, threshold = old[j] + gradient / curvature, alpha / curvature
            if base is None:
                best, zero = shrink(step, threshold, nonnegative), 0
            else:
                zero = -jax.lax.dynamic_index_in_dim(base, first + j, keepdims=False)
                best = _shrink_to(zero, step, threshold, nonnegative)
            new.append(jnp.where(within[j, j] > 0, best, zero))
        return jax.lax.dynamic_update_slice_in_dim(codes, jnp.stack(new), first, 0)

    return jax.lax.fori_loop(0, sweeps * blocks, block, codes)


def encode(
    products: Float[Array, "K N"],
    gram: Float[Array, "K K"],
    alpha: Float[Array, ""] | float,
    codes: Float[Array, "K N"] | None = None,
    *,
    nonnegative: bool = True,
) -> Float[Array, "K N"]:
    """Returns the optimal codes: iterates until no step moves one by STILL times the largest.

    On a CPU the largest is that of TOGETHER samples.

    Differentiable in everything except the initial codes: at the optimal codes U of the atoms S
    that are used, G_SS U_S = P_S - alpha sign(U_S), which is differentiated directly.

    Args:
        products: float[K, N], V Z^T.
        gram: float[K, K], V V^T.
        alpha: weight of the l1 penalty.
        codes: float[K, N] to start from; None for zeros.
        nonnegative: whether codes must be >= 0.
    """
    codes = jnp.zeros_like(products) if codes is None else codes
    alpha = jnp.asarray(alpha, products.dtype)
    return _encode(products, gram, alpha, codes, nonnegative)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _encode(
    products: Float[Array, "K N"],
    gram: Float[Array, "K K"],
    alpha: Float[Array, ""],
    codes: Float[Array, "K N"],
    nonnegative: bool,
) -> Float[Array, "K N"]:
    N = codes.shape[1]
    if N <= TOGETHER or jax.default_backend() != "cpu":
        return _encode_together(products, gram, alpha, codes, nonnegative)

    def block(i: Array, codes: Array) -> Array:
        first = jnp.minimum(i * TOGETHER, N - TOGETHER)  # the last block reaches back
        given, start = (
            jax.lax.dynamic_slice_in_dim(x, first, TOGETHER, axis=1) for x in (products, codes)
        )
        found = _encode_together(given, gram, alpha, start, nonnegative)
        return jax.lax.dynamic_update_slice_in_dim(codes, found, first, 1)

    return jax.lax.fori_loop(0, -(-N // TOGETHER), block, codes)


def _encode_together(
    products: Float[Array, "K N"],
    gram: Float[Array, "K K"],
    alpha: Float[Array, ""],
    codes: Float[Array, "K N"],
    nonnegative: bool,
) -> Float[Array, "K N"]:
    if gram.shape[0] <= DESCENT:
        return _descend(products, gram, alpha, codes, nonnegative)
    step = _accelerated_step(products, gram, alpha, nonnegative)
    begun = _started(_standing(codes), codes.dtype)
    return _until_still(step, lambda run: run.codes, begun, MAX_GRADIENT_STEPS)[0].codes


def _descend(
    products: Float[Array, "K N"],
    gram: Float[Array, "K K"],
    alpha: Float[Array, ""],
    codes: Float[Array, "K N"],
    nonnegative: bool,
) -> Float[Array, "K N"]:
    """Runs coordinate descent in spans, each twice as long as all before it.

    A span measures codes from where it starts: gradients of long codes are rounded to more than
    STILL, and computed from the codes themselves they keep ill-conditioned ones moving for ever.
    """

    def span(run: _Run) -> _Run:
        base, left = run.at, products - matmul(gram, run.at)
        found = _until_still(
            lambda moved: improve(moved, left, gram, alpha, PER_STEP, nonnegative, base),
            lambda moved: base + moved,
            run._replace(at=jnp.zeros_like(base)),
            jnp.minimum(jnp.maximum(2 * run.steps, FIRST_SPAN), MAX_STEPS),
        )
        return found._replace(at=base + found.at)

    def unfinished(run: _Run) -> Array:
        return (run.change > STILL) & (run.steps < MAX_STEPS)

    return jax.lax.while_loop(unfinished, span, _started(codes, codes.dtype)).at


def _encode_forward(
    products: Array, gram: Array, alpha: Array, codes: Array, nonnegative: bool
) -> tuple[Array, tuple[Array, Array]]:
    found: Any = _encode(products, gram, alpha, codes, nonnegative)
    return found, (found, gram)


def _encode_backward(_: bool, kept: tuple[Array, Array], change: Array) -> tuple[Array, ...]:
    codes, gram = kept
    K = len(gram)
    # Nearly identical atoms leave the difference of their codes undetermined.
    ridge = RIDGE * jnp.max(jnp.diagonal(gram)) * jnp.eye(K, dtype=gram.dtype)

    def solve(sample: tuple[Array, Array]) -> Array:
        used, change = sample
        both = used[:, None] & used[None, :]
        system = jnp.where(both, gram + ridge, jnp.eye(K, dtype=gram.dtype))
        return jnp.linalg.solve(system, jnp.where(used, change, 0))

    samples = (codes.T != 0, change.T)
    adjoint = jax.lax.map(solve, samples, batch_size=SOLVED).T
    of_gram = -matmul(adjoint, codes.T)
    return adjoint, of_gram, -jnp.sum(adjoint * jnp.sign(codes)), jnp.zeros_like(codes)


_encode.defvjp(_encode_forward, _encode_backward)


class _Run(NamedTuple):
    """Codes on their way, whatever they are kept as."""

    at: Any
    change: Float[Array, ""]  # largest of the last step, relative to the largest code
    steps: Int[Array, ""]


def _started(at: Any, dtype: Any) -> _Run:
    return _Run(at, jnp.full((), jnp.inf, dtype), jnp.int32(0))


def _until_still(
    step: Callable[[Any], Any], codes_of: Callable[[Any], Array], begun: _Run, max_steps: Any
) -> _Run:
    def unfinished(run: _Run) -> Array:
        return (run.change > STILL) & (run.steps < max_steps)

    def one(run: _Run) -> _Run:
        new = step(run.at)
        largest = jnp.max(jnp.abs(codes_of(new)), initial=TINY)
        change = jnp.max(jnp.abs(codes_of(new) - codes_of(run.at)), initial=0) / largest
        return _Run(new, change, run.steps + 1)

    return jax.lax.while_loop(unfinished, one, begun)


def shrink(
    x: Float[Array, "..."], threshold: Float[Array, "..."] | float, nonnegative: bool
) -> Float[Array, "..."]:
    """Returns the proximal map of threshold |x|_1, restricted to x >= 0 if `nonnegative`."""
    if nonnegative:
        return jnp.maximum(x - threshold, 0)
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - threshold, 0)


def _shrink_to(zero: Array, x: Array, threshold: Array, nonnegative: bool) -> Array:
    """Returns shrink(x - zero) + zero without rounding to the digits of `zero`."""
    above = jnp.maximum(x - threshold, zero)
    return above if nonnegative else jnp.where(x < zero, jnp.minimum(x + threshold, zero), above)


class Accelerated(NamedTuple):
    """State of the accelerated method."""

    codes: Float[Array, "K N"]
    ahead: Float[Array, "K N"]  # where the next step starts
    momentum: Float[Array, " N"]  # Nesterov's t; 1 means that the next step is a plain one


def _standing(codes: Float[Array, "K N"]) -> Accelerated:
    return Accelerated(codes, codes, jnp.ones(codes.shape[1], codes.dtype))


def _accelerated_step(
    products: Float[Array, "K N"],
    gram: Float[Array, "K K"],
    alpha: Float[Array, ""] | float,
    nonnegative: bool,
) -> Callable[[Accelerated], Accelerated]:
    bound = jnp.maximum(_largest_eigenvalue(gram), TINY)
    used = (jnp.diagonal(gram) > 0)[:, None]

    def step(run: Accelerated) -> Accelerated:
        codes, ahead, momentum = run
        new = ahead - (matmul(gram, ahead) - products) / bound
        new = jnp.where(used, shrink(new, alpha / bound, nonnegative), 0)
        # A sample whose last step went uphill restarts without momentum.
        uphill = jnp.sum((ahead - new) * (new - codes), axis=0) > 0
        following = jnp.where(uphill, 1, (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2)
        weight = jnp.where(uphill, 0, (momentum - 1) / following)
        return Accelerated(new, new + weight * (new - codes), following)

    return step


def _largest_eigenvalue(gram: Float[Array, "K K"]) -> Float[Array, ""]:
    """Returns the result of the power method, slightly enlarged."""

    def step(_: Array, v: Array) -> Array:
        v = matmul(gram, v)
        return v / jnp.maximum(jnp.linalg.norm(v), TINY)

    # The row sums of absolute values have a component in every direction that matters.
    start = jnp.sum(jnp.abs(gram), axis=1)
    v = jax.lax.fori_loop(0, POWER_STEPS, step, start / jnp.maximum(jnp.linalg.norm(start), TINY))
    return SAFETY * jnp.linalg.norm(matmul(gram, v))
