"""Nearest centroid of every row, computed only where it can have changed.

    label_n = argmin_k |z_n - c_k|,   counts_k = #{n: label_n = k},   totals_k = sum of z_n - m

Distances and totals are measured from an origin m, the rounded mean of Z. With c' = c - m,

    |z - c|^2 = |z - m|^2 + score,    score = |c'|^2 - 2 (z c' - m c')

The products stay small if the states share a large common direction, and Z is not copied. If the
rows are far from zero compared to their differences, z c' - m c' is computed as (z - m) c', one
block at a time.

If rows have weights, counts and totals are weighted: row n counts w_n times.

With up to LARGE centroids, each row keeps its label and a lower bound on the gap between its
nearest and its second nearest centroid. Each move of the centroids shrinks that gap by what the
triangle inequality allows. A row is examined again when its gap is used up, and the sums are
corrected for the rows that changed (Hamerly, "Making k-means even faster", SDM 2010). With more
centroids, most soon stop while a few move far: a CPU then keeps the scores, and recomputes only
those of centroids that moved; if Z is wide and large, it keeps two bounds per row instead, and
multiplies a few leading columns first (`kmeans_leading`); it then corrects the sums too. An
accelerator would rather compare than hold K numbers per row: it keeps labels and gaps with any
number of centroids, but sums over all rows in each update. On a TPU the kernel of `tpu.clusters`
examines and sums all rows with one read of Z, where it takes them.

N rows, D width, K centroids, B rows per block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from xlvlm_jax.solvers import kmeans_leading
from xlvlm_jax.solvers import sums as sums_of_rows
from xlvlm_jax.solvers.kmeans_leading import SLACK, Known, Leading, numbers_of
from xlvlm_jax.solvers.kmeans_nearest import HELD, MOST, Nearest, nearest
from xlvlm_jax.solvers.linalg import matmul, real_dtype
from xlvlm_jax.solvers.loop import largest_of_runs
from xlvlm_jax.solvers.sums import Wide, centred_products
from xlvlm_jax.solvers.tpu import clusters

# With more centroids a CPU keeps scores; also how many are renewed in one product.
LARGE = 128
FEW = 0.3  # of the rows: up to this share they are examined individually, at a higher cost per row
NARROW = 128  # number of columns at which that extra cost doubles
BLOCKS = 32  # number of row blocks to examine, or more if a block would be larger than
BLOCK_NUMBERS, BLOCK_ROWS = 2**18, 4096
LEAST_BLOCK = 128  # rows: a smaller block takes no less time than adding its sums
ACCELERATOR_BLOCK_NUMBERS = 2**24  # each block takes a step, however small it is
MOVED = 32  # centroids whose scores are renewed together
# Scores held at once if there are many; on a CPU, HELD, only if rows are so narrow that copying a
# block of them costs less than holding all scores. An accelerator runs a few large products faster.
ACCELERATOR_HELD = 2**26
MANY, FEW_COLUMNS = 2**23, 8  # scores; columns per centroid
# If more than this share of the rows changes its cluster, all rows are summed; rows per block.
MANY_CHANGED, CHANGED_ROWS = 0.2, 1024
TINY = 1e-30


class Problem(NamedTuple):
    """Constants of a run."""

    Z: Float[Array, "N D"]
    real: Float[Array, " N"]  # 1 for a sample, 0 for a row that pads Z on a mesh
    weights: Float[Array, " N"] | None  # weight of each row; None if all are equal
    mean: Float[Array, " D"]  # m
    energy: Float[Array, " N"]  # |z_n - m|^2
    spread: Wide  # weighted sum of the energy over all rows of all devices
    variance: Float[Array, ""]  # mean variance of the columns
    active: Bool[Array, " K"]  # an inactive centroid gets no rows
    far: Bool[Array, ""]  # whether m is so far from zero that products with Z lose digits
    leading: Leading | None = None  # the rows in a few columns, if these rule centroids out

    @property
    def counted(self) -> Float[Array, " N"]:
        """Weight of each row."""
        return self.real if self.weights is None else self.weights


class Sums(NamedTuple):
    """What an update of the centroids needs from the rows: totals, whose size does not depend on
    N.
    """

    counts: Wide  # [K]
    totals: Wide  # [K, D]


class Bounds(NamedTuple):
    """What is kept with few centroids, and on accelerators."""

    labels: Int[Array, " N"]
    # Lower bounds on the distance to the second nearest centroid minus that to the nearest.
    gaps: Float[Array, " N"]
    # Sums over the rows of this device. None with weights: float32 cannot hold the changes of light
    # rows next to heavy ones, so the sums are recomputed; and None with too many centroids.
    sums: Sums | None


class Scores(NamedTuple):
    """What a CPU keeps with many centroids."""

    scores: Float[Array, "K N"]


class Ruled(NamedTuple):
    """What a CPU keeps with many centroids if leading columns rule most of them out."""

    known: Known
    sums: Sums | None  # as in `Bounds`; None with weights


Kept = Bounds | Scores | Ruled


def keeps_scores(num_clusters: int) -> bool:
    """Returns whether the scores of all rows with this many centroids are kept."""
    return num_clusters > LARGE and jax.default_backend() == "cpu"


def _keeps_sums(problem: Problem, num_clusters: int) -> bool:
    few = num_clusters <= LARGE or clusters.takes(problem.Z, num_clusters)
    return problem.weights is None and few


def nothing(problem: Problem) -> Kept:
    """Returns an empty record; the first `renew` must get infinite shifts."""
    (K,), (N, D) = problem.active.shape, problem.Z.shape
    dtype = real_dtype(problem.Z)

    def zeros(*shape: int) -> Wide:
        # Two arrays, because one buffer cannot be donated twice.
        return Wide(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    if problem.leading is not None:
        sums = Sums(zeros(K), zeros(K, D)) if problem.weights is None else None
        return Ruled(kmeans_leading.nothing(problem.leading, K), sums)
    if keeps_scores(K):
        return Scores(jnp.zeros((K, N), dtype))
    sums = Sums(zeros(K), zeros(K, D)) if _keeps_sums(problem, K) else None
    return Bounds(jnp.zeros(N, jnp.int32), jnp.zeros(N, dtype), sums)


def of_columns(
    problem: Problem, X: Float[Array, "N R"], inside: Float[Array, "K R"]
) -> Bounds | None:
    """Returns what is known of centroids that lie in few columns, without a product with Z.

    Args:
        problem: constants of the run on Z.
        X: float[N, R], the rows minus m in orthonormal columns.
        inside: float[K, R], the centroids minus m in these columns.

    Returns:
        what `renew` of centroids that have not moved takes; None where scores would be kept.
    """
    if keeps_scores(len(inside)):
        # Those are not looked at again, and the basis is orthonormal only up to rounding.
        return None
    N, R = X.shape
    # With the energy of the whole rows.
    in_columns = problem._replace(Z=X, mean=jnp.zeros(R, X.dtype), far=jnp.zeros((), bool))
    unknown = Bounds(jnp.zeros(N, jnp.int32), jnp.zeros(N, X.dtype), None)
    kept = _renew_rows(in_columns, unknown, inside, jnp.full(len(inside), jnp.inf, X.dtype))
    keeps_sums = _keeps_sums(problem, len(inside))
    return kept._replace(sums=sums_of(problem, kept.labels) if keeps_sums else None)


def renew(
    problem: Problem,
    kept: Kept,
    offsets: Float[Array, "K D"],
    shifts: Float[Array, " K"],
    is_last: bool = False,
) -> tuple[Kept, Int[Array, " N"], Sums]:
    """Updates what is known for the new centroids.

    Args:
        problem: constants of the run.
        kept: what was known for the previous centroids.
        offsets: float[K, D], the new centroids minus m.
        shifts: float[K], how far each centroid moved; infinite if unknown.
        is_last: whether only labels and sums are wanted.

    Returns:
        what is known now, the labels int[N], and the sums of the clusters.
    """
    if isinstance(kept, Bounds):
        if kept.sums is None and clusters.takes(problem.Z, len(offsets)):
            # The sums need a read of all rows in any case, and it gives the labels too.
            found = _on_tpu(problem, offsets)
            sums = Sums(found.counts, found.totals)
            return kept._replace(labels=found.labels), found.labels, sums
        kept = _renew_rows(problem, kept, offsets, shifts)
        sums = sums_of(problem, kept.labels) if kept.sums is None else kept.sums
        return kept, kept.labels, sums
    if isinstance(kept, Ruled):
        assert problem.leading is not None
        largest = terms_of_mean(problem) + jnp.max(jnp.sum(offsets**2, axis=1))
        rounding = jnp.where(problem.real > 0, SLACK * (problem.energy + largest), -jnp.inf)
        of_rows = problem.Z, problem.mean, rounding, problem.leading
        given = kept.known, offsets, shifts, problem.active
        known = kmeans_leading.renew(*of_rows, *given, is_last)
        if kept.sums is None:
            return Ruled(known, None), known.labels, sums_of(problem, known.labels)
        # Infinite shifts: what is kept may not be of this run.
        is_new = jnp.isinf(jnp.max(shifts))
        sums = _renew_sums(problem, kept.sums, kept.known.labels, known.labels, is_new)
        return Ruled(known, sums), known.labels, sums
    kept = _renew_centroids(problem, kept, offsets, shifts)
    labels = nearest(kept.scores)[0]
    return kept, labels, sums_of(problem, labels)


def scores_of(
    problem: Problem, kept: Kept, offsets: Float[Array, "K D"], shifts: Float[Array, " K"]
) -> Float[Array, "K N"]:
    """Returns all scores, reusing what is kept if that saves work."""
    if isinstance(kept, Scores):
        return _renew_centroids(problem, kept, offsets, shifts).scores
    return score(problem.Z, offsets, problem.mean, problem.far, problem.active)


def score(
    Z: Float[Array, "N D"],
    offsets: Float[Array, "K D"],
    mean: Float[Array, " D"],
    far: Bool[Array, ""] | bool,
    active: Bool[Array, " K"] | bool = True,
) -> Float[Array, "K N"]:
    """Returns |z - c|^2 - |z - m|^2, the part of a squared distance that depends on c."""
    return _bias(offsets, active)[:, None] - 2 * centred_products(offsets, Z, mean, far)


def _bias(offsets: Float[Array, "K D"], active: Bool[Array, " K"] | bool) -> Float[Array, " K"]:
    return jnp.where(active, jnp.sum(offsets**2, axis=1), jnp.inf)


def sums_of(problem: Problem, labels: Int[Array, " N"]) -> Sums:
    """Returns the number of rows of each cluster and the sum of their offsets from the mean."""
    K = len(problem.active)
    return Sums(*sums_of_rows.cluster_sums(problem.Z, labels, K, problem.mean, problem.counted))


def _renew_sums(
    problem: Problem,
    sums: Sums,
    before: Int[Array, " N"],
    labels: Int[Array, " N"],
    is_new: Bool[Array, ""],
) -> Sums:
    """Corrects the sums for the rows whose label has changed, or sums all rows if they are many."""
    N, K = len(labels), len(problem.active)
    size = min(CHANGED_ROWS, N)
    count, changed = numbers_of((labels != before) & (problem.real > 0), size)
    # Runs side by side decide together: alone, each of them would do both.
    count, is_new = largest_of_runs(count), largest_of_runs(is_new)
    many = is_new | (count > MANY_CHANGED * N)

    def some_rows(i: Array, sums: Sums) -> Sums:
        numbers = jax.lax.dynamic_slice_in_dim(changed, i * size, size)
        rows = jnp.minimum(numbers, N - 1)
        # Rows that fill up the block get an index out of range, which the scatter drops.
        to, came_from = (jnp.where(numbers < N, of[rows], K) for of in (labels, before))
        Z = problem.Z[rows] - problem.mean

        def change(total: Wide, part: Array | float) -> Wide:
            moved = jnp.zeros_like(total.high).at[to].add(part, mode="drop")
            return total + moved.at[came_from].add(-part, mode="drop")

        return Sums(change(sums.counts, 1.0), change(sums.totals, Z))

    sums = jax.lax.cond(many, lambda: sums_of(problem, labels), lambda: sums)
    return jax.lax.fori_loop(0, jnp.where(many, 0, -(-count // size)), some_rows, sums)


def inertia(spread: Wide, offsets: Float[Array, "K D"], sums: Sums) -> Float[Array, ""]:
    """Returns the inertia: the sum of squared distances of all rows to their centroids.

    It is a difference of large numbers, computed with twice the digits.

    Args:
        spread: the sum of |z - m|^2 over all rows.
        offsets: float[K, D], centroids minus m.
        sums: counts and totals of the clusters.
    """
    counts = Wide(*(part[:, None] for part in sums.counts))
    # sum of offsets (2 totals - counts offsets)
    covered = sums_of_rows.product(counts.high, offsets) + counts.low * offsets
    inner = sums.totals.times(2) + covered.times(-1)
    between = sums_of_rows.product(offsets, inner.high) + offsets * inner.low
    return jnp.maximum((spread + sums_of_rows.total(between).times(-1)).value, 0)


def terms_of_mean(problem: Problem) -> Float[Array, ""]:
    """Returns the mean's share of the terms of a squared distance, for rounding errors."""
    return jnp.where(problem.far, 0, jnp.sum(problem.mean**2))


def _on_tpu(problem: Problem, offsets: Float[Array, "K D"]) -> clusters.Assigned:
    bias = _bias(offsets, problem.active)
    weights, ones = problem.counted, problem.weights is None
    return clusters.assign(problem.Z, offsets, problem.mean, bias, weights, ones)


def _renew_rows(
    problem: Problem, kept: Bounds, offsets: Float[Array, "K D"], shifts: Float[Array, " K"]
) -> Bounds:
    """Examines all rows at once, or those with no gap left, one block at a time."""
    N, D = problem.Z.shape
    K = len(shifts)
    # A row's second centroid can have come nearer by at most the farthest move of another centroid.
    is_farthest = jnp.arange(K) == jnp.argmax(shifts)
    second = jnp.max(jnp.where(is_farthest, 0, shifts))
    others = jnp.where(is_farthest, second, jnp.max(shifts))
    gaps = kept.gaps - (shifts + others)[kept.labels]
    on_cpu = jax.default_backend() == "cpu"
    numbers = BLOCK_NUMBERS if on_cpu else ACCELERATOR_BLOCK_NUMBERS
    block = max(min(numbers // D, BLOCK_ROWS, max(N // BLOCKS, LEAST_BLOCK)), 1)
    # Negated, so that NaN (Inf - Inf) also counts as unknown. Rows that pad Z have no gap.
    count, doubtful = numbers_of(~(gaps > 0) & (problem.real > 0), block)
    # Runs side by side decide together: alone, each of them would do both.
    count, farthest = largest_of_runs(count), largest_of_runs(jnp.max(shifts))
    many = (count > FEW * D / (D + NARROW) * N) | jnp.isinf(farthest)
    kept = kept._replace(gaps=gaps)
    floor = terms_of_mean(problem) + jnp.max(jnp.sum(offsets**2, axis=1))

    def gaps_of(energy: Array, found: Nearest | clusters.Assigned) -> Array:
        near, far = (jnp.maximum(energy + found.least, 0), jnp.maximum(energy + found.second, 0))
        rounding = SLACK * (energy + floor)
        apart = (far - near - rounding) / (jnp.sqrt(far) + jnp.sqrt(near) + TINY)
        return jnp.where(jnp.isinf(found.second), jnp.inf, apart)

    def all_rows(_: Array, kept: Bounds) -> Bounds:
        # Ties the work to the loop's carry: otherwise XLA hoists it out of the loop and always does
        # it.
        centroids, before = jax.lax.optimization_barrier((offsets, kept.gaps))
        if kept.sums is not None and clusters.takes(problem.Z, K):
            found = _on_tpu(problem, centroids)
            gaps = jnp.where(problem.real > 0, gaps_of(problem.energy, found), before)
            return Bounds(found.labels, gaps, Sums(found.counts, found.totals))

        def block(first: Array | int, count: int) -> tuple[Array, Array]:
            Z, real, energy, gaps = (
                sums_of_rows.block_of(values, first, count)
                for values in (problem.Z, problem.real, problem.energy, before)
            )
            found = nearest(score(Z, centroids, problem.mean, problem.far, problem.active))
            # Fused with its uses, a CPU would compare several times.
            found = jax.lax.optimization_barrier(found)
            return found.labels, jnp.where(real > 0, gaps_of(energy, found), gaps)

        def step(i: Array, found: tuple[Array, Array]) -> tuple[Array, ...]:
            first = jnp.minimum(i * size, N - size)  # the last block overlaps
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(all_of, part, first, 0)
                for all_of, part in zip(found, block(first, size), strict=True)
            )

        size = _rows_at_once(N, D, K)
        if size == N:
            labels, gaps = block(0, N)
        else:
            labels, gaps = jax.lax.fori_loop(0, -(-N // size), step, (kept.labels, before))
        sums = None if kept.sums is None else sums_of(problem, labels)
        return Bounds(labels, gaps, sums)

    def some_rows(i: Array, kept: Bounds) -> Bounds:
        numbers = jax.lax.dynamic_slice_in_dim(doubtful, i * block, block)
        rows = jnp.minimum(numbers, N - 1)
        Z = problem.Z[rows] - problem.mean
        found = nearest(score(Z, offsets, jnp.zeros_like(problem.mean), False, problem.active))
        real = problem.real[rows] * (numbers < N)

        def changed(sums: Sums) -> Sums:
            # +1 for the cluster that a row enters, -1 for the one that it leaves, 0 if it stays.
            to, come_from = (
                jax.nn.one_hot(labels, K, axis=0, dtype=Z.dtype)
                for labels in (found.labels, kept.labels[rows])
            )
            change = (to - come_from) * real
            return Sums(sums.counts + jnp.sum(change, axis=1), sums.totals + matmul(change, Z))

        return Bounds(
            kept.labels.at[numbers].set(found.labels, mode="drop"),
            kept.gaps.at[numbers].set(gaps_of(problem.energy[rows], found), mode="drop"),
            None if kept.sums is None else changed(kept.sums),
        )

    # Two loops, one of which runs zero times, and each of which works in place.
    kept = jax.lax.fori_loop(0, jnp.where(many, 1, 0), all_rows, kept)
    return jax.lax.fori_loop(0, jnp.where(many, 0, -(-count // block)), some_rows, kept)


def _rows_at_once(N: int, D: int, K: int) -> int:
    """Returns how many rows are scored together."""
    if jax.default_backend() != "cpu":
        return min(max(ACCELERATOR_HELD // K, 1), N)
    if N * K < MANY or D > FEW_COLUMNS * K:
        return N
    return min(max(HELD // K, 1), N)


def _renew_centroids(
    problem: Problem, kept: Scores, offsets: Float[Array, "K D"], shifts: Float[Array, " K"]
) -> Scores:
    """Renews the scores of the moved centroids, one block at a time."""
    K, moved = len(shifts), shifts > 0
    order = jnp.argsort(~moved)  # stable sort: moved centroids first

    def renew_large(i: Array, scores: Array) -> Array:
        first = jnp.minimum(i * LARGE, K - LARGE)  # the last block overlaps the one before
        some, active = (
            jax.lax.dynamic_slice_in_dim(x, first, LARGE) for x in (offsets, problem.active)
        )
        new = score(problem.Z, some, problem.mean, problem.far, active)
        return jax.lax.dynamic_update_slice_in_dim(scores, new, first, 0)

    def renew_some(i: Array, scores: Array) -> Array:
        chosen = jax.lax.dynamic_slice_in_dim(order, jnp.minimum(i * MOVED, K - MOVED), MOVED)
        of = problem.active[chosen]
        new = score(problem.Z, offsets[chosen], problem.mean, problem.far, of)
        return scores.at[chosen].set(new)

    # Of all runs side by side: with lengths of their own, they would copy scores in each step.
    count = largest_of_runs(jnp.sum(moved, dtype=jnp.int32))
    most = count > MOST * K
    # Two loops, one of which runs zero times: they update the scores in place; lax.cond would copy.
    scores = jax.lax.fori_loop(0, jnp.where(most, -(-K // LARGE), 0), renew_large, kept.scores)
    scores = jax.lax.fori_loop(0, jnp.where(most, 0, -(-count // MOVED)), renew_some, scores)
    return Scores(scores)
