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


class Candidates(NamedTuple):
    """Centroids of the lowest bounds of each row, in ascending order."""

    labels: tuple[Int[Array, " N"], ...]
    bounds: tuple[Float[Array, " N"], ...]  # Inf where there are fewer
    rest: Float[Array, " N"]  # lowest bound of all other centroids

    @classmethod
    def none(cls, most: int, count: int, dtype: DTypeLike) -> "Candidates":
        """Returns no candidates, of at most so many, for some rows."""
        inf = jnp.full(count, jnp.inf, dtype)
        return cls((jnp.zeros(count, jnp.int32),) * most, (inf,) * most, inf)


def compare_square(
    bounds: Float[Array, "C N"],
    found: Candidates,
    numbers: Int[Array, " C"],
    own: Int[Array, " N"] | None = None,
) -> Candidates:
    """Adds the centroids of the two lowest bounds to the candidates, in few long loops.

    Of one candidate, which is then the lowest of all, only one is added.

    In a square of the bounds, rows and columns have their least, which are compared. The least of
    all is where the least row and the least column meet. The second is in another row and another
    column, whose least it then is, or in the same row or the same column.

    Args:
        bounds: float[C, N]; C is a product of two powers of two if a CPU is to be fast.
        found: the candidates of other centroids.
        numbers: int[C], the centroids that have these bounds.
        own: int[N], a centroid of each row that is left out; None for none.

    Returns:
        The candidates of all. `rest` is NaN if a bound is NaN.
    """
    C, N = bounds.shape
    side = 1 << isqrt(C).bit_length() - 1
    square, of = bounds.reshape(side, -1, N), numbers.reshape(side, -1)
    width = square.shape[1]

    def least_of(square: Array, of: Array) -> Array:
        parts = [
            square[:, i] if own is None else jnp.where(of[:, i, None] == own, jnp.inf, square[:, i])
            for i in range(square.shape[1])
        ]
        return _pairwise(jnp.minimum, parts)

    leasts = least_of(square, of), least_of(square.swapaxes(0, 1), of.T)
    of_rows, of_columns = (_three_least(x) for x in jax.lax.optimization_barrier(leasts))
    if len(found.labels) == 1:
        label = numbers[of_rows.label * width + of_columns.label]
        second = jnp.minimum(of_rows.second, of_columns.second)
        found = found._replace(rest=jnp.minimum(found.rest, second))
        return _with_candidate(found, label, of_rows.least)
    rows, columns = jax.lax.optimization_barrier((of_rows, of_columns))
    # NaN is not below anything; it is the least of its row and of its column, and so in `rest`.
    in_row, in_column = columns.second < rows.second, rows.second < columns.second
    first = rows.label, columns.label
    next_row = jnp.where(in_row, rows.label, rows.next_label)
    next_column = jnp.where(in_column, columns.label, columns.next_label)
    # With two rows and two columns taken, two more bounds are in both: at the other corners.
    corners = (rows.label, columns.next_label), (rows.next_label, columns.label)
    at_corners = [row * width + column for row, column in corners]
    corners = [bounds[at, jnp.arange(N)] for at in at_corners]
    if own is not None:
        taken = [numbers[at] == own for at in at_corners]
        corners = [jnp.where(is_own, jnp.inf, x) for is_own, x in zip(taken, corners, strict=True)]
    apart = jnp.minimum(jnp.minimum(rows.third, columns.third), jnp.minimum(*corners))
    # With one bound below Inf, the places of the next row and column mean nothing.
    is_alone = (rows.second == jnp.inf) & (columns.second == jnp.inf)
    apart = jnp.where(is_alone, jnp.inf, apart)
    of_row = jnp.minimum(rows.second, columns.third)
    of_column = jnp.minimum(columns.second, rows.third)
    rest = jnp.where(in_row, of_row, jnp.where(in_column, of_column, apart))
    labels = (numbers[row * width + at] for row, at in (first, (next_row, next_column)))
    second = jnp.minimum(rows.second, columns.second)
    *labels, second, rest = jax.lax.optimization_barrier((*labels, second, rest))
    found = found._replace(rest=jnp.minimum(found.rest, rest))
    found = _with_candidate(found, labels[0], rows.least)
    # Fused with the first, a CPU would do that one again for each of its results.
    return _with_candidate(jax.lax.optimization_barrier(found), labels[1], second)


class _Least(NamedTuple):
    """The three lowest of some values, and which the first two are."""

    label: Int[Array, " N"]
    next_label: Int[Array, " N"]
    least: Float[Array, " N"]
    second: Float[Array, " N"]
    third: Float[Array, " N"]


def _three_least(values: Float[Array, "M N"]) -> _Least:
    none, inf = jnp.zeros(values.shape[1], jnp.int32), jnp.full_like(values[0], jnp.inf)
    found = _Least(none, none, inf, inf, inf)
    for i, value in enumerate(values):
        label, next_label, least, second, third = found
        lower = value < least
        found = _Least(
            jnp.where(lower, i, label),
            jnp.where(lower, label, jnp.where(value < second, i, next_label)),
            jnp.where(lower, value, least),
            jnp.minimum(second, jnp.maximum(least, value)),
            jnp.minimum(third, jnp.maximum(second, value)),
        )
    return found


def _with_candidate(
    found: Candidates, label: Int[Array, " N"], bound: Float[Array, " N"]
) -> Candidates:
    """Inserts a candidate where it belongs; the last one then is no longer a candidate."""
    labels, bounds = list(found.labels), list(found.bounds)
    for t, (of, at) in enumerate(zip(found.labels, found.bounds, strict=True)):
        lower = bound < at
        labels[t], label = jnp.where(lower, label, of), jnp.where(lower, of, label)
        bounds[t], bound = jnp.where(lower, bound, at), jnp.where(lower, at, bound)
    return Candidates(tuple(labels), tuple(bounds), jnp.minimum(found.rest, bound))


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
