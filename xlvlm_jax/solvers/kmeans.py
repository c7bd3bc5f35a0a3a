"""K-means.

    minimise   inertia(C, l) = sum_n w_n |z_n - c_{l_n}|^2   over centroids C[K, D] and labels l[N]

by Lloyd's algorithm ("Least squares quantization in PCM", 1982), starting from greedy k-means++
centroids (Arthur and Vassilvitskii, 2007) or from given ones. `tol` is compared to the squared
distance that the centroids moved in the last update, divided by the mean variance of Z's columns;
with 0 the run ends once no row changes its cluster. Rule and default are scikit-learn's. The
weights w are 1 unless given.

If Z is wide and not small, and no centroids are given, the rows are first clustered in the few
columns of `compression`, and only the last updates read Z itself. This works because centroids are
means of rows and so lie in the row space of Z. Given centroids need not lie in few columns: from
them, every update is Lloyd's.

An update finds the nearest centroid of the rows whose nearest centroid can have changed
(`kmeans_assignment`), and moves every centroid to the mean of its rows.
"""

from functools import partial
from math import log
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from xlvlm_jax.solvers import compression, kmeans_assignment, kmeans_leading, residual
from xlvlm_jax.solvers import sums as sums_of_rows
from xlvlm_jax.solvers.buckets import bucket_of_concepts, bucket_of_rows, is_small, room_for
from xlvlm_jax.solvers.collectives import ONE_DEVICE, Rows
from xlvlm_jax.solvers.compiling import jit
from xlvlm_jax.solvers.kmeans_assignment import Kept, Problem, Ruled, Sums, inertia, score
from xlvlm_jax.solvers.kmeans_leading import Leading
from xlvlm_jax.solvers.kmeans_nearest import HELD, nearest
from xlvlm_jax.solvers.linalg import matmul, real_dtype
from xlvlm_jax.solvers.loop import Progress, Result, begin, each, largest_of_runs, run
from xlvlm_jax.solvers.phases import Carry, Counts, Phase, one_run_each, run_compiled, scalar
from xlvlm_jax.solvers.restarts import best_first, draw_weighted, sample, sample_size
from xlvlm_jax.solvers.sums import Wide
from xlvlm_jax.solvers.validation import on_host

OVERSAMPLE = 12  # columns of the compressed Z beyond K
BY_SAMPLE = 28  # the same if a row sample gives them: a column then costs a third
ENOUGH = 2  # a sample is used if Z has this many times its rows
SCREEN = 100  # updates before starts are compared
# Rows of which the best becomes the next centroid of a start, if choosing among that many takes at
# most so many multiplications; otherwise 2 + log K, which is scikit-learn's number.
CANDIDATES, CHOOSING = 32, 2**28
LONG = 2**22  # scores of an update that take longer to compare than faster loops to compile
CANCELS = 0.05  # of its terms: a smaller squared distance has lost more than a digit
TINY = 1e-30


class State(NamedTuple):
    """What an update reads and writes."""

    offsets: Float[Array, "K D"]  # centroids minus the mean of Z
    shifts: Float[Array, " K"]  # how far each centroid moved since `kept` was computed
    kept: Kept  # what is known about the rows' nearest centroids
    objective: Float[Array, ""]  # inertia at the start of the last update
    error: Float[Array, ""]


def prepare(
    Z: Float[Array, "N D"],
    num_samples: Int[Array, ""] | int,
    active: Any,  # bool[K]; None before the runs are separated
    rows: Rows = ONE_DEVICE,
    weights: Float[Array, " N"] | None = None,
) -> Problem:
    """Returns the constants for a Z whose first `num_samples` rows count, with their weights."""
    real = (rows.numbers(len(Z)) < num_samples).astype(real_dtype(Z))
    mean = sums_of_rows.column_means(Z, num_samples, rows, weights).high
    energy = real * sums_of_rows.squared_distances(Z, mean)
    if weights is None:
        counted, whole = energy, jnp.asarray(num_samples, energy.dtype)
    else:
        counted, whole = weights * energy, rows.total(sums_of_rows.total(weights)).value
    spread = rows.total(sums_of_rows.total(counted))
    variance = spread.value / (whole * Z.shape[1])
    far = sums_of_rows.is_far(mean, variance)
    return Problem(Z, real, weights, mean, energy, spread, variance, active, far)


def with_leading(
    problem: Problem,
    num_clusters: int,
    key: PRNGKeyArray,
    num_samples: Int[Array, ""] | int,
    rows: Rows = ONE_DEVICE,
) -> Problem:
    """Returns the problem with its rows in leading columns, if these pay: see `kmeans_leading`."""
    N, D = problem.Z.shape
    # They replace kept scores; with fewer centroids, bounds on distances are kept instead.
    many = kmeans_assignment.keeps_scores(num_clusters)
    if not (many and kmeans_leading.pays(N, D, num_clusters)):
        return problem
    centre = compression.Centre(problem.mean, problem.far, problem.real)
    of_mean = kmeans_assignment.terms_of_mean(problem)
    given = jax.random.fold_in(key, 0), num_samples, rows, centre
    leading = kmeans_leading.of_sample(problem.Z, problem.energy, of_mean, *given)
    return problem._replace(leading=leading)


def init(problem: Problem, offsets: Float[Array, "K D"], kept: Kept | None = None) -> State:
    """Returns the state at centroids m + offsets, and what is known of the rows, if anything."""
    inf = jnp.full((), jnp.inf, offsets.dtype)
    shifts = jnp.full(len(offsets), inf if kept is None else 0, offsets.dtype)
    kept = kmeans_assignment.nothing(problem) if kept is None else kept
    return State(offsets, shifts, kept, inf, inf)


def update(problem: Problem, state: State, rows: Rows = ONE_DEVICE) -> State:
    """Assigns every row to its nearest centroid, then moves the centroids to their rows' means."""
    kept, labels, sums = kmeans_assignment.renew(problem, state.kept, state.offsets, state.shifts)
    sums = rows.total(sums)
    objective = inertia(problem.spread, state.offsets, sums)
    empty = (sums.counts.high == 0) & problem.active

    def fill_empty() -> Sums:
        squared = residual.of_labels(problem.Z, labels, state.offsets, problem.mean)
        far = rows.largest(jnp.where(problem.counted > 0, squared, -jnp.inf), len(empty))
        of = rows.take(labels.astype(jnp.float32), far).astype(jnp.int32)
        # A row that lies on its centroid would leave its own cluster empty.
        weights = rows.take(problem.counted, far) * (rows.take(squared, far) > 0)
        return relocate(sums, rows.take(problem.Z, far) - problem.mean, weights, of, empty)

    # Without an empty cluster it changes nothing: runs side by side decide together.
    sums = jax.lax.cond(largest_of_runs(jnp.any(empty)), fill_empty, lambda: sums)
    offsets, shifts, error = advance(problem.variance, state.offsets, sums)
    return State(offsets, shifts, kept, objective, error)


def advance(
    variance: Float[Array, ""],
    offsets: Float[Array, "K D"],
    sums: Sums,
) -> tuple[Float[Array, "K D"], Float[Array, " K"], Float[Array, ""]]:
    """Moves each centroid to the mean of its rows; a centroid without rows stays.

    Args:
        variance: float[], mean variance of Z's columns.
        offsets: float[K, D], centroids minus the mean of Z.
        sums: counts and totals of the rows of each centroid.

    Returns:
        new offsets[K, D], how far each centroid moved [K], and the error that `tol` is compared to.
    """
    counts = sums.counts.value[:, None]
    new = jnp.where(counts > 0, sums.totals.value / jnp.where(counts > 0, counts, 1), offsets)
    squares = jnp.sum((new - offsets) ** 2, axis=1)
    return new, jnp.sqrt(squares), jnp.sum(squares) / jnp.maximum(variance, TINY)


def assign(
    Z: Float[Array, "N D"], centroids: Float[Array, "K D"]
) -> tuple[Int[Array, " N"], Float[Array, "N K"]]:
    """Returns the nearest centroid of each row, and its squared distances to all centroids."""
    mean = jnp.mean(centroids, axis=0)
    offsets = centroids - mean
    scores = score(Z, offsets, mean, sums_of_rows.is_far(mean, jnp.mean(offsets**2)))
    labels, least, _ = nearest(scores)
    return labels, _squared(scores, least, residual.of_labels(Z, labels, centroids))


def distances(
    problem: Problem, offsets: Float[Array, "K D"], scores: Float[Array, "K N"]
) -> Float[Array, "N K"]:
    """Returns the squared distances of all rows to the centroids m + offsets, from their scores."""
    labels, least, _ = nearest(scores)
    squared = problem.energy + least
    largest = jnp.max(jnp.sum(offsets**2, axis=1))
    terms = problem.energy + kmeans_assignment.terms_of_mean(problem) + largest

    def exact() -> Array:
        return residual.of_labels(problem.Z, labels, offsets, problem.mean)

    cancels = jnp.any((problem.real > 0) & (squared < CANCELS * terms))
    return _squared(scores, least, jax.lax.cond(cancels, exact, lambda: squared))


def _squared(
    scores: Float[Array, "K N"], least: Float[Array, " N"], nearest: Float[Array, " N"]
) -> Float[Array, "N K"]:
    # Only differences between centroids come from a product. The smallest distance, which would
    # suffer from cancellation, is passed in.
    return (scores - least + nearest).T


def _similarities(
    problem: Problem, offsets: Float[Array, "K D"], unit: Float[Array, ""]
) -> tuple[Float[Array, "N K"], Float[Array, " N"]]:
    """Returns what `similarity` does of all distances, and the lowest square of each row.

    By blocks of rows: with many centroids, a CPU would read and write [N, K] several times.
    """
    N, K = len(problem.Z), len(offsets)
    size = max(min(HELD // K, N), 1)

    def block(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        first = jnp.minimum(i * size, N - size)  # the last block overlaps
        z = sums_of_rows.block_of(problem.Z, first, size)
        scores = score(z, offsets, problem.mean, problem.far, problem.active)
        scores = jax.lax.optimization_barrier(scores)
        labels, least, _ = nearest(scores)
        own = residual.of_labels(z, labels, offsets, problem.mean)
        similar, lowest = found
        some = similarity(_squared(scores, least, own), unit)
        similar = jax.lax.dynamic_update_slice_in_dim(similar, some, first, 0)
        return similar, jax.lax.dynamic_update_slice_in_dim(lowest, own, first, 0)

    found = jnp.zeros((N, K), offsets.dtype), jnp.zeros(N, offsets.dtype)
    return jax.lax.fori_loop(0, -(-N // size), block, found)


def _of_whole(leading: Leading, inside: Problem, whole: Problem, basis: Array) -> Problem:
    """Returns the whole problem, its rows in the leading ones of the columns of `basis`."""
    X = leading.rows[:, :-2] + matmul(inside.mean, leading.basis)
    of_mean = kmeans_assignment.terms_of_mean(whole)
    given = matmul(basis, leading.basis), X, whole.energy, of_mean
    return whole._replace(leading=kmeans_leading.of_basis(*given))


@jit
def activations(
    Z: Float[Array, "N D"], centroids: Float[Array, "K D"], unit: Float[Array, ""] | float = 1.0
) -> Float[Array, "N K"]:
    """Returns 1 / (1 + distance to each centroid), for Z and centroids in units of `unit`."""
    return similarity(assign(Z, centroids)[1], unit)


@jit
def nearest_and_distances(
    Z: Float[Array, "N D"], centroids: Float[Array, "K D"], unit: Float[Array, ""] | float
) -> tuple[Int[Array, " N"], Float[Array, "N K"]]:
    """Returns the nearest centroid of each row, and its distances in multiples of 1 / `unit`."""
    labels, squared = assign(Z, centroids)
    return labels, unit * distance(squared)


def similarity(
    squared: Float[Array, "..."], unit: Float[Array, ""] | float = 1.0
) -> Float[Array, "..."]:
    """Returns 1 / (1 + distance), for squared distances in units of unit^2."""
    return 1 / (1 + unit * distance(squared))


def distance(squared: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the square root, with slope zero at zero so that the derivative is finite."""
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), 0)


def columns(num_samples: int, num_concepts: int) -> tuple[int, bool]:
    """Returns the number of columns of a compressed Z, and whether a sample of rows gives them."""
    by_sample = num_samples >= ENOUGH * compression.SAMPLE * (num_concepts + BY_SAMPLE)
    return num_concepts + (BY_SAMPLE if by_sample else OVERSAMPLE), by_sample


class Given(NamedTuple):
    """Inputs of a run other than Z."""

    key: PRNGKeyArray
    tol: Float[Array, ""]
    unit: Float[Array, ""]
    centroids: Float[Array | np.ndarray, "K D"] | None
    weights: Float[Array | np.ndarray, " N"] | None  # of all rows, on every device
    counts: Counts


class Fixed(NamedTuple):
    """What no update changes. basis and X are None unless Z is compressed."""

    problem: Problem  # without its matrix and without `active`
    basis: Float[Array, "D R"] | None
    X: Float[Array, "N R"] | None  # Z minus its mean, in the few columns of `compression`
    whole: Problem | None  # the problem of Z, if `problem` is that of X
    unit: Float[Array, ""]
    active: Bool[Array, "Q K"]  # which centroids are in use, for each number of clusters
    starts: Float[Array, "Q S K R"] | None


class Plan(NamedTuple):
    """Settings that are fixed at compile time, and the phases of the solver."""

    most: int  # K, the number of centroids of all runs, of which some may not be in use
    room: int  # number of updates that the history has room for
    n_init: int
    compressed: int  # number of columns of the compressed Z; 0 if it is not compressed
    by_sample: bool  # whether a sample of the rows gives these columns
    candidates: int | None  # of each centroid of a start, see `seed`
    has_long_loops: bool = False  # see `compiling`
    activations: bool = True  # whether the result has them

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Phases in the order they run."""
        repeated = Phase(self.improve, repeats=True)
        if not self.compressed:
            return Phase(self.explore), repeated, Phase(self.finish)
        in_columns = Phase(self.explore), Phase(self.improve_in_columns, repeats=True)
        return *in_columns, Phase(self.lift), repeated, Phase(self.finish)

    def runs(self, counts: Counts) -> tuple[int, ...]:
        """Returns the number of clusters of each run."""
        return one_run_each(counts)

    def explore(self, Z: Array, given: tuple, limit: Any, rows: Rows) -> Carry:
        """Compresses wide rows; starts from the given centroids or from the best of several."""
        key, tol, unit, centroids, of_all, (num_samples, num_concepts, max_iter) = given
        all_active = jnp.arange(self.most) < num_concepts[:, None]
        weights = None if of_all is None else of_all[rows.numbers(len(Z))]
        whole = prepare(Z, num_samples, None, rows, weights)
        basis, X, common = None, Z, whole
        if self.compressed:
            centre = compression.Centre(whole.mean, whole.far, whole.real, weights)
            # The directions of a sample would miss heavy rows.
            if self.by_sample and weights is None:
                counts = self.compressed, num_samples
                basis, X = compression.compress_by_sample(Z, key, *counts, rows, centre)
            else:
                basis, X = compression.compress(Z, key, self.compressed, rows, centre)
            # Centroids lie in the compressed columns, and so does everything they explain of the
            # full spread.
            common = prepare(X, num_samples, None, rows, weights)
            common = common._replace(spread=whole.spread)
        common = with_leading(common, self.most, key, num_samples, rows)
        mean = whole.mean

        def first(active: Array) -> tuple[Progress, Array | None]:
            problem, starts = common._replace(active=active), None
            if centroids is not None:
                chosen = centroids - mean
            else:
                screen, counts = jnp.minimum(SCREEN, max_iter), (num_samples, self.n_init)
                chosen, starts = _best_start(
                    problem, key, *counts, tol, screen, rows, self.candidates
                )
            return begin(init(problem, chosen), self.room), starts

        progress, starts = each(first)(all_active)
        X, whole = (X, whole._replace(Z=None)) if self.compressed else (None, None)
        unit = unit.astype(real_dtype(Z))
        fixed = Fixed(common._replace(Z=None), basis, X, whole, unit, all_active, starts)
        return Carry(tol, fixed, progress)

    def improve_in_columns(self, Z: Array, carry: Carry, limit: Any, rows: Rows) -> Carry:
        """Runs updates on the compressed rows."""
        return self._run(carry.fixed.X, carry, limit, rows)

    def lift(self, Z: Array, carry: Carry, limit: Any, rows: Rows) -> Carry:
        """Maps the centroids back to all columns."""
        tol, fixed, progress = carry
        leading = fixed.problem.leading
        if leading is not None:
            whole = _of_whole(leading, fixed.problem, fixed.whole, fixed.basis)
            fixed = fixed._replace(whole=whole)

        def raise_one(progress: Progress, active: Array) -> Progress:
            inside = progress.state.offsets + fixed.problem.mean
            problem = fixed.whole._replace(Z=Z, active=active)
            kept = kmeans_assignment.of_columns(problem, fixed.X, inside)
            return progress._replace(state=init(problem, matmul(inside, fixed.basis.T), kept))

        progress = each(raise_one)(progress, fixed.active)
        fixed = fixed._replace(problem=fixed.whole, basis=None, X=None, whole=None)
        return Carry(tol, fixed, progress)

    def improve(self, Z: Array, carry: Carry, limit: Any, rows: Rows) -> Carry:
        """Runs updates on Z."""
        return self._run(Z, carry, limit, rows)

    def _run(self, Z: Array, carry: Carry, limit: Any, rows: Rows) -> Carry:
        tol, fixed, progress = carry

        def one(progress: Progress, active: Array) -> Progress:
            step = partial(update, fixed.problem._replace(Z=Z, active=active), rows=rows)
            return run(step, progress, tol=tol, max_iter=limit)

        return carry._replace(progress=each(one)(progress, fixed.active))

    def finish(self, Z: Array, carry: Carry, limit: Any, rows: Rows) -> Result:
        """Computes all distances to the final centroids, or only those to the nearest ones."""
        tol, fixed, progress = carry

        def one(progress: Progress, active: Array) -> Result:
            problem = fixed.problem._replace(Z=Z, active=active)
            offsets, shifts, kept, _, _ = progress.state
            # What is measured is what is returned: far from zero the sum is rounded.
            components = offsets + problem.mean
            exact, offsets = offsets, components - problem.mean
            if not self.activations:
                shifts = shifts + jnp.sqrt(jnp.sum((offsets - exact) ** 2, axis=1))
                labels = kmeans_assignment.renew(problem, kept, offsets, shifts, is_last=True)[1]
                least = residual.of_labels(Z, labels, offsets, problem.mean)
                similar = None
            elif isinstance(kept, Ruled):
                similar, least = _similarities(problem, offsets, fixed.unit)
            else:
                scores = kmeans_assignment.scores_of(problem, kept, offsets, shifts)
                squared = jnp.where(active, distances(problem, offsets, scores), jnp.inf)
                similar, least = similarity(squared, fixed.unit), jnp.min(squared, axis=1)
            # An update records the inertia it started from: shift by one, and end with the
            # result's.
            inertia = rows.total(sums_of_rows.total(problem.counted * least)).value
            history = jnp.roll(progress.history, -1).at[-1].set(jnp.nan)
            return Result(
                components=components,
                activations=similar,
                objective=inertia,
                iterations=progress.iteration,
                converged=progress.state.error <= tol,
                history=history.at[progress.iteration].set(inertia),
            )

        return each(one)(progress, fixed.active)._replace(starts=fixed.starts)


def plan(
    key: PRNGKeyArray,
    *,
    width: int,
    num_samples: int,
    num_concepts: tuple[int, ...],
    tol: Float[Array, ""] | float = 1e-4,
    max_iter: int = 300,
    n_init: int = 1,
    init_centroids: Float[Array | np.ndarray, "K D"] | None = None,
    unit: Float[Array, ""] | float = 1.0,
    sample_weight: Float[Array | np.ndarray, " N"] | None = None,
    activations: bool = True,
) -> tuple[Plan, Given]:
    """Returns how to cluster the rows of Z[N, width] for each of Q numbers of clusters.

    Args:
        key: random key.
        width: number of columns of Z.
        num_samples: number of leading rows of Z that count.
        num_concepts: Q numbers of clusters.
        tol: see the head of this file.
        max_iter: maximum number of updates.
        n_init: number of starts; the best one on a sample of the rows is kept.
        init_centroids: float[K, D] to start from; None for k-means++.
        unit: Z is in multiples of it; the activations' distances are not.
        sample_weight: float[N], weights of all rows, also on a mesh; zero from `num_samples` on.
        activations: whether the result has activations, which take N K numbers and multiplications
            of all rows with all centroids.

    Returns:
        the plan and its inputs. The result of a solve has a leading axis Q; its centroids beyond a
        run's own number are meaningless.
    """
    K = max(num_concepts)
    most = bucket_of_concepts(K, num_samples, width)
    few, by_sample = columns(num_samples, K)
    # A small Z is not compressed: that would save less time than another program takes to compile.
    wide = width >= 4 * (K + OVERSAMPLE) and num_samples > few
    compressed = few if wide and not is_small(num_samples, width, most) else 0
    if init_centroids is not None:
        compressed = 0  # they would be projected
        # On the host if they are there, where it takes no program.
        centroids = on_host(init_centroids)
        xp: Any = np if isinstance(centroids, np.ndarray) else jnp
        last = xp.repeat(centroids[-1:], most - len(centroids), axis=0)
        init_centroids = xp.concatenate([centroids, last])
    numbers = scalar(tol), scalar(unit)
    is_long = bucket_of_rows(num_samples, width) * most >= LONG
    counts = Counts.of(num_samples, num_concepts, max_iter)
    compared = min(sample_size(most), bucket_of_rows(num_samples, width))
    choosing = compared * (compressed or width) * most * CANDIDATES
    candidates = CANDIDATES if choosing <= CHOOSING else None
    sizes = most, room_for(max_iter), n_init, compressed, by_sample, candidates, is_long
    return (
        Plan(*sizes, activations),
        Given(key, *numbers, init_centroids, sample_weight, counts),
    )


def solve(
    Z: Float[Array, "N D"], key: PRNGKeyArray, *, mesh: Mesh | None = None, **options: Any
) -> Result:
    """Clusters the rows in one compiled program; the options are those of `plan`."""
    return run_compiled(*plan(key, width=Z.shape[1], **options), Z, mesh)


def _best_start(
    problem: Problem,
    key: PRNGKeyArray,
    num_samples: Int[Array, ""],
    n_init: int,
    tol: Float[Array, ""],
    max_iter: Int[Array, ""],
    rows: Rows,
    candidates: int | None,
) -> tuple[Float[Array, "K R"], Float[Array, "S K R"] | None]:
    """Returns initial centroids minus the mean, and with several starts where each one ended.

    Several starts run on a sample of the rows, and the one that ends best is returned. Where each
    one ended is relative to the mean of that sample.
    """
    row_key, seed_key = jax.random.split(key)
    K = len(problem.active)
    if problem.weights is None:
        numbers, weights = sample(row_key, num_samples, K, len(problem.Z), rows), None
    else:
        own, size = problem.weights, sample_size(K)
        numbers, weights = draw_weighted(row_key, own, size, num_samples, rows)
    X = rows.take(problem.Z, numbers)
    sampled = prepare(X, jnp.minimum(num_samples, len(X)), problem.active, weights=weights)
    seeds = each(lambda key: seed(sampled, key, candidates))(jax.random.split(seed_key, n_init))
    moved = sampled.mean - problem.mean
    if n_init == 1:
        return seeds[0] + moved, None

    def attempt(offsets: Array) -> State:
        progress = begin(init(sampled, offsets), SCREEN)
        return run(partial(update, sampled), progress, tol=tol, max_iter=max_iter).state

    ended = each(attempt)(seeds)
    starts = best_first(ended.objective, ended.offsets)
    return starts[0] + moved, starts


def seed(problem: Problem, key: PRNGKeyArray, candidates: int | None = None) -> Float[Array, "K D"]:
    """Returns k-means++ centroids minus the mean.

    Greedy: each new centroid is the best of a few rows drawn in proportion to squared distance.

    Args:
        problem: constants of the run.
        key: random key.
        candidates: how many rows are drawn for each centroid; None for 2 + log K.
    """
    K, X, counted = len(problem.active), problem.Z - problem.mean, problem.counted
    in_use = jnp.sum(problem.active, dtype=jnp.int32)
    most = candidates or 2 + int(log(K))
    trials = candidates or 2 + jnp.log(in_use).astype(jnp.int32)
    first_key, draw_key = jax.random.split(key)

    def squares(drawn: Int[Array, " T"]) -> Float[Array, "T N"]:
        crossed = matmul(X[drawn], X.T)
        squared = problem.energy + problem.energy[drawn][:, None] - 2 * crossed
        return jnp.maximum(squared, 0)

    def step(k: Array, carry: tuple) -> tuple:
        chosen, closest = carry
        uniform = jax.random.uniform(jax.random.fold_in(draw_key, k), (most,), jnp.float32)
        drawn = ONE_DEVICE.draw(counted * closest, uniform)
        drawn = jnp.where(jnp.arange(most) < trials, drawn, drawn[0])
        # If all distinct rows are chosen already, do not pick a row of zero weight.
        drawn = jnp.where(counted[drawn] > 0, drawn, chosen[0])
        closest = jnp.minimum(closest, squares(drawn))
        best = jnp.argmin(jnp.sum(counted * closest, axis=1))
        return chosen.at[k].set(drawn[best]), closest[best]

    # Draws have one dtype: a key gives the same rows in float32 and in float64.
    first = ONE_DEVICE.draw(counted, jax.random.uniform(first_key, (1,), jnp.float32))
    chosen = jnp.zeros(K, first.dtype).at[0].set(first[0])
    chosen, _ = jax.lax.fori_loop(1, in_use, step, (chosen, squares(first)[0]))
    return X[chosen]


def relocate(
    sums: Sums,
    far: Float[Array, "R D"],
    weights: Float[Array, " R"],
    labels: Int[Array, " R"],
    empty: Bool[Array, " K"],
) -> Sums:
    """Moves each empty cluster to one of the rows farthest from their centroids, like scikit-learn.

    Args:
        sums: counts and totals of each cluster.
        far: float[R, D], those rows minus the mean, farthest first.
        weights: float[R], their weights.
        labels: int[R], their clusters.
        empty: bool[K], whether a cluster is empty.
    """
    order = jnp.minimum(jnp.cumsum(empty) - 1, len(far) - 1)

    def move(k: Array, sums: Sums) -> Sums:
        old = labels[order[k]]
        weight = empty[k] * weights[order[k]]

        def moved(total: Wide, part: Array) -> Wide:
            return total + jnp.zeros_like(total.high).at[old].add(-part).at[k].add(part)

        return Sums(moved(sums.counts, weight), moved(sums.totals, weight * far[order[k]]))

    return jax.lax.fori_loop(0, len(empty), move, sums)
