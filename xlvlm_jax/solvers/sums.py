"""Sums over rows whose error does not grow with the number of rows, in float32 on every backend.

Adding N float32 numbers around m one by one loses N eps / 2 of their sum: the mean of 4 million
rows around 100 becomes 97. Here rows are added in blocks of at most a few thousand after
subtracting a row near their mean. The block sums are added as pairs of numbers, which keep the part
that rounding removes (Knuth's two-sum; Ogita, Rump and Oishi, "Accurate sum and dot product",
2005). Products with ones use full precision: a TPU would round them to bfloat16.

N rows, D width, K clusters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from xlvlm_jax.solvers.buckets import is_small
from xlvlm_jax.solvers.collectives import ONE_DEVICE, Rows
from xlvlm_jax.solvers.linalg import inner_products, matmul, real_dtype, weighted_sums

BLOCK = 2**19  # elements of Z per block: two megabytes, which fit into a CPU's cache
LEAST_ROWS, MOST_ROWS = 256, 4096  # per block of a wide Z: each block adds to all totals
PER_CLUSTER = 16  # rows per cluster in a block, up to MOST_ROWS
# An accelerator has no such cache and runs a few large products faster than many small ones.
ACCELERATOR_BLOCK = 2**26
CHAINS = 4  # of pairs that are added side by side
# Numbers from which on they are first added in vectors, and the sums that are left.
FEW, FEW_BESIDE, MANY, BESIDE = 2**10, 2**9, 2**15, 2**11
ACCELERATOR_BESIDE = 2**16  # each step of the loop takes a microsecond, however short the vector
LANES = 512  # numbers that are added side by side
NEAR = 64  # rows whose mean is the origin that means are measured from
# Ratio of |m|^2 to a column's variance. Above it, rounding in a product with Z loses more of the
# deviations from the mean than float32 has to (4e-5), so the product uses centred rows.
FAR = 2.0**17


class Wide(NamedTuple):
    """A number with twice the digits, high + low, where `high` is the nearest single number."""

    high: Float[Array, "..."]
    low: Float[Array, "..."]

    # Adds the numbers; does not concatenate the tuples.
    def __add__(self, other: "Wide | Array") -> "Wide":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the sum, with its rounding error in `low`."""
        if not isinstance(other, Wide):
            other = Wide(other, jnp.zeros_like(other))
        high = self.high + other.high
        of_other = high - self.high
        lost = (self.high - (high - of_other)) + (other.high - of_other)
        return _nearest_first(high, lost + self.low + other.low)

    def times(self, factor: float | Array) -> "Wide":
        """Returns the product with a power of two."""
        return Wide(self.high * factor, self.low * factor)

    @property
    def value(self) -> Float[Array, "..."]:
        """Returns the nearest single number."""
        return self.high + self.low


def _nearest_first(high: Array, low: Array) -> Wide:
    value = high + low
    return Wide(value, low - (value - high))


def total(values: Float[Array, "..."] | Wide) -> Wide:
    """Returns the sum of all values as a pair."""
    if not isinstance(values, Wide):
        values = Wide(values, jnp.zeros_like(values))
    if jax.default_backend() != "cpu":
        beside = least = ACCELERATOR_BESIDE
    elif values.high.size > MANY:
        beside = least = BESIDE
    else:
        beside, least = FEW_BESIDE, FEW
    if values.high.size > least:
        values = _side_by_side(values, beside)
    # One reduction, which every backend runs in one pass. Adding halves until one number is left
    # takes ten times as long to compile, and XLA may compute the values again for each half. Four
    # chains side by side: in one alone a CPU waits for each addition.
    missing = -values.high.size % CHAINS
    parts = (jnp.pad(part.reshape(-1), (0, missing)).reshape(CHAINS, -1) for part in values)
    first, second, third, fourth = (Wide(*chain) for chain in zip(*parts, strict=True))
    zero = jnp.zeros((), values.high.dtype)
    return Wide(
        *jax.lax.reduce(tuple(first + second + (third + fourth)), (zero, zero), _plus, (0,))
    )


def _side_by_side(values: Wide, beside: int) -> Wide:
    """Adds many numbers to `beside` sums, in vectors."""
    missing = -values.high.size % beside
    high, low = (jnp.pad(part.reshape(-1), (0, missing)).reshape(-1, beside) for part in values)
    zeros = Wide(*jnp.zeros((2, beside), high.dtype))
    return jax.lax.fori_loop(0, len(high), lambda i, sums: sums + Wide(high[i], low[i]), zeros)


def _plus(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    high, low = Wide(*left) + Wide(*right)
    return high, low


def product(a: Float[Array, "..."], b: Float[Array, "..."]) -> Wide:
    """Returns a b as a pair, accurate to ten digits in float32."""
    a, b = jnp.broadcast_arrays(a, b)
    if a.dtype != jnp.float32:
        return Wide(a * b, jnp.zeros_like(a))
    (a, a_rest), (b, b_rest) = _split(a), _split(b)
    # Products of halves fit into the 24 bits of a float32.
    return _nearest_first(a * b, a * b_rest + a_rest * b) + a_rest * b_rest


def _split(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns the leading 12 bits and the rest."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    leading = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return leading, x - leading


def rows_of_block(width: int, least: int = LEAST_ROWS) -> int:
    """Returns how many rows of this width are summed before a total is updated."""
    # Block sizes are tuned per backend; the sums are correct with either.
    block = BLOCK if jax.default_backend() == "cpu" else ACCELERATOR_BLOCK
    return max(block // max(width, LANES), least)


def add_up(part: Callable[[Array | int, int], Any], N: int, size: int) -> Any:
    """Returns the sum over blocks of `part(first, count)`.

    Args:
        part: maps the first row and the number of rows of a block to a pytree of arrays.
        N: number of rows.
        size: maximum number of rows per block.

    Returns:
        the pytree of `part` with a `Wide` for each array.
    """
    size = max(min(size, N), 1)
    whole, rest = divmod(N, size)

    def plus(totals: Any, parts: Any) -> Any:
        return jax.tree.map(lambda t, p: t + p, totals, parts, is_leaf=_is_wide)

    if whole <= 1:
        first = part(0, size if whole else rest)
        totals = jax.tree.map(lambda p: Wide(p, jnp.zeros_like(p)), first)
    else:
        # All whole blocks in the loop: a first one before it would be compiled a second time.
        shaped = jax.eval_shape(lambda: part(0, size))
        totals = jax.tree.map(lambda p: Wide(*jnp.zeros((2, *p.shape), p.dtype)), shaped)
        totals = jax.lax.fori_loop(0, whole, lambda i, t: plus(t, part(i * size, size)), totals)
    return plus(totals, part(whole * size, rest)) if whole and rest else totals


def _is_wide(leaf: Any) -> bool:
    return isinstance(leaf, Wide)


def block_of(values: Float[Array, "N ..."], first: Array | int, count: int) -> Array:
    """Returns `count` rows starting at `first`, in float32 or wider."""
    rows = jax.lax.dynamic_slice_in_dim(values, first, count)
    return rows.astype(real_dtype(rows))


def column_means(
    Z: Float[Array, "N D"],
    num_samples: Int[Array, ""] | int | None = None,
    rows: Rows = ONE_DEVICE,
    weights: Float[Array, " N"] | None = None,
) -> Wide:
    """Returns the column means, with an error of 1e-6 standard deviations.

    The last digit of a mean of 10,000 standard deviations is 1e-3 of them; `low` holds the rest.

    Args:
        Z: float[N, D].
        num_samples: number of leading rows to average; None for all.
        rows: where the rows of Z are.
        weights: float[N], weight of each row; None for equal weights.

    Returns:
        the means as a pair of float[D].
    """
    N, D = Z.shape
    if weights is None:
        num_samples = N if num_samples is None else num_samples
        first = jnp.arange(min(NEAR, rows.count(N)))
        counted = (first < num_samples)[:, None] * rows.take(Z, first)
        origin, whole = jnp.sum(counted, axis=0) / jnp.minimum(len(first), num_samples), num_samples
        weights = (rows.numbers(N) < num_samples).astype(origin.dtype)
    else:
        heaviest = rows.largest(weights, NEAR)
        shares = rows.take(weights, heaviest)
        shares = shares / jnp.sum(shares)
        origin = jnp.sum(shares[:, None] * rows.take(Z, heaviest), axis=0)
        whole = rows.total(total(weights)).value

    def part(first: Array | int, count: int) -> Array:
        of_rows = block_of(weights, first, count)[:, None]
        return _down(of_rows * (block_of(Z, first, count) - origin))

    summed = rows.total(add_up(part, N, rows_of_block(D)))
    moved = Wide(summed.high / whole, summed.low / whole)
    return Wide(origin, jnp.zeros_like(origin)) + moved


def column_sums(values: Float[Array, "N D"]) -> Wide:
    """Returns the sum of all rows."""

    def part(first: Array | int, count: int) -> Array:
        return _down(block_of(values, first, count))

    return add_up(part, len(values), rows_of_block(values.shape[1]))


def _down(block: Float[Array, "B D"]) -> Float[Array, " D"]:
    """Sums a block's rows; some narrow rows are side by side, to keep summation chains short."""
    B, D = block.shape
    beside = min(max(LANES // D, 1), B)
    deep = B // beside
    side_by_side = block[: deep * beside].reshape(deep, beside * D)
    summed = matmul(jnp.ones(deep, block.dtype), side_by_side).reshape(beside, D)
    return jnp.sum(summed, axis=0) + jnp.sum(block[deep * beside :], axis=0)


def squared_distances(
    Z: Float[Array, "N D"], origin: Float[Array, " D"], beyond: Float[Array, " D"] | float = 0.0
) -> Float[Array, " N"]:
    """Returns |z_n - origin - beyond|^2."""
    # Fused with its uses, the pass over Z takes a CPU five times as long.
    return jax.lax.optimization_barrier(jnp.sum(((Z - origin) - beyond) ** 2, axis=1))


def cluster_sums(
    Z: Float[Array, "N D"],
    labels: Int[Array, " N"],
    num_clusters: int,
    origin: Float[Array, " D"],
    weights: Float[Array, " N"] | None = None,
) -> tuple[Wide, Wide]:
    """Returns the number of rows per cluster, and the sum of their offsets from the origin, [K, D].

    If weights are given, each row counts with its weight in both.
    """
    N, D = Z.shape
    weights = jnp.ones(N, origin.dtype) if weights is None else weights

    def part(first: Array | int, count: int) -> tuple[Array, Array]:
        z, of = block_of(Z, first, count) - origin, block_of_labels(first, count)
        of_rows = block_of(weights, first, count)

        def by_product(z: Array) -> Array:
            members = jax.nn.one_hot(of, num_clusters, dtype=z.dtype, axis=0) * of_rows
            return matmul(members, z)

        def by_segment(z: Array) -> Array:
            return jax.ops.segment_sum(of_rows[:, None] * z, of, num_clusters)

        # Accelerators multiply faster than they scatter; a CPU adds rows at memory speed, but not
        # in the quickly compiled programs of small problems.
        on_cpu = by_product if is_small(N, D, num_clusters) else by_segment
        totals = jax.lax.platform_dependent(z, cpu=on_cpu, default=by_product)
        counts = jax.ops.segment_sum(of_rows, of, num_clusters)
        return counts, totals

    def block_of_labels(first: Array | int, count: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(labels, first, count)

    size = rows_of_block(D, min(max(LEAST_ROWS, PER_CLUSTER * num_clusters), MOST_ROWS))
    # A single float32 counts up to 2^24 only; the pair continues beyond it.
    return add_up(part, N, size)


def cluster_means(
    Z: Float[Array, "N D"], labels: Int[Array, " N"], num_clusters: int
) -> tuple[Int[Array, " K"], Wide]:
    """Returns the number of rows per cluster and their mean [K, D]; zeros for an empty cluster."""
    origin = column_means(Z).high
    counted, totals = cluster_sums(Z, labels, num_clusters, origin)
    counts = counted.high.astype(jnp.int32) + counted.low.astype(jnp.int32)
    moved = Wide(*(part / jnp.maximum(counts, 1)[:, None] for part in totals))
    means = Wide(jnp.broadcast_to(origin, moved.high.shape), jnp.zeros_like(moved.high)) + moved
    return counts, Wide(*(jnp.where(counts[:, None] > 0, part, 0) for part in means))


def is_far(mean: Float[Array, " D"], variance: Float[Array, ""], rows: int = 1) -> Bool[Array, ""]:
    """Returns whether products with rows around this mean lose the differences between rows.

    See FAR.

    Args:
        mean: float[D].
        variance: of a column.
        rows: number of rows that a product adds up. Rounding grows with its square root, so that
            beyond MOST_ROWS the mean has to be nearer to zero.
    """
    return jnp.sum(mean**2) > FAR * min(1.0, MOST_ROWS / max(rows, 1)) * variance


def centred_products(
    vectors: Float[Array, "K D"],
    Z: Float[Array, "N D"],
    mean: Float[Array, " D"],
    far: Bool[Array, ""] | bool,
) -> Float[Array, "K N"]:
    """Returns vectors (Z - 1 m)^T.

    Args:
        vectors: float[K, D].
        Z: float[N, D].
        mean: float[D], m.
        far: whether to subtract the mean from the rows first, see `is_far`.
    """
    return _of_centred(lambda rows: inner_products(vectors, rows), Z, mean, far, 1)


def centred_scores(
    Z: Float[Array, "N D"],
    basis: Float[Array, "D R"],
    mean: Float[Array, " D"],
    far: Bool[Array, ""] | bool,
    then: Callable[[Array], Array] = lambda scores: scores,
) -> Float[Array, "N R"]:
    """Returns (Z - 1 m) basis, like `centred_products`, with each row contiguous.

    Args:
        Z: float[N, D].
        basis: float[D, R].
        mean: float[D], m.
        far: as for `centred_products`.
        then: what is done to all scores, elementwise: in the same pass, where they are.
    """
    return _of_centred(lambda rows: matmul(rows, basis), Z, mean, far, 0, then)


def _of_centred(
    product: Callable[[Array], Array],
    Z: Array,
    mean: Array,
    far: Bool[Array, ""] | bool,
    axis: int,
    then: Callable[[Array], Array] = lambda products: products,
) -> Array:
    """Returns `product`, a linear function with the rows on `axis`, of the centred rows."""
    N, D = Z.shape

    def at_once() -> Array:
        return then(product(Z) - product(mean[None]))

    def by_blocks() -> Array:
        size = max(min(rows_of_block(D, least=1), N), 1)

        def block(first: Array | int, found: Array) -> Array:
            products = product(block_of(Z, first, size) - mean)
            return jax.lax.dynamic_update_slice_in_dim(found, products, first, axis)

        def step(i: Array, found: Array) -> Array:
            return block(jnp.minimum(i * size, N - size), found)  # the last block overlaps

        shaped = jax.eval_shape(product, Z)
        empty = jnp.zeros(shaped.shape, shaped.dtype)
        return then(jax.lax.fori_loop(0, -(-N // size), step, empty))

    return jax.lax.cond(far, by_blocks, at_once) if N else at_once()


def weighted(codes: Float[Array, "K N"], Z: Float[Array, "N D"], mean: Array | None = None) -> Wide:
    """Returns codes (Z - 1 m), the weighted sums of the rows: [K, D]."""

    def part(first: Array | int, count: int) -> Array:
        z = block_of(Z, first, count)
        some = jax.lax.dynamic_slice_in_dim(codes, first, count, axis=1)
        return weighted_sums(some, z if mean is None else z - mean)

    return add_up(part, len(Z), rows_of_block(Z.shape[1]))


def weighted_directions(
    codes: Float[Array, "K N"],
    Z: Float[Array, "N D"],
    mean: Float[Array, " D"] | None = None,
    far: Bool[Array, ""] | bool = False,
    most: int = MOST_ROWS,
) -> Float[Array, "K D"]:
    """Returns codes (Z - 1 m) like `weighted`, only as accurate as directions need to be.

    A few thousand rows are multiplied at once, which saves a CPU copying them: it takes two thirds
    of the time. The sums then keep a rounding error of the mean, as those of `centred_products` do.

    Args:
        codes: float[K, N].
        Z: float[N, D].
        mean: float[D], m; None for zero.
        far: whether to subtract the mean from the rows first, see `is_far`.
        most: number of rows up to which they may be multiplied at once. With more than MOST_ROWS,
            `far` has to be that of so many rows.
    """

    def by_blocks() -> Array:
        return weighted(codes, Z, mean).value

    def at_once() -> Array:
        images = weighted_sums(codes, Z)
        return images if mean is None else images - jnp.outer(jnp.sum(codes, axis=1), mean)

    if len(Z) > most:
        return by_blocks()
    return at_once() if mean is None else jax.lax.cond(far, by_blocks, at_once)


def overlaps(left: Float[Array, "N K"], right: Float[Array, "N L"]) -> Wide:
    """Returns left^T right: [K, L]."""
    width = left.shape[1] + right.shape[1]

    def part(first: Array | int, count: int) -> Array:
        return matmul(block_of(left, first, count).T, block_of(right, first, count))

    return add_up(part, len(left), rows_of_block(width))
