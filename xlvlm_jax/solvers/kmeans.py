"""K-means.

    minimise   inertia(C, l) = sum_n |z_n - c_{l_n}|^2   over centroids C[K, D] and labels l[N]

by Lloyd's algorithm ("Least squares quantization in PCM", 1982) from greedy k-means++ centroids
(Arthur and Vassilvitskii, 2007) or from given ones. `tol` is compared to the squared distance that
the centroids moved in the last update, over the mean variance of Z's columns; 0 waits until no row
changes its cluster. Rule and default are scikit-learn's, so that both stop at the same update.

Distances are taken from the mean m of Z. With c' = c - m,

    |z - c|^2 = |z - m|^2 + |c'|^2 - 2 (z c' - m c')

The products stay small where the states share a large common direction, and Z is not copied.
"""

from functools import partial
from math import log
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from xlvlm_jax.solvers.loop import Result, begin, matmul, real_rows, run

SEED_WIDTH = 64  # random directions on which the seeding measures distances, when D is far larger
TINY = 1e-30


class Problem(NamedTuple):
    """Constants of a run."""

    Z: Float[Array, "N D"]
    rows: Float[Array, " N"]  # 1 for a sample, 0 for a row that pads Z on a mesh
    mean: Float[Array, " D"]
    energy: Float[Array, " N"]  # |z_n - m|^2
    variance: Float[Array, ""]  # mean over the columns


class State(NamedTuple):
    """What an update reads and writes."""

    offsets: Float[Array, "K D"]  # centroids minus the mean of Z
    objective: Float[Array, ""]  # inertia of the centroids that the last update started from
    error: Float[Array, ""]


def prepare(Z: Float[Array, "N D"], num_samples: int) -> Problem:
    """The constants for a Z whose first `num_samples` rows count."""
    rows = real_rows(Z, num_samples)
    mean = matmul(rows, Z) / num_samples
    energy = rows * jnp.sum((Z - mean) ** 2, axis=1)
    return Problem(Z, rows, mean, energy, jnp.sum(energy) / (num_samples * Z.shape[1]))


def init(problem: Problem, centroids: Float[Array, "K D"]) -> State:
    """The state at given centroids."""
    offsets = centroids - problem.mean
    objective = _inertia(problem, _scores(problem, offsets))
    return State(offsets, objective, jnp.float32(jnp.inf))


def update(problem: Problem, state: State) -> State:
    """Assign every row to its nearest centroid, then move each centroid to its rows' mean."""
    K = state.offsets.shape[0]
    scores = _scores(problem, state.offsets)
    labels = jnp.argmin(scores, axis=1)
    counts, sums = _totals(problem, labels, K)
    counts, sums = jax.lax.cond(
        jnp.any(counts == 0),
        lambda: _relocate(problem, scores, labels, counts, sums),
        lambda: (counts, sums),
    )
    offsets = jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, 1)[:, None], state.offsets)
    moved = jnp.sum((offsets - state.offsets) ** 2)
    error = moved / jnp.maximum(problem.variance, TINY)
    return State(offsets, _inertia(problem, scores), error)


def assign(
    Z: Float[Array, "N D"], centroids: Float[Array, "K D"]
) -> tuple[Int[Array, " N"], Float[Array, "N K"]]:
    """The nearest centroid of each row, and its squared distances to all of them."""
    # Measured from the centroids' mean, and only differences between centroids go through a
    # product; the smallest distance, which cancellation would hurt, is computed from the difference
    # itself.
    mean = jnp.mean(centroids, axis=0)
    offsets = centroids - mean
    bias = jnp.sum(offsets**2, axis=1) + 2 * matmul(offsets, mean)
    scores = bias - 2 * matmul(Z, offsets.T)
    labels = jnp.argmin(scores, axis=1)
    nearest = jnp.sum((Z - centroids[labels]) ** 2, axis=1)
    return labels, scores - jnp.min(scores, axis=1, keepdims=True) + nearest[:, None]


@jax.jit
def activations(Z: Float[Array, "N D"], centroids: Float[Array, "K D"]) -> Float[Array, "N K"]:
    """1 / (1 + distance to each centroid)."""
    return 1 / (1 + jnp.sqrt(assign(Z, centroids)[1]))


@partial(jax.jit, static_argnames=("num_samples", "num_concepts", "max_iter"))
def solve(
    Z: Float[Array, "N D"],
    key: PRNGKeyArray,
    *,
    num_samples: int,
    num_concepts: int,
    tol: Float[Array, ""] | float = 1e-4,
    max_iter: int = 300,
    init_centroids: Float[Array, "K D"] | None = None,
) -> Result:
    """Cluster the rows of Z; those from `num_samples` on are ignored. Objective: the inertia."""
    problem = prepare(Z, num_samples)
    if init_centroids is None:
        centroids = seed(problem, key, num_samples, num_concepts)
    else:
        centroids = init_centroids.astype(jnp.float32)
    progress = begin(init(problem, centroids), max_iter)
    progress = run(partial(update, problem), progress, tol=tol, max_iter=max_iter)
    centroids = progress.state.offsets + problem.mean
    squared = assign(Z, centroids)[1]
    # An update records the inertia it started from: shift by one, and end with the result's.
    inertia = jnp.sum(problem.rows * jnp.min(squared, axis=1))
    history = jnp.roll(progress.history, -1).at[-1].set(jnp.nan)
    return Result(
        components=centroids,
        activations=(1 / (1 + jnp.sqrt(squared)))[:num_samples],
        objective=inertia,
        iterations=progress.iteration,
        converged=progress.state.error <= tol,
        history=history.at[progress.iteration].set(inertia),
    )


def seed(
    problem: Problem, key: PRNGKeyArray, num_samples: int, num_concepts: int
) -> Float[Array, "K D"]:
    """Greedy k-means++: each new centroid is the best of a few rows drawn by squared distance.

    Only the draw depends on the distances, so a random projection, which keeps them within some
    percent (Johnson and Lindenstrauss), serves as well and makes the K passes over Z cheap.
    """
    K, D = num_concepts, problem.Z.shape[1]
    trials = 2 + int(log(K))
    project_key, first_key, draw_key = jax.random.split(key, 3)
    if 4 * SEED_WIDTH <= D:
        directions = jax.random.normal(project_key, (D, SEED_WIDTH)) / SEED_WIDTH**0.5
        X = matmul(problem.Z, directions) - matmul(problem.mean, directions)
    else:
        X = problem.Z - problem.mean
    energy = jnp.sum(X**2, axis=1)

    def distances(candidates: Int[Array, " T"]) -> Float[Array, "T N"]:
        chosen = X[candidates]
        squared = energy + energy[candidates][:, None] - 2 * matmul(chosen, X.T)
        return jnp.maximum(squared, 0) * problem.rows

    def step(k: Array, carry: tuple) -> tuple:
        chosen, closest = carry
        total = jnp.cumsum(closest)
        draws = jax.random.uniform(jax.random.fold_in(draw_key, k), (trials,)) * total[-1]
        candidates = jnp.minimum(jnp.searchsorted(total, draws, side="right"), num_samples - 1)
        closest = jnp.minimum(closest, distances(candidates))
        best = jnp.argmin(jnp.sum(closest, axis=1))
        return chosen.at[k].set(candidates[best]), closest[best]

    first = jax.random.randint(first_key, (1,), 0, num_samples)
    chosen = jnp.zeros(K, first.dtype).at[0].set(first[0])
    chosen, _ = jax.lax.fori_loop(1, K, step, (chosen, distances(first)[0]))
    return problem.Z[chosen].astype(jnp.float32)


def _scores(problem: Problem, offsets: Float[Array, "K D"]) -> Float[Array, "N K"]:
    """|z - c|^2 - |z - m|^2: a squared distance less what depends on the row alone."""
    bias = jnp.sum(offsets**2, axis=1) + 2 * matmul(offsets, problem.mean)
    return bias - 2 * matmul(problem.Z, offsets.T)


def _inertia(problem: Problem, scores: Float[Array, "N K"]) -> Float[Array, ""]:
    squared = problem.energy + problem.rows * jnp.min(scores, axis=1)
    return jnp.sum(jnp.maximum(squared, 0))


def _totals(
    problem: Problem, labels: Int[Array, " N"], K: int
) -> tuple[Float[Array, " K"], Float[Array, "K D"]]:
    """How many rows each cluster has, and their sum, measured from the mean of Z."""

    def by_product(labels: Array) -> tuple[Array, Array]:
        members = jax.nn.one_hot(labels, K, dtype=jnp.float32) * problem.rows[:, None]
        return jnp.sum(members, axis=0), matmul(members.T, problem.Z)

    def by_segment(labels: Array) -> tuple[Array, Array]:
        # Rows that pad Z are zero: they count for nothing in the sums.
        Z = problem.Z.astype(jnp.float32)
        return (
            jax.ops.segment_sum(problem.rows, labels, K),
            jax.ops.segment_sum(Z, labels, K),
        )

    # Accelerators multiply faster than they scatter; a CPU adds rows at the speed of reading them.
    counts, sums = jax.lax.platform_dependent(labels, cpu=by_segment, default=by_product)
    return counts, sums - counts[:, None] * problem.mean


def _relocate(
    problem: Problem,
    scores: Float[Array, "N K"],
    labels: Int[Array, " N"],
    counts: Float[Array, " K"],
    sums: Float[Array, "K D"],
) -> tuple[Float[Array, " K"], Float[Array, "K D"]]:
    """Move each empty cluster to one of the rows farthest from theirs, as scikit-learn does."""
    K = counts.shape[0]
    farness = jnp.where(problem.rows > 0, problem.energy + jnp.min(scores, axis=1), -jnp.inf)
    far = jax.lax.top_k(farness, K)[1]
    empty = counts == 0
    order = jnp.cumsum(empty) - 1

    def move(k: Array, carry: tuple) -> tuple:
        counts, sums = carry
        row = far[order[k]]
        one = jnp.where(empty[k], 1.0, 0.0)
        offset = one * (problem.Z[row] - problem.mean)
        counts = counts.at[labels[row]].add(-one).at[k].add(one)
        return counts, sums.at[labels[row]].add(-offset).at[k].add(offset)

    return jax.lax.fori_loop(0, K, move, (counts, sums))
