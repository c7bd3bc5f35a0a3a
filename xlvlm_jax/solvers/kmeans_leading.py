"""Nearest of many centroids on a CPU: a product with a few leading columns rules out most of them.

Let B[D, R] be orthonormal, x = (z - m) B and y = c' B, where c' = c - m. What lies outside the span
of B is bounded by its lengths s and t there (Cauchy and Schwarz):

    |z - c|^2 - |z - m|^2 = |c'|^2 - 2 (z - m) c' >= |c'|^2 - 2 (x y + s t)

The right side is a product with R + 2 instead of D columns: those of B, the lengths, and a column
of ones, which multiplies |c'|^2. If B holds the leading directions of the rows, it leaves hardly
more than one centroid of a thousand for most rows.

A row keeps its label, an upper bound on its own centroid's score, and a lower bound on the scores
of all others. If its centroid moves by d, its score changes by |c' + d|^2 - |c'|^2 - 2 (z - m) d,
which is bounded in the same way: the part of d outside the span is short. A row whose upper bound
is below all lower ones stays where it is. For the others, two scores are computed from all columns:
that of the last centroid, and that of the centroid whose bound is the lowest of all others. If the
next bound is above the lower of the two, this one is the nearest; otherwise the row is compared
with all centroids. So the result is Lloyd's, up to rounding.

Lower bounds stay true for centroids that do not move, so only those that moved are multiplied: few,
in late updates.

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
from xlvlm_jax.solvers.collectives import Rows
from xlvlm_jax.solvers.kmeans_nearest import MOST, Nearest, compare
from xlvlm_jax.solvers.linalg import matmul

# Columns of the product that rules centroids out, R + 2: more cost more than they rule out. At most
# this share of the columns of Z.
COLUMNS, SHARE = 64, 0.375
# Least numbers of columns of Z, and of scores, with which this is faster than to keep and renew all
# scores.
LEAST_WIDTH, LEAST_SCORES = 128, 2**21
SLACK = 1e-6  # rounding error relative to the largest terms of a squared distance
CHUNK = 256  # centroids whose bounds are computed together
ROWS = 512  # per block: its bounds of CHUNK centroids, half a megabyte, stay in a CPU's cache
TOGETHER = 256  # rows that are compared with all centroids together
# If more rows than the share HOPELESS had to be compared with all centroids, the next updates
# compare all rows, until the share, multiplied by AGAIN in each, is below it. So does the first
# update, whose centroids are rows, with all that rows have outside the span.
HOPELESS, AGAIN, FIRST = 0.6, 0.8, 0.7


class Leading(NamedTuple):
    """The rows in the leading columns."""

    basis: Float[Array, "D R"]  # B, with singular values of at most one
    rows: Float[Array, "N S"]  # x of every row, s, and 1: S = R + 2


class Known(NamedTuple):
    """What is kept of the rows between updates."""

    labels: Int[Array, " N"]
    uppers: Float[Array, " N"]  # upper bounds on the scores of these centroids
    floors: Float[Array, " N"]  # lower bounds on the scores of all other centroids
    offsets: Float[Array, "K D"]  # the centroids minus m
    share: Float[Array, ""]  # of the rows that were compared with all centroids


def pays(N: int, D: int, K: int) -> bool:
    """Returns whether leading columns are worth their cost; an accelerator wants one product."""
    return jax.default_backend() == "cpu" and D >= LEAST_WIDTH and N * K >= LEAST_SCORES


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
    R = min(COLUMNS, int(SHARE * Z.shape[1])) - 2
    found = compression.compress_by_sample(Z, key, R, num_samples, rows, centre)
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
    rows = _with_rest(shrunk * X, energy, energy + terms_of_mean)
    # The last column multiplies the summand of a centroid, so that a product is a whole bound.
    return Leading(shrunk * basis, jnp.concatenate([rows, jnp.ones_like(rows[:, :1])], axis=1))


def nothing(N: int, K: int, D: int, dtype: DTypeLike) -> Known:
    """Returns an empty record; the first `renew` must get infinite shifts."""
    # Separate arrays, because one buffer cannot be donated twice.
    uppers, floors, offsets = jnp.zeros(N, dtype), jnp.zeros(N, dtype), jnp.zeros((K, D), dtype)
    return Known(jnp.zeros(N, jnp.int32), uppers, floors, offsets, jnp.full((), FIRST, dtype))


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
    sides = _with_rest(matmul(offsets, leading.basis), squares, squares)
    sides = jnp.concatenate([-2 * sides, biases[:, None]], axis=1)[order]
    sides = jnp.pad(sides, ((0, missing), (0, 0))).at[K:, -1].set(jnp.inf)
    order = jnp.pad(order, (0, missing))
    count = jnp.sum(moved, dtype=jnp.int32)
    anew = count > MOST * K
    count = jnp.where(anew, K, count)

    # What a centroid's move adds to the score of a row is at most its change of square minus twice
    # the row's product with this.
    steps = offsets - known.offsets
    lengths = jnp.sum(steps**2, axis=1)
    inward = _with_rest(matmul(steps, leading.basis), lengths, lengths).at[:, -1].multiply(-1)
    grown = jnp.where(jnp.isinf(shifts), jnp.inf, squares - jnp.sum(known.offsets**2, axis=1))
    growths = jnp.concatenate([-2 * inward, grown[:, None]], axis=1)

    def products_of(rows: Array, others: Array) -> Array:
        products = jax.lax.optimization_barrier(rows * others)
        return matmul(products, jnp.ones(rows.shape[1], dtype))

    def rule_out(i: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        first = jnp.minimum(i * size, N - size)  # the last block overlaps
        own, upper, floor, x, error = (
            jax.lax.dynamic_slice_in_dim(values, first, size)
            for values in (known.labels, known.uppers, floors, leading.rows, slack)
        )

        def chunk(j: Array, best: Nearest) -> Nearest:
            side, numbers = (
                jax.lax.dynamic_slice_in_dim(values, j * CHUNK, CHUNK) for values in (sides, order)
            )
            bounds = jax.lax.optimization_barrier(matmul(side, x.T))
            return compare(bounds, best, numbers, own)

        start = Nearest.none(size, dtype)
        best = jax.lax.fori_loop(0, -(-count // CHUNK), chunk, start)
        step = products_of(x, growths[own])
        upper = upper + jnp.where(moved[own], step + error, 0)
        lowest = jnp.minimum(floor, best.least)
        # NaN is not below anything, so it stays open too.
        stays = upper + error < lowest
        parts = (
            upper,
            jnp.where(stays, lowest, jnp.minimum(floor, best.second)),
            jnp.where(stays | (best.least == jnp.inf), own, best.labels),
            ~stays & (error > -jnp.inf),
        )
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(values, part, first, 0)
            for values, part in zip(found, parts, strict=True)
        )

    size, hopeless = min(ROWS, N), known.share > HOPELESS
    floors = jnp.where(anew, jnp.inf, known.floors)
    found = known.uppers, floors, known.labels, jnp.zeros(N, bool)
    found = jax.lax.fori_loop(0, jnp.where(hopeless, 0, -(-N // size)), rule_out, found)
    uppers, floors, nearest_others, is_open = found
    opened, numbers = numbers_of(is_open, size)

    def compare_two(i: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        chosen = jax.lax.dynamic_slice_in_dim(numbers, i * size, size)
        rows = jnp.minimum(chosen, N - 1)
        z, own, other = Z[rows] - mean, known.labels[rows], nearest_others[rows]
        of_own = biases[own] - 2 * products_of(z, offsets[own])
        of_other = biases[other] - 2 * products_of(z, offsets[other])
        of_other = jnp.where(other == own, jnp.inf, of_other)
        least, rest = jnp.minimum(of_own, of_other), floors[rows]
        parts = (
            jnp.where(of_other < of_own, other, own),
            least,
            jnp.minimum(rest, jnp.maximum(of_own, of_other)),
            # Negated, so that NaN is open too.
            ~(least + slack[rows] < rest),
        )
        return tuple(
            values.at[chosen].set(part, mode="drop")
            for values, part in zip(found, parts, strict=True)
        )

    found = known.labels, uppers, floors, jnp.broadcast_to(hopeless, (N,))
    found = jax.lax.fori_loop(0, -(-opened // size), compare_two, found)
    *found, is_open = found

    together = min(TOGETHER, N)
    every = jnp.pad(offsets, ((0, missing), (0, 0)))
    of_every = jnp.pad(biases, (0, missing), constant_values=jnp.inf)
    opened, remaining = numbers_of(is_open & (slack > -jnp.inf), together)

    def compare_all(i: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        chosen = jax.lax.dynamic_slice_in_dim(remaining, i * together, together)
        z = Z[jnp.minimum(chosen, N - 1)] - mean

        def chunk(j: Array, best: Nearest) -> Nearest:
            some, bias, numbers = (
                jax.lax.dynamic_slice_in_dim(values, j * CHUNK, CHUNK)
                for values in (every, of_every, jnp.arange(K + missing, dtype=jnp.int32))
            )
            scores = jax.lax.optimization_barrier(bias[:, None] - 2 * matmul(some, z.T))
            return compare(scores, best, numbers)

        best = Nearest.none(together, dtype)
        best = jax.lax.fori_loop(0, (K + missing) // CHUNK, chunk, best)
        return tuple(
            values.at[chosen].set(part, mode="drop")
            for values, part in zip(found, best, strict=True)
        )

    found = jax.lax.fori_loop(0, -(-opened // together), compare_all, tuple(found))
    again = AGAIN * known.share
    share = jnp.where(hopeless, again, (opened / N).astype(dtype))
    return Known(*found, offsets=offsets, share=share)


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
