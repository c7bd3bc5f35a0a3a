"""The nearest centroid of every row, looked for only where it can have changed.

    label_n = argmin_k |z_n - c_k|,    counts_k = #{n: label_n = k},    totals_k = sum of those z_n

Distances are taken from the mean m of Z. With c' = c - m,

    |z - c|^2 = |z - m|^2 + score,    score = |c'|^2 - 2 (z c' - m c')

The products stay small where the states share a large common direction, and Z is not copied.

Up to LARGE centroids a row keeps its label and by how much farther the second centroid is. Each
move of the centroids takes from that gap what the triangle inequality allows; a row is looked at
again when nothing is left of it, and the sums are corrected by the rows that change (Hamerly,
"Making k-means even faster", SDM 2010). Of more centroids most soon rest, while some move far:
there the scores are kept, and computed again only for centroids that moved.

N rows, D width, K centroids, B rows of a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from xlvlm_jax.solvers.loop import inner_products, matmul

LARGE = 128  # centroids, beyond which scores are kept; and as many are renewed in one product
FEW = 0.3  # of the rows: up to so many are looked at by themselves, which costs more a row
NARROW = 128  # columns at which it costs twice as much more
BLOCKS = 32  # of rows, in which they are looked at, or more if a block would be larger than
BLOCK_NUMBERS, BLOCK_ROWS = 2**18, 4096
SLACK = 1e-6  # of the largest terms of a squared distance: what its rounding may be
MOVED = 32  # centroids whose scores are renewed together
MOST = 0.75  # of the centroids: when more have moved, all scores are renewed
TURN = 16  # scores that are compared in one pass
TINY = 1e-30


class Problem(NamedTuple):
    """Constants of a run."""

    Z: Float[Array, "N D"]
    real: Float[Array, " N"]  # 1 for a sample, 0 for a row that pads Z on a mesh
    mean: Float[Array, " D"]
    energy: Float[Array, " N"]  # |z_n - m|^2
    spread: Float[Array, ""]  # the sum of that over all rows, wherever they are
    variance: Float[Array, ""]  # the mean variance of a column
    active: Bool[Array, " K"]  # a centroid that is not has no rows


class Sums(NamedTuple):
    """What an update of the centroids needs of the rows: totals over them, whatever N is."""

    counts: Float[Array, " K"]
    totals: Float[Array, "K D"]


class Bounds(NamedTuple):
    """What is kept of few centroids."""

    labels: Int[Array, " N"]
    gaps: Float[Array, " N"]  # at least |z - c| of the second nearest less that of the nearest
    sums: Sums  # of the rows here


class Scores(NamedTuple):
    """What is kept of many."""

    scores: Float[Array, "K N"]


Kept = Bounds | Scores


def nothing(problem: Problem) -> Kept:
    """What is kept before anything is known; the first `renew` needs centroids that all moved."""
    (K,), (N, D) = problem.active.shape, problem.Z.shape
    if K > LARGE:
        return Scores(jnp.zeros((K, N)))
    return Bounds(jnp.zeros(N, jnp.int32), jnp.zeros(N), Sums(jnp.zeros(K), jnp.zeros((K, D))))


def renew(
    problem: Problem, kept: Kept, offsets: Float[Array, "K D"], shifts: Float[Array, " K"]
) -> tuple[Kept, Int[Array, " N"], Sums]:
    """What is kept of centroids at m + offsets, each of which moved by its shift; labels and sums.

    An infinite shift is one that is not known.
    """
    if isinstance(kept, Bounds):
        kept = _renew_rows(problem, kept, offsets, shifts)
        return kept, kept.labels, kept.sums
    kept = _renew_centroids(problem, kept, offsets, shifts)
    labels = nearest(kept.scores)[0]
    return kept, labels, sums_of(problem, labels)


def scores_of(
    problem: Problem, kept: Kept, offsets: Float[Array, "K D"], shifts: Float[Array, " K"]
) -> Float[Array, "K N"]:
    """All scores, from what is kept where that spares something."""
    if isinstance(kept, Scores):
        return _renew_centroids(problem, kept, offsets, shifts).scores
    return score(problem.Z, offsets, problem.mean, problem.active)


def score(
    Z: Float[Array, "N D"],
    offsets: Float[Array, "K D"],
    mean: Float[Array, " D"],
    active: Bool[Array, " K"] | bool = True,
) -> Float[Array, "K N"]:
    """|z - c|^2 - |z - m|^2: a squared distance less what depends on the row alone."""
    bias = jnp.sum(offsets**2, axis=1) + 2 * matmul(offsets, mean)
    return jnp.where(active, bias, jnp.inf)[:, None] - 2 * inner_products(offsets, Z)


class Nearest(NamedTuple):
    """Of each row, the first of equal ones."""

    labels: Int[Array, " N"]
    least: Float[Array, " N"]  # their scores
    second: Float[Array, " N"]  # the least score of another centroid, Inf where there is none


def nearest(scores: Float[Array, "K N"]) -> Nearest:
    """Which centroid has the least score of each row, that score, and the second one."""

    def in_one(scores: Array) -> Nearest:
        labels = jnp.argmin(scores, axis=0).astype(jnp.int32)
        others = jnp.where(jnp.arange(len(scores))[:, None] == labels, jnp.inf, scores)
        return Nearest(labels, jnp.min(scores, axis=0), jnp.min(others, axis=0))

    def in_turn(scores: Array) -> Nearest:
        K, N = scores.shape

        def compare(best: Nearest, first: Array | int, count: int) -> Nearest:
            rows = jax.lax.dynamic_slice_in_dim(scores, first, count)
            labels, least, second = best
            for i in range(count):
                nearer = rows[i] < least
                labels = jnp.where(nearer, first + i, labels)
                second = jnp.minimum(second, jnp.maximum(least, rows[i]))
                least = jnp.where(nearer, rows[i], least)
            return Nearest(labels, least, second)

        inf = jnp.full(N, jnp.inf)
        best = Nearest(jnp.zeros(N, jnp.int32), inf, inf)
        whole = K // TURN
        if whole:
            best = jax.lax.fori_loop(0, whole, lambda i, b: compare(b, i * TURN, TURN), best)
        return compare(best, whole * TURN, K % TURN)

    # A CPU reduces along the first axis five times slower than it compares rows.
    return jax.lax.platform_dependent(scores, cpu=in_turn, default=in_one)


def sums_of(problem: Problem, labels: Int[Array, " N"]) -> Sums:
    """How many rows each cluster has, and their sum."""
    K = len(problem.active)

    def by_product(labels: Array) -> Sums:
        members = jax.nn.one_hot(labels, K, dtype=jnp.float32) * problem.real[:, None]
        return Sums(jnp.sum(members, axis=0), matmul(members.T, problem.Z))

    def by_segment(labels: Array) -> Sums:
        # Rows that pad Z are zero: they count for nothing in the sums.
        Z = problem.Z.astype(jnp.float32)
        counts = jax.ops.segment_sum(problem.real, labels, K)
        return Sums(counts, jax.ops.segment_sum(Z, labels, K))

    # Accelerators multiply faster than they scatter; a CPU adds rows at the speed of reading them.
    return jax.lax.platform_dependent(labels, cpu=by_segment, default=by_product)


def inertia(
    spread: Float[Array, ""],
    mean: Float[Array, " D"],
    offsets: Float[Array, "K D"],
    sums: Sums,
) -> Float[Array, ""]:
    """Sum of squared distances of all rows to the centroids m + offsets of their clusters."""
    centred = sums.totals - sums.counts[:, None] * mean
    between = jnp.sum(offsets * (2 * centred - sums.counts[:, None] * offsets))
    return jnp.maximum(spread - between, 0)


def _renew_rows(
    problem: Problem, kept: Bounds, offsets: Float[Array, "K D"], shifts: Float[Array, " K"]
) -> Bounds:
    """All rows at once, or those of which no gap is left, some at a time."""
    N, D = problem.Z.shape
    K = len(shifts)
    # What a row's second centroid can have come nearer: the farthest that another one moved.
    others = jnp.max(jnp.where(jnp.eye(K, dtype=bool), 0, shifts), axis=1)
    gaps = kept.gaps - (shifts + others)[kept.labels]
    block = max(min(BLOCK_NUMBERS // D, BLOCK_ROWS, N // BLOCKS), 1)
    # Also where Inf less Inf is no number: not known.
    count, doubtful = _numbers(~(gaps > 0), block)
    many = (count > FEW * D / (D + NARROW) * N) | jnp.isinf(jnp.max(shifts))
    kept = kept._replace(gaps=gaps)
    floor = jnp.sum(problem.mean**2) + jnp.max(jnp.sum(offsets**2, axis=1))

    def gaps_of(energy: Array, found: Nearest) -> Array:
        near, far = (jnp.maximum(energy + found.least, 0), jnp.maximum(energy + found.second, 0))
        rounding = SLACK * (energy + floor)
        apart = (far - near - rounding) / (jnp.sqrt(far) + jnp.sqrt(near) + TINY)
        return jnp.where(jnp.isinf(found.second), jnp.inf, apart)

    def all_rows(_: Array, kept: Bounds) -> Bounds:
        # Tied to what the loop changes: XLA would take the work out of it, and always do it.
        centroids, before = jax.lax.optimization_barrier((offsets, kept.gaps))
        found = nearest(score(problem.Z, centroids, problem.mean, problem.active))
        gaps = jnp.where(problem.real > 0, gaps_of(problem.energy, found), before)
        return Bounds(found.labels, gaps, sums_of(problem, found.labels))

    def some_rows(i: Array, kept: Bounds) -> Bounds:
        numbers = jax.lax.dynamic_slice_in_dim(doubtful, i * block, block)
        rows = jnp.minimum(numbers, N - 1)
        Z = problem.Z[rows].astype(jnp.float32)
        found = nearest(score(Z, offsets, problem.mean, problem.active))
        real = problem.real[rows] * (numbers < N)
        # +1 where a row comes from and -1 where it goes: 0 for the many that stay.
        to, come_from = (
            jax.nn.one_hot(labels, K, axis=0, dtype=jnp.float32)
            for labels in (found.labels, kept.labels[rows])
        )
        change = (to - come_from) * real
        counts = kept.sums.counts + jnp.sum(change, axis=1)
        totals = kept.sums.totals + matmul(change, Z)
        return Bounds(
            kept.labels.at[numbers].set(found.labels, mode="drop"),
            kept.gaps.at[numbers].set(gaps_of(problem.energy[rows], found), mode="drop"),
            Sums(counts, totals),
        )

    # Two loops, of which one turns: batched, a condition would do both.
    kept = jax.lax.fori_loop(0, jnp.where(many, 1, 0), all_rows, kept)
    return jax.lax.fori_loop(0, jnp.where(many, 0, -(-count // block)), some_rows, kept)


def _numbers(chosen: Bool[Array, " N"], spare: int) -> tuple[Int[Array, ""], Int[Array, " M"]]:
    """How many rows are chosen, and int32[N + spare]: their numbers, then N."""
    N = len(chosen)
    place = jnp.cumsum(chosen)
    # Those of the others are written nowhere.
    place = jnp.where(chosen, place - 1, N + spare)
    numbers = jnp.full(N + spare, N, jnp.int32)
    return jnp.sum(chosen), numbers.at[place].set(jnp.arange(N, dtype=jnp.int32), mode="drop")


def _renew_centroids(
    problem: Problem, kept: Scores, offsets: Float[Array, "K D"], shifts: Float[Array, " K"]
) -> Scores:
    """The scores with those of the moved centroids renewed, a block of them at a time."""
    K, moved = len(shifts), shifts > 0
    order = jnp.argsort(~moved)  # stable: the moved ones first

    def renew_large(i: Array, scores: Array) -> Array:
        first = jnp.minimum(i * LARGE, K - LARGE)  # the last block reaches back over what is done
        some, active = (
            jax.lax.dynamic_slice_in_dim(x, first, LARGE) for x in (offsets, problem.active)
        )
        new = score(problem.Z, some, problem.mean, active)
        return jax.lax.dynamic_update_slice_in_dim(scores, new, first, 0)

    def renew_some(i: Array, scores: Array) -> Array:
        chosen = jax.lax.dynamic_slice_in_dim(order, jnp.minimum(i * MOVED, K - MOVED), MOVED)
        new = score(problem.Z, offsets[chosen], problem.mean, problem.active[chosen])
        return scores.at[chosen].set(new)

    count = jnp.sum(moved)
    most = count > MOST * K
    # Two loops, of which one turns: they write where the scores are, and a condition would copy.
    scores = jax.lax.fori_loop(0, jnp.where(most, -(-K // LARGE), 0), renew_large, kept.scores)
    scores = jax.lax.fori_loop(0, jnp.where(most, 0, -(-count // MOVED)), renew_some, scores)
    return Scores(scores)
