"""A value that parts the k largest from the rest, of arrays that may be spread over devices.

`jax.lax.top_k` sorts, and needs a whole row on one device; on a CPU it takes several times as long
as all products of an update. Here the value is bisected in the order of the floats' bits: some
twenty counts of the entries that are at least as large as a candidate. A count is a sum, so on a
mesh each is one small collective.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

_SIGNLESS = np.int32(2**31 - 1)
# XLA's CPU compiler adds along the last axis one number at a time, along the one before it many.
_LANES = 64


def cut_above(
    values: Float[Array, "B K"], k: int, *, of_all: bool = False
) -> Float[Array, "B 1"] | Float[Array, "1 1"]:
    """Returns t such that the k largest values are t or more, and no others.

    Values that equal the k-th largest are all t or more. Has no gradient.

    Args:
        values: float32[B, K], without NaN.
        k: from 1 to the number of values.
        of_all: whether the largest of the whole array are meant, not those of each row.

    Returns:
        float32[B, 1], or [1, 1] for the whole array.
    """
    ordered = _ordered(jax.lax.stop_gradient(values))
    lanes = _in_lanes(ordered)
    largest = jnp.max(lanes, axis=1)  # of each lane
    high, low = largest.max(axis=1, keepdims=True), jnp.min(ordered, axis=1, keepdims=True)
    if of_all:
        high, low = high.max(keepdims=True), low.min(keepdims=True)
    elif k <= lanes.shape[2]:
        # Every lane has a value of at least the smallest of the lanes' largest.
        low = largest.min(axis=1, keepdims=True)

    def unfinished(ends: tuple[Array, Array]) -> Array:
        return jnp.any(ends[0] < ends[1])

    def halve(ends: tuple[Array, Array]) -> tuple[Array, Array]:
        # At least k values are `low` or more; at most k are more than `high`.
        low, high = ends
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up, without overflow
        count = _count(lanes >= middle[:, :, None], of_all)
        narrowed = jnp.where(count == k, middle, jnp.where(count > k, high, middle - 1))
        return jnp.where(count >= k, middle, low), narrowed

    low, _ = jax.lax.while_loop(unfinished, halve, (low, high))
    return jax.lax.bitcast_convert_type(_flipped(low), jnp.float32)


def _in_lanes(ordered: Int32[Array, "B K"]) -> Int32[Array, "B P L"]:
    B, K = ordered.shape
    lanes = _LANES if jax.default_backend() == "cpu" and K % _LANES == 0 else 1
    return ordered.reshape(B, K // lanes, lanes)


def _count(which: Bool[Array, "B P L"], of_all: bool) -> Int32[Array, "..."]:
    """Returns the number of marked values per row, or in all."""
    counts = jnp.sum(which, axis=1, dtype=jnp.int32)
    if counts.shape[1] > 1:
        counts = jax.lax.optimization_barrier(counts)  # else both sums become one, along the last
    return jnp.sum(counts, axis=(0, 1) if of_all else 1, keepdims=True, dtype=jnp.int32)


def _ordered(values: Float[Array, "B K"]) -> Int32[Array, "B K"]:
    """Returns integers in the order of the values."""
    return _flipped(jax.lax.bitcast_convert_type(values + 0.0, jnp.int32))  # -0 as 0


def _flipped(bits: Any) -> Any:
    """Inverts the order of the bits of negative floats, or inverts that again."""
    return bits ^ ((bits >> 31) & _SIGNLESS)
