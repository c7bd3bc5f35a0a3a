"""The nearest of many centroids, and the next one, from scores.

K centroids, N rows, C centroids of which scores are compared.
"""

from collections.abc import Callable
from math import isqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

TURN = 16  # scores compared in one pass
HELD = 2**19  # scores of many centroids that a CPU holds at once
MOST = 0.75  # of the centroids: if more have moved, what is kept of all is renewed


class Nearest(NamedTuple):
    """Nearest centroid of each row; ties go to the first."""

    labels: Int[Array, " N"]
    least: Float[Array, " N"]  # the scores of those centroids
    second: Float[Array, " N"]  # lowest score of any other centroid; Inf if there is none

    @classmethod
    def none(cls, count: int, dtype: DTypeLike) -> "Nearest":
        """Returns the result of some rows for no centroids."""
        inf = jnp.full(count, jnp.inf, dtype)
        return cls(jnp.zeros(count, jnp.int32), inf, inf)


def nearest(scores: Float[Array, "K N"]) -> Nearest:
    """Returns the centroid of lowest score for each row, that score, and the second lowest."""

    def in_one(scores: Array) -> Nearest:
        labels = jnp.argmin(scores, axis=0).astype(jnp.int32)
        others = jnp.where(jnp.arange(len(scores))[:, None] == labels, jnp.inf, scores)
        return Nearest(labels, jnp.min(scores, axis=0), jnp.min(others, axis=0))

    def in_turn(scores: Array) -> Nearest:
        return compare(scores, Nearest.none(scores.shape[1], scores.dtype))

    # A CPU reduces along the first axis five times slower than it compares rows.
    return jax.lax.platform_dependent(scores, cpu=in_turn, default=in_one)


def compare(
    scores: Float[Array, "C N"],
    best: Nearest,
    numbers: Int[Array, " C"] | None = None,
    own: Int[Array, " N"] | None = None,
) -> Nearest:
    """Compares scores with the best so far, some centroids at a time.

    Args:
        scores: float[C, N].
        best: the nearest of other centroids.
        numbers: int[C], the centroids that have these scores; None for 0 to C - 1.
        own: int[N], a centroid of each row that is left out; None for none.

    Returns:
        The nearest of all.
    """
    C = len(scores)

    def several(first: Array | int, count: int, best: Nearest) -> Nearest:
        rows = jax.lax.dynamic_slice_in_dim(scores, first, count)
        of = None if numbers is None else jax.lax.dynamic_slice_in_dim(numbers, first, count)
        # Labels are int32 in 64-bit mode too.
        of = jnp.asarray(first + jnp.arange(count), jnp.int32) if of is None else of
        masked = [
            rows[i] if own is None else jnp.where(of[i] == own, jnp.inf, rows[i])
            for i in range(count)
        ]
        return _in_turn(masked, of, best)

    whole = C // TURN
    if whole:
        best = jax.lax.fori_loop(0, whole, lambda i, best: several(i * TURN, TURN, best), best)
    return several(whole * TURN, C % TURN, best) if C % TURN else best


def compare_square(
    scores: Float[Array, "C N"],
    best: Nearest,
    numbers: Int[Array, " C"],
    own: Int[Array, " N"] | None = None,
) -> Nearest:
    """Does what `compare` does, faster on a CPU if C is a square: with ties, to any of them.

    In a square of the scores, rows and columns have their least, which takes few long loops. The
    least of all is where the least row and the least column meet. The second is in another row or
    in another column, whose least it then is.

    Args:
        scores: float[C, N].
        best: the nearest of other centroids.
        numbers: int[C], the centroids that have these scores.
        own: int[N], a centroid of each row that is left out; None for none.

    Returns:
        The nearest of all.
    """
    side = 1 << isqrt(len(scores)).bit_length() - 1
    square, of = scores.reshape(side, -1, scores.shape[1]), numbers.reshape(side, -1)

    def least_of(square: Array, of: Array) -> Array:
        parts = [
            square[:, i] if own is None else jnp.where(of[:, i, None] == own, jnp.inf, square[:, i])
            for i in range(square.shape[1])
        ]
        return _pairwise(jnp.minimum, parts)

    def two_least(values: Array) -> Nearest:
        start = Nearest.none(values.shape[1], values.dtype)
        return _in_turn(list(values), range(len(values)), start)

    leasts = least_of(square, of), least_of(square.swapaxes(0, 1), of.T)
    of_rows, of_columns = (two_least(values) for values in jax.lax.optimization_barrier(leasts))
    label = numbers[of_rows.labels * square.shape[1] + of_columns.labels]
    nearer = of_rows.least < best.least
    # NaN is not below anything; it is the least of its row and of its column.
    second = jnp.minimum(of_rows.second, of_columns.second)
    return Nearest(
        jnp.where(nearer, label, best.labels),
        jnp.where(nearer, of_rows.least, best.least),
        jnp.minimum(jnp.minimum(best.second, second), jnp.maximum(best.least, of_rows.least)),
    )


def _in_turn(scores: list[Array], numbers: Any, best: Nearest) -> Nearest:
    labels, least, second = best
    for score, label in zip(scores, numbers, strict=True):
        nearer = score < least
        labels = jnp.where(nearer, label, labels)
        second = jnp.minimum(second, jnp.maximum(least, score))
        least = jnp.where(nearer, score, least)
    return Nearest(labels, least, second)


def _pairwise(operation: Callable[[Array, Array], Array], parts: list[Array]) -> Array:
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        parts = [operation(*pair) for pair in pairs] + parts[len(parts) // 2 * 2 :]
    return parts[0]


def least_of_each(values: Float[Array, "C N"]) -> Float[Array, " C"]:
    """Returns the least of each row, which a CPU finds in vectors if N is a power of two."""
    while values.shape[1] % 2 == 0 and values.shape[1] > TURN:
        half = values.shape[1] // 2
        values = jnp.minimum(values[:, :half], values[:, half:])
    values = jax.lax.optimization_barrier(values)
    return _pairwise(jnp.minimum, list(values.T))
