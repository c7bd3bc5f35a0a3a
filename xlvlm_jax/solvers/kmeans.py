"""K-means.

    minimise   inertia(C, l) = sum_n |z_n - c_{l_n}|^2   over centroids C[K, D] and labels l[N]

by Lloyd's algorithm ("Least squares quantization in PCM", 1982) from greedy k-means++ centroids
(Arthur and Vassilvitskii, 2007) or from given ones. `tol` is compared to the squared distance that
the centroids moved in the last update, over the mean variance of Z's columns; 0 waits until no row
changes its cluster. Rule and default are scikit-learn's.

Where Z is wide the rows are clustered in the few columns of `compression` first, and only the last
updates read Z itself: centroids are means of rows, so that they lie in the row space of Z.

Distances are taken from the mean m of Z. With c' = c - m,

    |z - c|^2 = |z - m|^2 + |c'|^2 - 2 (z c' - m c')

The products stay small where the states share a large common direction, and Z is not copied. They
are kept, and computed again only for centroids that the last update moved: soon most of many rest.
"""

from functools import partial
from math import log
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from xlvlm_jax.solvers import compression, residual
from xlvlm_jax.solvers.loop import Progress, Result, begin, each, inner_products, matmul, run
from xlvlm_jax.solvers.restarts import best_first, sample
from xlvlm_jax.solvers.rows import ONE_DEVICE, Rows, solve_on

OVERSAMPLE = 12  # columns of the compressed Z beyond K
BY_SAMPLE = 44  # and where a sample of the rows gives them, so that a column costs a third
SCREEN = 100  # updates after which starts are compared
BLOCK = 32  # centroids whose scores are renewed together
MOST = 0.75  # of the centroids: when more have moved, all scores are renewed
LARGE = 128  # of them together
TURN = 16  # scores that are compared in one pass
TINY = 1e-30


class Problem(NamedTuple):
    """Constants of a run."""

    Z: Float[Array, "N D"]
    real: Float[Array, " N"]  # 1 for a sample, 0 for a row that pads Z on a mesh
    mean: Float[Array, " D"]
    energy: Float[Array, " N"]  # |z_n - m|^2
    variance: Float[Array, ""]  # of all columns together, over D
    active: Bool[Array, " K"]  # a centroid that is not has no rows


class State(NamedTuple):
    """What an update reads and writes."""

    offsets: Float[Array, "K D"]  # centroids minus the mean of Z
    moved: Bool[Array, " K"]  # which of them the scores are not up to date with
    scores: Float[Array, "K N"]  # |z - c|^2 - |z - m|^2
    objective: Float[Array, ""]  # inertia of the centroids that the last update started from
    error: Float[Array, ""]


class Sums(NamedTuple):
    """What an update needs of the rows: totals over them, whatever N is."""

    counts: Float[Array, " K"]
    totals: Float[Array, "K D"]  # sum of the rows of each cluster
    inertia: Float[Array, ""]


def prepare(
    Z: Float[Array, "N D"],
    num_samples: int,
    active: Bool[Array, " K"],
    rows: Rows = ONE_DEVICE,
) -> Problem:
    """The constants for a Z whose first `num_samples` rows count."""
    real = (rows.numbers(len(Z)) < num_samples).astype(jnp.float32)
    mean = rows.total(matmul(real, Z)) / num_samples
    energy = real * jnp.sum((Z - mean) ** 2, axis=1)
    variance = rows.total(jnp.sum(energy)) / (num_samples * Z.shape[1])
    return Problem(Z, real, mean, energy, variance, active)


def init(problem: Problem, centroids: Float[Array, "K D"], rows: Rows = ONE_DEVICE) -> State:
    """The state at given centroids."""
    offsets = centroids - problem.mean
    scores = score(problem.Z, offsets, problem.mean, problem.active)
    inertia = rows.total(_inertia(problem, nearest(scores)[1]))
    moved = jnp.zeros(len(offsets), bool)
    return State(offsets, moved, scores, inertia, jnp.float32(jnp.inf))


def update(problem: Problem, state: State, rows: Rows = ONE_DEVICE) -> State:
    """Assign every row to its nearest centroid, then move each centroid to its rows' mean."""
    scores = _rescore(problem, state)
    labels, least, sums = collect(problem, scores)
    sums = rows.total(sums)
    empty = (sums.counts == 0) & problem.active

    def fill_empty() -> Sums:
        distance = jnp.where(problem.real > 0, problem.energy + least, -jnp.inf)
        far = rows.largest(distance, len(empty))
        of = rows.take(labels.astype(jnp.float32), far).astype(jnp.int32)
        return relocate(sums, rows.take(problem.Z, far), of, empty)

    sums = jax.lax.cond(jnp.any(empty), fill_empty, lambda: sums)
    offsets, error = advance(problem.mean, problem.variance, state.offsets, sums)
    moved = jnp.any(offsets != state.offsets, axis=1)
    return State(offsets, moved, scores, sums.inertia, error)


def collect(
    problem: Problem, scores: Float[Array, "K N"]
) -> tuple[Int[Array, " N"], Float[Array, " N"], Sums]:
    """The nearest centroid of some rows, its score, and the rows' sums."""
    labels, least = nearest(scores)
    counts, totals = _totals(problem, labels, len(scores))
    return labels, least, Sums(counts, totals, _inertia(problem, least))


def advance(
    mean: Float[Array, " D"],
    variance: Float[Array, ""],
    offsets: Float[Array, "K D"],
    sums: Sums,
) -> tuple[Float[Array, "K D"], Float[Array, ""]]:
    """Each centroid at the mean of its rows, one without rows where it was; and what they moved."""
    means = sums.totals / jnp.maximum(sums.counts, 1)[:, None]
    new = jnp.where(sums.counts[:, None] > 0, means - mean, offsets)
    return new, jnp.sum((new - offsets) ** 2) / jnp.maximum(variance, TINY)


def nearest(scores: Float[Array, "K N"]) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """Which centroid has the least score of each row, the first of equal ones, and that score."""

    def in_one(scores: Array) -> tuple[Array, Array]:
        return jnp.argmin(scores, axis=0).astype(jnp.int32), jnp.min(scores, axis=0)

    def in_turn(scores: Array) -> tuple[Array, Array]:
        K, N = scores.shape

        def compare(best: tuple, first: Array | int, count: int) -> tuple:
            rows = jax.lax.dynamic_slice_in_dim(scores, first, count)
            labels, least = best
            for i in range(count):
                nearer = rows[i] < least
                labels = jnp.where(nearer, first + i, labels)
                least = jnp.where(nearer, rows[i], least)
            return labels, least

        best = jnp.zeros(N, jnp.int32), jnp.full(N, jnp.inf)
        whole = K // TURN
        if whole:
            best = jax.lax.fori_loop(0, whole, lambda i, b: compare(b, i * TURN, TURN), best)
        return compare(best, whole * TURN, K % TURN)

    # A CPU reduces along the first axis five times slower than it compares rows.
    return jax.lax.platform_dependent(scores, cpu=in_turn, default=in_one)


def assign(
    Z: Float[Array, "N D"], centroids: Float[Array, "K D"]
) -> tuple[Int[Array, " N"], Float[Array, "N K"]]:
    """The nearest centroid of each row, and its squared distances to all of them."""
    mean = jnp.mean(centroids, axis=0)
    return distances(Z, centroids, score(Z, centroids - mean, mean))


def distances(
    Z: Float[Array, "N D"], centroids: Float[Array, "K D"], scores: Float[Array, "K N"]
) -> tuple[Int[Array, " N"], Float[Array, "N K"]]:
    """The nearest centroid of each row, and its squared distances to all of them, by the scores."""
    # Only differences between centroids come from a product; the smallest distance, which
    # cancellation would hurt, is computed from the difference itself.
    labels, least = nearest(scores)
    exact = residual.of_labels(Z, labels, centroids)
    return labels, (scores - least + exact).T


@jax.jit
def activations(Z: Float[Array, "N D"], centroids: Float[Array, "K D"]) -> Float[Array, "N K"]:
    """1 / (1 + distance to each centroid)."""
    return 1 / (1 + jnp.sqrt(assign(Z, centroids)[1]))


_STATIC = ("num_samples", "num_concepts", "max_iter", "n_init", "verbose", "mesh")


@partial(jax.jit, static_argnames=_STATIC)
def solve(
    Z: Float[Array, "N D"],
    key: PRNGKeyArray,
    *,
    num_samples: int,
    num_concepts: tuple[int, ...],
    tol: Float[Array, ""] | float = 1e-4,
    max_iter: int = 300,
    n_init: int = 1,
    init_centroids: Float[Array, "K D"] | None = None,
    verbose: int = 0,
    mesh: Mesh | None = None,
) -> Result:
    """Cluster the rows of Z for each of Q numbers of clusters; those from `num_samples` on do not
    count. The result has a leading axis Q; centroids beyond a number's own mean nothing.
    """
    K, D = max(num_concepts), Z.shape[1]
    active = jnp.arange(K) < jnp.array(num_concepts)[:, None]
    by_sample = num_samples >= 4 * compression.SAMPLE * (K + BY_SAMPLE)
    width = K + (BY_SAMPLE if by_sample else OVERSAMPLE)

    def local(Z: Array, key: Array, tol: Array, centroids: Array | None, rows: Rows) -> Result:
        until = partial(run, tol=tol, max_iter=max_iter, verbose=verbose)
        compressed = 4 * (K + OVERSAMPLE) <= D and num_samples > width
        if not compressed:
            basis, X = None, Z
        elif by_sample:
            basis, X = compression.compress_by_sample(Z, key, width, num_samples, rows)
        else:
            basis, X = compression.compress(Z, key, width, rows)

        def explore(active: Array) -> tuple[Progress, Array | None]:
            problem, starts = prepare(X, num_samples, active, rows), None
            if centroids is not None:
                first = matmul(centroids, basis) if compressed else centroids
            else:
                first, starts = _best_start(
                    problem, key, num_samples, n_init, tol, min(SCREEN, max_iter), rows
                )
            progress = begin(init(problem, first, rows), max_iter)
            progress = until(partial(update, problem, rows=rows), progress)
            return progress, problem.mean, starts

        def finish(found: tuple, active: Array) -> Result:
            progress, mean, starts = found
            problem = prepare(Z, num_samples, active, rows)
            if compressed:
                lifted = matmul(progress.state.offsets + mean, basis.T) - problem.mean
                # The first update scores all rows anew: no need to do so for the start's inertia.
                state = progress.state._replace(
                    offsets=lifted,
                    moved=jnp.ones_like(progress.state.moved),
                    error=jnp.float32(jnp.inf),
                )
                progress = progress._replace(state=state)
                progress = until(partial(update, problem, rows=rows), progress)
            centroids = progress.state.offsets + problem.mean
            squared = distances(Z, centroids, _rescore(problem, progress.state))[1]
            squared = jnp.where(active, squared, jnp.inf)
            # An update records the inertia it started from: shift by one, end with the result's.
            inertia = rows.total(jnp.sum(problem.real * jnp.min(squared, axis=1)))
            history = jnp.roll(progress.history, -1).at[-1].set(jnp.nan)
            return Result(
                components=centroids,
                activations=1 / (1 + jnp.sqrt(squared)),
                objective=inertia,
                iterations=progress.iteration,
                converged=progress.state.error <= tol,
                history=history.at[progress.iteration].set(inertia),
                starts=starts,
            )

        return each(finish)(each(explore)(active), active)

    return solve_on(mesh, local, Z, (key, jnp.float32(tol), init_centroids))


def _best_start(
    problem: Problem,
    key: PRNGKeyArray,
    num_samples: int,
    n_init: int,
    tol: Float[Array, ""],
    max_iter: int,
    rows: Rows,
) -> tuple[Float[Array, "K R"], Float[Array, "S K R"] | None]:
    """Seeded centroids; of several starts those that came to the best end on a sample of rows."""
    row_key, seed_key = jax.random.split(key)
    X = rows.take(problem.Z, sample(row_key, num_samples, len(problem.active)))
    sampled = prepare(X, len(X), problem.active)
    seeds = each(lambda key: seed(sampled, key))(jax.random.split(seed_key, n_init))
    if n_init == 1:
        return seeds[0], None

    def attempt(centroids: Array) -> State:
        progress = begin(init(sampled, centroids), max_iter)
        return run(partial(update, sampled), progress, tol=tol, max_iter=max_iter).state

    ended = each(attempt)(seeds)
    starts = best_first(ended.objective, ended.offsets)
    return starts[0] + sampled.mean, starts


def seed(problem: Problem, key: PRNGKeyArray) -> Float[Array, "K D"]:
    """Greedy k-means++: each new centroid is the best of a few rows drawn by squared distance."""
    K, X = len(problem.active), problem.Z - problem.mean
    trials = 2 + int(log(K))
    first_key, draw_key = jax.random.split(key)

    def squares(candidates: Int[Array, " T"]) -> Float[Array, "T N"]:
        crossed = matmul(X[candidates], X.T)
        squared = problem.energy + problem.energy[candidates][:, None] - 2 * crossed
        return jnp.maximum(squared, 0)

    def step(k: Array, carry: tuple) -> tuple:
        chosen, closest = carry
        uniform = jax.random.uniform(jax.random.fold_in(draw_key, k), (trials,))
        candidates = ONE_DEVICE.draw(closest, uniform)
        closest = jnp.minimum(closest, squares(candidates))
        best = jnp.argmin(jnp.sum(closest, axis=1))
        return chosen.at[k].set(candidates[best]), closest[best]

    first = jax.random.randint(first_key, (1,), 0, len(X))
    chosen = jnp.zeros(K, first.dtype).at[0].set(first[0])
    chosen, _ = jax.lax.fori_loop(1, K, step, (chosen, squares(first)[0]))
    return problem.Z[chosen].astype(jnp.float32)


def score(
    Z: Float[Array, "N D"],
    offsets: Float[Array, "K D"],
    mean: Float[Array, " D"],
    active: Bool[Array, " K"] | bool = True,
) -> Float[Array, "K N"]:
    """|z - c|^2 - |z - m|^2: a squared distance less what depends on the row alone."""
    bias = jnp.sum(offsets**2, axis=1) + 2 * matmul(offsets, mean)
    return jnp.where(active, bias, jnp.inf)[:, None] - 2 * inner_products(offsets, Z)


def _rescore(problem: Problem, state: State) -> Float[Array, "K N"]:
    """The scores with those of the moved centroids renewed, a block of them at a time."""
    K = len(state.moved)
    if K <= LARGE:
        return score(problem.Z, state.offsets, problem.mean, problem.active)
    order = jnp.argsort(~state.moved)  # stable: the moved ones first

    def renew_large(i: Array, scores: Array) -> Array:
        first = jnp.minimum(i * LARGE, K - LARGE)  # the last block reaches back over what is done
        offsets, active = (
            jax.lax.dynamic_slice_in_dim(x, first, LARGE) for x in (state.offsets, problem.active)
        )
        new = score(problem.Z, offsets, problem.mean, active)
        return jax.lax.dynamic_update_slice_in_dim(scores, new, first, 0)

    def renew_some(i: Array, scores: Array) -> Array:
        chosen = jax.lax.dynamic_slice_in_dim(order, jnp.minimum(i * BLOCK, K - BLOCK), BLOCK)
        new = score(problem.Z, state.offsets[chosen], problem.mean, problem.active[chosen])
        return scores.at[chosen].set(new)

    count = jnp.sum(state.moved)
    most = count > MOST * K
    # Two loops, of which one turns: they write where the scores are, and a condition would copy.
    scores = jax.lax.fori_loop(0, jnp.where(most, -(-K // LARGE), 0), renew_large, state.scores)
    return jax.lax.fori_loop(0, jnp.where(most, 0, -(-count // BLOCK)), renew_some, scores)


def _inertia(problem: Problem, least: Float[Array, " N"]) -> Float[Array, ""]:
    return jnp.sum(jnp.maximum(problem.energy + problem.real * least, 0))


def _totals(
    problem: Problem, labels: Int[Array, " N"], K: int
) -> tuple[Float[Array, " K"], Float[Array, "K D"]]:
    """How many rows each cluster has, and their sum."""

    def by_product(labels: Array) -> tuple[Array, Array]:
        members = jax.nn.one_hot(labels, K, dtype=jnp.float32) * problem.real[:, None]
        return jnp.sum(members, axis=0), matmul(members.T, problem.Z)

    def by_segment(labels: Array) -> tuple[Array, Array]:
        # Rows that pad Z are zero: they count for nothing in the sums.
        Z = problem.Z.astype(jnp.float32)
        return (
            jax.ops.segment_sum(problem.real, labels, K),
            jax.ops.segment_sum(Z, labels, K),
        )

    # Accelerators multiply faster than they scatter; a CPU adds rows at the speed of reading them.
    return jax.lax.platform_dependent(labels, cpu=by_segment, default=by_product)


def relocate(
    sums: Sums,
    far: Float[Array, "R D"],
    labels: Int[Array, " R"],
    empty: Bool[Array, " K"],
) -> Sums:
    """Move each empty cluster to one of the rows farthest from theirs, as scikit-learn does.

    far: those rows, the farthest first; labels: the clusters that they are in.
    """
    order = jnp.minimum(jnp.cumsum(empty) - 1, len(far) - 1)

    def move(k: Array, carry: tuple) -> tuple:
        counts, totals = carry
        one = jnp.where(empty[k], 1.0, 0.0)
        row, old = one * far[order[k]], labels[order[k]]
        counts = counts.at[old].add(-one).at[k].add(one)
        return counts, totals.at[old].add(-row).at[k].add(row)

    counts, totals = jax.lax.fori_loop(0, len(empty), move, (sums.counts, sums.totals))
    return Sums(counts, totals, sums.inertia)
