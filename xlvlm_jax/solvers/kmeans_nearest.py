"""The nearest of many centroids, and the next one, from scores.

K centroids, N rows, C centroids of which scores are compared.
"""

from typing import NamedTuple

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
        labels, least, second = best
        for i in range(count):
            label = first + i if of is None else of[i]
            score = rows[i] if own is None else jnp.where(label == own, jnp.inf, rows[i])
            nearer = score < least
            labels = jnp.where(nearer, label, labels)
            second = jnp.minimum(second, jnp.maximum(least, score))
            least = jnp.where(nearer, score, least)
        return Nearest(labels, least, second)

    whole = C // TURN
    if whole:
        best = jax.lax.fori_loop(0, whole, lambda i, best: several(i * TURN, TURN, best), best)
    return several(whole * TURN, C % TURN, best) if C % TURN else best
