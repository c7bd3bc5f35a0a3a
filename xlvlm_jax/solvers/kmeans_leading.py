"""Nearest of many centroids on a CPU: a product with a few leading columns rules out most of them.

Let B[D, R] be orthonormal, x = (z - m) B and y = c' B, where c' = c - m. What lies outside the span
of B is bounded by its lengths s and t there (Cauchy and Schwarz):

    |z - c|^2 - |z - m|^2 = |c'|^2 - 2 (z - m) c' >= |c'|^2 - 2 (x y + s t)

The right side is a product with R + 2 instead of D columns: those of B, the lengths, and a column
of ones, which multiplies |c'|^2. If B holds the leading directions of the rows, it leaves hardly
more than one centroid of a thousand for most rows.

A row keeps its label, an upper bound on its own centroid's score, and a lower bound on the scores
of others. If its centroid moves by d, its score changes by |c' + d|^2 - |c'|^2 - 2 (z - m) d,
which is bounded in the same way: the part of d outside the span is short. A row whose upper bound
is below all lower ones stays where it is. For the others, scores are computed from all columns:
that of the last centroid, and those of a few candidates, in the order of their bounds, while these
are not above the lowest score. If all other bounds are above it, its centroid is the nearest;
otherwise the row is compared with all centroids near it. So the result is Lloyd's, up to rounding.

Many rows are in blocks, sorted by their labels, and each block keeps for each centroid a lower
bound on its score minus the upper bound of a row: the least of the block. A centroid of which it is
positive is nearest to no row of the block. A move d lowers it by at most what the rows' upper
bounds rise, and by 2 (x' d + r |d|) for rows within r of x'. Until it is used up, the block is not
multiplied by this centroid; the others are near. Lower bounds of these stay true while they do not
move, so only those that moved are multiplied: few, in late updates.

Bounds that last over updates: Hamerly, "Making k-means even faster", SDM 2010; for groups of rows:
Kanungo et al., "An efficient k-means clustering algorithm", TPAMI 2002. Columns that rule
centroids out: Gao and Long, "High-dimensional approximate nearest neighbor search", SIGMOD 2023,
and SuperKMeans. They test random columns and may err; the bound above does not.

N rows, D width, K centroids, R columns of the basis, B rows per block, C centroids per chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from xlvlm_jax.solvers import compression
from xlvlm_jax.solvers.collectives import Rows
from xlvlm_jax.solvers.kmeans_nearest import (
    MOST,
    Candidates,
    Nearest,
    compare,
    compare_square,
    least_of_each,
)
from xlvlm_jax.solvers.linalg import matmul
from xlvlm_jax.solvers.loop import largest_of_runs
from xlvlm_jax.solvers.sums import block_of

# Columns of the product that rules centroids out, R + 2: more cost more than they rule out. At most
# this share of the columns of Z.
COLUMNS, SHARE = 64, 0.5
# From so many rows and centroids on, rows are in blocks, which otherwise cost more than they save.
# The columns of many rows come from a sample MORE times as large, in so many rounds.
MANY_ROWS, MANY_CENTROIDS, MORE, ROUNDS = 2**16, 2**10, 4, 3
# Least numbers of columns of Z, and of scores, with which this is faster than to keep and renew all
# scores.
LEAST_WIDTH, LEAST_SCORES = 128, 2**21
SLACK = 1e-6  # rounding error relative to the largest terms of a squared distance
# Centroids whose bounds are computed together: so many, or MANY_CHUNK of at least MOST_CENTROIDS.
CHUNK, MANY_CHUNK, MOST_CENTROIDS = 256, 1024, 2**13
# Rows whose bounds of CHUNK centroids stay in a CPU's cache; per block.
ROWS, BLOCK = 512, 256
# Scores of a row that are computed one by one before it is compared with all, for so many centroids
# at least. If all scores take fewer multiplications outside the leading columns than MANY_PRODUCTS,
# comparing with all costs too little: one.
CANDIDATES, MANY_PRODUCTS = {0: 4, 2**12: 8, MOST_CENTROIDS: 16}, 3 * 2**17
TOGETHER = 256  # rows that are compared with all columns together
MOST_GAPS = 2**24  # bounds of blocks and centroids that are kept
# If more than the share HOPELESS of all scores had to be computed from all columns, the next
# updates compare all rows, until the share, multiplied by AGAIN in each, is below it. So does the
# first update, whose centroids are rows, with all that rows have outside the span.
HOPELESS, AGAIN, FIRST = 0.6, 0.8, 0.7


class Leading(NamedTuple):
    """The rows in the leading columns."""

    basis: Float[Array, "D R"]  # B, with singular values of at most one
    rows: Float[Array, "N S"]  # x of every row, s, and 1: S = R + 2


class Known(NamedTuple):
    """What is kept of the rows between updates."""

    labels: Int[Array, " N"]
    uppers: Float[Array, " N"]  # upper bounds on the scores of these centroids
    # Lower bounds on the scores of all other centroids that are near the row's block.
    floors: Float[Array, " N"]
    offsets: Float[Array, "K D"]  # the centroids minus m
    share: Float[Array, ""]  # of the scores that were computed from all columns
    blocks: "Blocks | None"  # None with few rows or centroids, or too many of both


class Blocks(NamedTuple):
    """Rows that are near each other, and which centroids are not near them."""

    known: Bool[Array, ""]  # whether the rows are in blocks
    order: Int[Array, " N"]  # numbers of the rows, block by block
    rows: Float[Array, "N S"]  # of `Leading`, in this order
    # Mean of each block's rows in the leading columns, the largest distance of a row from it, the
    # largest length outside, and 1.
    middles: Float[Array, "G T"]
    # Lower bounds on a centroid's score minus the upper bound of a row, for all rows of a block:
    # positive if it is nearest to none of them. The others are near the block.
    gaps: Float[Array, "G K"]


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
    sample = compression.SAMPLE, 1
    if len(Z) >= MANY_ROWS:
        sample = MORE * compression.SAMPLE, ROUNDS
    basis = compression.basis_of_sample(Z, key, R, num_samples, rows, centre.mean, *sample)
    basis = _shrinking(basis) * basis
    N, size = len(Z), min(ROWS, len(Z))

    # In one pass: each array of N S numbers that is made on the way takes a CPU as long as the
    # product.
    def block(i: Array, found: Array) -> Array:
        first = jnp.minimum(i * size, N - size)  # the last block overlaps
        z, squares, real = (block_of(x, first, size) for x in (Z, energy, centre.real))
        X = real[:, None] * matmul(z - centre.mean, basis)
        some = _sides_of_rows(X, squares, terms_of_mean)
        return jax.lax.dynamic_update_slice_in_dim(found, some, first, 0)

    found = jnp.zeros((N, R + 2), energy.dtype)
    return Leading(basis, jax.lax.fori_loop(0, -(-N // size), block, found))


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
    by = _shrinking(basis)
    return Leading(by * basis, _sides_of_rows(by * X, energy, terms_of_mean))


def _shrinking(basis: Float[Array, "D R"]) -> Float[Array, ""]:
    """Returns by what to multiply B: the inequality holds for all B with |B B^T| <= 1."""
    rounding = matmul(basis.T, basis) - jnp.eye(basis.shape[1], dtype=basis.dtype)
    return 1 / jnp.sqrt(1 + jnp.linalg.norm(rounding))


def _sides_of_rows(
    X: Float[Array, "M R"], energy: Float[Array, " M"], terms_of_mean: Float[Array, ""]
) -> Float[Array, "M S"]:
    rows = _with_rest(X, energy, energy + terms_of_mean)
    # The last column multiplies the summand of a centroid, so that a product is a whole bound.
    return jnp.concatenate([rows, jnp.ones_like(rows[:, :1])], axis=1)


def nothing(leading: Leading, K: int) -> Known:
    """Returns an empty record; the first `renew` must get infinite shifts."""
    (D, _), (N, S), dtype = leading.basis.shape, leading.rows.shape, leading.rows.dtype
    # Separate arrays, because one buffer cannot be donated twice.
    uppers, floors, offsets = jnp.zeros(N, dtype), jnp.zeros(N, dtype), jnp.zeros((K, D), dtype)
    G, blocks = -(-N // min(BLOCK, N)), None
    if N >= MANY_ROWS and K >= MANY_CENTROIDS and G * K <= MOST_GAPS:
        order = jnp.arange(N, dtype=jnp.int32)
        zeros = (jnp.zeros(shape, dtype) for shape in ((N, S), (G, S + 1), (G, K)))
        blocks = Blocks(jnp.zeros((), bool), order, *zeros)
    # Where comparing with all takes long, the first update tries too.
    share = jnp.full((), 0 if _num_candidates(K, leading) > 1 else FIRST, dtype)
    return Known(jnp.zeros(N, jnp.int32), uppers, floors, offsets, share, blocks)


def _num_candidates(K: int, leading: Leading) -> int:
    """Returns how many scores of a row are computed one by one before it is compared with all."""
    D, R = leading.basis.shape
    if K * (D - R) < MANY_PRODUCTS:
        return 1
    most = max(count for least, count in CANDIDATES.items() if least <= K)
    return min(most, 2 * -(-K // _chunk(K)))  # two of a chunk


def _chunk(K: int) -> int:
    return MANY_CHUNK if K >= MOST_CENTROIDS else CHUNK


def renew(
    Z: Float[Array, "N D"],
    mean: Float[Array, " D"],
    slack: Float[Array, " N"],
    leading: Leading,
    known: Known,
    offsets: Float[Array, "K D"],
    shifts: Float[Array, " K"],
    active: Bool[Array, " K"],
    is_last: bool = False,
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
        is_last: whether what is kept of the blocks is no longer needed.
    """
    N, K, dtype = len(Z), len(offsets), offsets.dtype
    blocks, hopeless = known.blocks, known.share > HOPELESS
    size = min(ROWS if blocks is None else BLOCK, N)
    most, chunk = _num_candidates(K, leading), _chunk(K)
    G = -(-N // size)
    squares = jnp.sum(offsets**2, axis=1)
    biases = jnp.where(active, squares, jnp.inf)
    inside = matmul(offsets, leading.basis)
    # A last one, which fills up chunks, is nearest to nothing.
    sides = jnp.concatenate([-2 * _with_rest(inside, squares, squares), biases[:, None]], axis=1)
    sides = jnp.pad(sides, ((0, 1), (0, 0))).at[K, -1].set(jnp.inf)
    moved = shifts > 0
    anew = jnp.sum(moved) > MOST * K

    # What a centroid's move adds to the score of a row is at most its change of square minus twice
    # the row's product with this.
    steps = offsets - known.offsets
    lengths = jnp.sum(steps**2, axis=1)
    within = matmul(steps, leading.basis)
    inward = _with_rest(within, lengths, lengths)
    grown = squares - jnp.sum(known.offsets**2, axis=1)
    growths = jnp.where(jnp.isinf(shifts), jnp.inf, grown)[:, None]
    growths = jnp.concatenate([-2 * inward.at[:, -1].multiply(-1), growths], axis=1)

    middles, is_known = None, ~hopeless
    if blocks is None:
        order, rows = jnp.arange(N, dtype=jnp.int32), leading.rows
        gaps = narrowed = jnp.zeros((G, 0), dtype)
    else:
        last = blocks.order, blocks.rows, blocks.middles
        # Runs side by side decide together: alone, each of them would do both.
        unknown = largest_of_runs(~hopeless & ~blocks.known)
        # Without labels, or for one time, rows stay where they are.
        sorts = ~largest_of_runs(jnp.any(jnp.isinf(shifts))) & (not is_last)
        order, rows, middles = jax.lax.switch(
            unknown.astype(jnp.int32) + (unknown & sorts),
            (
                lambda: last,
                lambda: (jnp.arange(N, dtype=jnp.int32), leading.rows, last[2]),
                lambda: _in_blocks(leading, inside, known.labels, size),
            ),
        )
        is_known = is_known & (~unknown | sorts)
        gaps = jnp.where(unknown, -jnp.inf, blocks.gaps)
        # Of a run whose blocks were known, floors leave out the centroids that were not near them.
        anew = anew | (unknown & blocks.known)
        # ... and at least this, for all rows of a block.
        falls = jnp.linalg.norm(within, axis=1)[:, None], inward[:, -1:]
        least = jnp.where(jnp.isinf(shifts), -jnp.inf, jnp.where(moved, grown, 0))[:, None]
        falls = jnp.concatenate([-2 * within, *(-2 * fall for fall in falls), least], axis=1)
        narrowed = gaps + matmul(middles, falls.T)
    of_moved = numbers_of(moved | anew, chunk) if blocks is None else None
    before, uppers, floors, slack = (
        values[order] for values in (known.labels, known.uppers, known.floors, slack)
    )
    floors = jnp.where(anew, jnp.inf, floors)

    def products_of(rows: Array, others: Array) -> Array:
        products = jax.lax.optimization_barrier(rows * others)
        return matmul(products, jnp.ones(rows.shape[1], dtype))

    def rule_out(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        *found, gaps = carry
        first = jnp.minimum(i * size, N - size)  # the last block overlaps
        x, own, old, floor, error = (
            jax.lax.dynamic_slice_in_dim(values, first, size)
            for values in (rows, before, uppers, floors, slack)
        )
        real = error > -jnp.inf
        upper = old + jnp.where(moved[own], products_of(x, growths[own]) + error, 0)
        if of_moved is not None:
            (count, listed), gap = of_moved, jnp.zeros(0, dtype)
        else:
            rise = jnp.max(jnp.where(real, upper - old, -jnp.inf))
            gap = narrowed[i] - jnp.where(moved, jnp.max(error), 0) - rise
            # Negated, so that NaN counts as near. Floors cover those that were near, until they
            # move.
            count, listed = numbers_of(~(gap > 0) & (anew | moved | (gaps[i] > 0)), chunk)
        top = jnp.where(real, upper + error, -jnp.inf)

        def some_bounds(j: Array, found: tuple[Candidates, Array]) -> tuple[Candidates, Array]:
            best, gap = found
            some = jax.lax.dynamic_slice_in_dim(listed, j * chunk, chunk)
            bounds = jax.lax.optimization_barrier(matmul(sides[some], x.T))
            if blocks is not None:
                gap = gap.at[some].set(least_of_each(bounds - top), mode="drop")
            return compare_square(bounds, best, some, own), gap

        start = Candidates.none(most, size, dtype), gap
        best, gap = jax.lax.fori_loop(0, -(-count // chunk), some_bounds, start)
        others = jnp.minimum(floor, best.rest)
        lowest = jnp.minimum(others, best.bounds[0])
        # NaN is not below anything, so it stays open too.
        stays = upper + error < lowest
        parts = (
            upper,
            jnp.where(stays, lowest, others),
            ~stays & real,
            jnp.stack(best.labels),
            jnp.stack(best.bounds),
        )
        parts = [
            jax.lax.dynamic_update_slice_in_dim(values, part, first, -1)
            for values, part in zip(found, parts, strict=True)
        ]
        return *parts, jax.lax.dynamic_update_index_in_dim(gaps, gap, i, 0)

    none = jnp.zeros((most, N), jnp.int32), jnp.full((most, N), jnp.inf, dtype)
    found = uppers, floors, jnp.zeros(N, bool), *none, gaps
    found = jax.lax.fori_loop(0, jnp.where(hopeless, 0, G), rule_out, found)
    uppers, floors, is_open, candidates, bounds, gaps = found

    def scores_of(at: Array, labels: Array) -> Array:
        z = Z[order[at]] - mean
        return biases[labels] - 2 * products_of(z, offsets[labels])

    opened, of_open = numbers_of(is_open, size)

    def of_own(i: Array, uppers: Array) -> Array:
        chosen = jax.lax.dynamic_slice_in_dim(of_open, i * size, size)
        at = jnp.minimum(chosen, N - 1)
        return uppers.at[chosen].set(scores_of(at, before[at]), mode="drop")

    def evaluate(t: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        """Computes the scores of the rows' candidates of place t, of all that can be nearest."""
        uppers = found[1]
        # Negated, so that NaN counts as open.
        opened, numbers = numbers_of(is_open & ~(uppers + slack < bounds[t]), size)

        def some(i: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
            labels, uppers, floors = found
            chosen = jax.lax.dynamic_slice_in_dim(numbers, i * size, size)
            at = jnp.minimum(chosen, N - 1)
            label, upper = candidates[t, at], uppers[at]
            score = scores_of(at, label)
            parts = (
                jnp.where(score < upper, label, labels[at]),
                jnp.minimum(upper, score),
                jnp.minimum(floors[at], jnp.maximum(upper, score)),
            )
            return tuple(
                values.at[chosen].set(part, mode="drop")
                for values, part in zip(found, parts, strict=True)
            )

        return jax.lax.fori_loop(0, -(-opened // size), some, found)

    uppers = jax.lax.fori_loop(0, -(-opened // size), of_own, uppers)
    found = before, uppers, floors
    found = jax.lax.fori_loop(0, jnp.where(hopeless, 0, most), evaluate, found)
    labels, uppers, floors = found
    # Of candidates whose bounds are above a row's score, these are what is known.
    left = jnp.min(jnp.where(bounds > uppers + slack, bounds, jnp.inf), axis=0)
    floors = jnp.where(is_open, jnp.minimum(floors, left), floors)
    is_open = is_open & ~(uppers + slack < floors) | hopeless
    found = labels, uppers, floors

    together = min(TOGETHER, N)
    every = jnp.pad(offsets, ((0, 1), (0, 0)))
    of_every = jnp.pad(biases, (0, 1), constant_values=jnp.inf)
    from_first = jnp.arange(K + -K % CHUNK, dtype=jnp.int32)
    opened, remaining = numbers_of(is_open & (slack > -jnp.inf), together)

    def near(first: Array, last: Array) -> tuple[Array, Array]:
        """Returns how many centroids are near the blocks of these rows, and their numbers."""

        def block_of(place: Array) -> Array:
            return jnp.where(place >= N - size, G - 1, place // size)

        def add(block: Array, found: Array) -> Array:
            return found | ~(gaps[block] > 0)

        if blocks is None:
            return jnp.asarray(K), jnp.minimum(from_first, K)
        end = jnp.where(hopeless, 0, block_of(last) + 1)
        start = jnp.broadcast_to(hopeless, (K,))
        return numbers_of(jax.lax.fori_loop(block_of(first), end, add, start), CHUNK)

    def compare_near(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        *found, computed = carry
        chosen = jax.lax.dynamic_slice_in_dim(remaining, i * together, together)
        z = Z[order[jnp.minimum(chosen, N - 1)]] - mean
        last = jnp.minimum(opened - i * together, together) - 1

        count, listed = near(chosen[0], chosen[last])

        def chunk(j: Array, best: Nearest) -> Nearest:
            some = jax.lax.dynamic_slice_in_dim(listed, j * CHUNK, CHUNK)
            scores = of_every[some][:, None] - 2 * matmul(every[some], z.T)
            return compare(jax.lax.optimization_barrier(scores), best, some)

        best = Nearest.none(together, dtype)
        best = jax.lax.fori_loop(0, -(-count // CHUNK), chunk, best)
        parts = (
            values.at[chosen].set(part, mode="drop")
            for values, part in zip(found, best, strict=True)
        )
        return *parts, computed + (count / K).astype(dtype) * (last + 1)

    found = *found, jnp.zeros((), dtype)
    found = jax.lax.fori_loop(0, -(-opened // together), compare_near, found)
    *found, computed = found
    share = jnp.where(hopeless, AGAIN * known.share, computed / N)
    if middles is not None:
        found = [jnp.zeros_like(part).at[order].set(part) for part in found]
        blocks = Blocks(is_known, order, rows, middles, gaps)
    labels, uppers, floors = found
    return Known(labels, uppers, floors, offsets, share, blocks)


def _in_blocks(
    leading: Leading, inside: Float[Array, "K R"], labels: Int[Array, " N"], size: int
) -> tuple[Int[Array, " N"], Float[Array, "N S"], Float[Array, "G T"]]:
    """Returns the numbers of the rows, sorted so that blocks of `size` rows are near each other."""
    N, K = len(labels), len(inside)
    # Rows of a cluster are together, and so are clusters with the same nearest of a few of them.
    few = inside[:: max(int(K**0.5), 1)]
    apart = jnp.sum(few**2, axis=1) - 2 * matmul(inside, few.T)
    place = jnp.argmin(apart, axis=1).astype(jnp.int32) * K + jnp.arange(K, dtype=jnp.int32)
    order = jnp.argsort(place[labels]).astype(jnp.int32)
    rows = leading.rows[order]

    def middle(i: Array, middles: Array) -> Array:
        x = jax.lax.dynamic_slice_in_dim(rows, jnp.minimum(i * size, N - size), size)
        mean = jnp.mean(x[:, :-2], axis=0)
        farthest = jnp.sqrt(jnp.max(jnp.sum((x[:, :-2] - mean) ** 2, axis=1)))
        found = jnp.concatenate([mean, jnp.stack([farthest, jnp.max(x[:, -2]), 1.0])])
        return jax.lax.dynamic_update_index_in_dim(middles, found.astype(x.dtype), i, 0)

    G = -(-N // size)
    start = jnp.zeros((G, leading.rows.shape[1] + 1), leading.rows.dtype)
    return order, rows, jax.lax.fori_loop(0, G, middle, start)


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
