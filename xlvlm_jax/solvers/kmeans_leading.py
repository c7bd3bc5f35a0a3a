"""Nearest of many centroids on a CPU: a product with a few leading columns rules out most of them.

Let B[D, R] be orthonormal, x = (z - m) B and y = c' B, where c' = c - m. What lies outside the span
of B is bounded by its lengths s and t there (Cauchy and Schwarz):

    |z - c|^2 - |z - m|^2 = |c'|^2 - 2 (z - m) c' >= |c'|^2 - 2 (x y + s t)

The right side is a product with R + 1 instead of D columns. If B holds the leading directions of
the rows, it leaves hardly more than one centroid of a thousand for most rows. Two scores of each
row are then computed from all columns: that of its last centroid, and that of the centroid whose
bound is the lowest of all others. If the next bound is above the lower of the two, this one is the
nearest; otherwise the row is compared with all centroids. So the result is Lloyd's, up to rounding.

A row keeps its label and a lower bound on the scores of all other centroids. The bound stays true
for centroids that do not move, so only those that moved are multiplied: few, in late updates.

Bounds that last over updates: Hamerly, "Making k-means even faster", SDM 2010. Columns that rule
centroids out: Gao and Long, "High-dimensional approximate nearest neighbor search", SIGMOD 2023,
and SuperKMeans. They test random columns and may err; the bound above does not.

N rows, D width, K centroids, R columns of the basis, B rows per block, C centroids per chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from xlvlm_jax.solvers import compression
from xlvlm_jax.solvers import sums as sums_of_rows
from xlvlm_jax.solvers.collectives import Rows
from xlvlm_jax.solvers.kmeans_nearest import HELD, MOST, Nearest, compare, nearest
from xlvlm_jax.solvers.linalg import matmul

COLUMNS = 64  # of the product that rules centroids out, R + 1; more cost more than they rule out
# Least number of columns of Z for each of these, and of scores, with which this is faster than to
# keep and renew all scores.
LEAST_WIDTH, LEAST_SCORES = 4, 2**21
SLACK = 1e-6  # rounding error relative to the largest terms of a squared distance
CHUNK = 256  # centroids whose bounds are computed together
ROWS = 1024  # rows per block
# If more rows than the share HOPELESS had to be compared with all centroids, the next updates
# compare all rows, until the share, multiplied by AGAIN in each, is below it. So does the first
# update, whose centroids are rows, with all that rows have outside the span.
HOPELESS, AGAIN, FIRST = 0.6, 0.8, 0.7


class Leading(NamedTuple):
    """The rows in the leading columns."""

    basis: Float[Array, "D R"]  # B, with singular values of at most one
    rows: Float[Array, "N S"]  # x of every row, and s: S = R + 1


class Known(NamedTuple):
    """What is kept of the rows between updates."""

    labels: Int[Array, " N"]
    floors: Float[Array, " N"]  # lower bounds on the scores of all other centroids
    share: Float[Array, ""]  # of the rows that were compared with all centroids


def pays(N: int, D: int, K: int) -> bool:
    """Returns whether leading columns are worth their cost; an accelerator wants one product."""
    return jax.default_backend() == "cpu" and D >= LEAST_WIDTH * COLUMNS and N * K >= LEAST_SCORES


def of_sample(
    Z: Float[Array, "N D"],
    energy: Float[Array, " N"],
    terms_of_mean: Float[Array, ""],
    key: PRNGKeyArray,
    num_samples: Int[Array, ""] | int,
    rows: Rows,
    centre: compression.Centre,
) -> Leading:
    """Returns the rows in the leading columns of a sample of them.

    Args:
        Z: float[N, D].
        energy: float[N], |z - m|^2.
        terms_of_mean: see `of_basis`.
        key: random key.
        num_samples: number of leading rows of Z that count.
        rows: where the rows of Z are.
        centre: m, and which rows count.
    """
    found = compression.compress_by_sample(Z, key, COLUMNS - 1, num_samples, rows, centre)
    return of_basis(found.basis, found.X, energy, terms_of_mean)


def of_basis(
    basis: Float[Array, "D R"],
    X: Float[Array, "N R"],
    energy: Float[Array, " N"],
    terms_of_mean: Float[Array, ""],
) -> Leading:
    """Returns the rows in given columns.

    Args:
        basis: float[D, R], orthonormal up to rounding.
        X: float[N, R], (Z - 1 m) basis.
        energy: float[N], |z - m|^2.
        terms_of_mean: the mean's share of the terms of a product, for the rounding error of X.
    """
    # The inequality holds for all B with |B B^T| <= 1.
    rounding = matmul(basis.T, basis) - jnp.eye(basis.shape[1], dtype=basis.dtype)
    shrunk = 1 / jnp.sqrt(1 + jnp.linalg.norm(rounding))
    return Leading(shrunk * basis, _with_rest(shrunk * X, energy, energy + terms_of_mean))


def nothing(N: int, dtype: DTypeLike) -> Known:
    """Returns an empty record; the first `renew` must get infinite shifts."""
    return Known(jnp.zeros(N, jnp.int32), jnp.zeros(N, dtype), jnp.full((), FIRST, dtype))


def renew(
    Z: Float[Array, "N D"],
    mean: Float[Array, " D"],
    slack: Float[Array, " N"],
    leading: Leading,
    known: Known,
    offsets: Float[Array, "K D"],
    shifts: Float[Array, " K"],
    active: Bool[Array, " K"],
) -> Known:
    """Finds the nearest centroid of every row.

    Args:
        Z: float[N, D].
        mean: float[D], m.
        slack: float[N], largest rounding error of a score; -Inf for rows that pad Z.
        leading: the rows in the leading columns.
        known: what was known for the previous centroids.
        offsets: float[K, D], the new centroids minus m.
        shifts: float[K], how far each centroid moved; infinite if unknown.
        active: bool[K], an inactive centroid is no row's nearest.
    """
    N, K, dtype = len(Z), len(offsets), offsets.dtype
    squares = jnp.sum(offsets**2, axis=1)
    biases = jnp.where(active, squares, jnp.inf)
    # Moved centroids first; those that fill up the last chunk are nearest to nothing.
    moved, missing = shifts > 0, -K % CHUNK
    order = jnp.argsort(~moved).astype(jnp.int32)
    sides = _with_rest(matmul(offsets, leading.basis), squares, squares)[order]
    sides, order = jnp.pad(sides, ((0, missing), (0, 0))), jnp.pad(order, (0, missing))
    of_sides = jnp.where(jnp.arange(K + missing) < K, biases[order], jnp.inf)
    count = jnp.sum(moved, dtype=jnp.int32)
    anew = count > MOST * K
    count = jnp.where(anew, K, count)

    def scores_of(z: Array, labels: Array) -> Array:
        products = jax.lax.optimization_barrier(z * offsets[labels])
        return biases[labels] - 2 * matmul(products, jnp.ones(z.shape[1], dtype))

    def rule_out(i: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        first = jnp.minimum(i * size, N - size)  # the last block overlaps
        own, floor, x, error = (
            jax.lax.dynamic_slice_in_dim(values, first, size)
            for values in (*found[:2], leading.rows, slack)
        )

        def chunk(j: Array, best: Nearest) -> Nearest:
            side, of_side, numbers = (
                jax.lax.dynamic_slice_in_dim(values, j * CHUNK, CHUNK)
                for values in (sides, of_sides, order)
            )
            bounds = jax.lax.optimization_barrier(of_side[:, None] - 2 * matmul(side, x.T))
            return compare(bounds, best, numbers, own)

        start = Nearest.none(size, dtype)
        best = jax.lax.fori_loop(0, -(-count // CHUNK), chunk, start)
        z = sums_of_rows.block_of(Z, first, size) - mean
        of_own = scores_of(z, own)
        of_other = jnp.where(best.least < jnp.inf, scores_of(z, best.labels), jnp.inf)
        rest = jnp.minimum(floor, best.second)
        parts = (
            jnp.where(of_other < of_own, best.labels, own),
            jnp.minimum(rest, jnp.maximum(of_own, of_other)),
            # Negated, so that NaN is open too.
            ~(jnp.minimum(of_own, of_other) + error < rest),
        )
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(values, part, first, 0)
            for values, part in zip(found, parts, strict=True)
        )

    size, hopeless = min(ROWS, N), known.share > HOPELESS
    found = known.labels, jnp.where(anew, jnp.inf, known.floors), jnp.ones(N, bool)
    found = jax.lax.fori_loop(0, jnp.where(hopeless, 0, -(-N // size)), rule_out, found)
    labels, floors, is_open = found

    together = max(min(HELD // K, N), 1)
    opened, numbers = numbers_of(is_open & (slack > -jnp.inf), together)

    def compare_all(i: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        chosen = jax.lax.dynamic_slice_in_dim(numbers, i * together, together)
        z = Z[jnp.minimum(chosen, N - 1)] - mean
        scores = jax.lax.optimization_barrier(biases[:, None] - 2 * matmul(offsets, z.T))
        best = nearest(scores)
        return tuple(
            values.at[chosen].set(part, mode="drop")
            for values, part in zip(found, (best.labels, best.second), strict=True)
        )

    labels, floors = jax.lax.fori_loop(0, -(-opened // together), compare_all, (labels, floors))
    again = AGAIN * known.share
    return Known(labels, floors, jnp.where(hopeless, again, (opened / N).astype(dtype)))


def _with_rest(
    X: Float[Array, "M R"], squares: Float[Array, " M"], terms: Float[Array, " M"]
) -> Float[Array, "M S"]:
    """Returns X and the length of what it leaves out of squares, no less whatever the rounding."""
    rest = jnp.maximum(squares - jnp.sum(X**2, axis=1), 0) + SLACK * terms
    return jnp.concatenate([X, jnp.sqrt(rest)[:, None]], axis=1)


def numbers_of(chosen: Bool[Array, " N"], spare: int) -> tuple[Int[Array, ""], Int[Array, " M"]]:
    """Returns how many rows are chosen, and int32[N + spare]: their numbers, then N."""
    N = len(chosen)
    place = jnp.cumsum(chosen, dtype=jnp.int32)
    # Rows that are not chosen get an index out of range, which the scatter drops.
    place = jnp.where(chosen, place - 1, N + spare)
    numbers = jnp.full(N + spare, N, jnp.int32)
    return jnp.sum(chosen, dtype=jnp.int32), numbers.at[place].set(
        jnp.arange(N, dtype=jnp.int32), mode="drop"
    )
