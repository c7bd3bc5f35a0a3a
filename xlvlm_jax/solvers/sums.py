"""Sums over rows whose error does not grow with their number, in float32 and on every backend.

Added one after another, N float32 numbers around m lose N eps / 2 of their sum: a mean of 4 million
rows around 100 is then 97. Here rows are added in blocks of no more than some thousands, after
subtracting a row that is near their mean, and the blocks' sums as pairs of numbers, which keep what
rounding takes from the larger (Knuth's two-sum; Ogita, Rump and Oishi, "Accurate sum and dot
product", 2005). Products with ones are in full precision: a TPU would round them to bfloat16.

N rows, D width, K clusters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from xlvlm_jax.solvers.collectives import ONE_DEVICE, Rows
from xlvlm_jax.solvers.linalg import inner_products, matmul, real_dtype, weighted_sums

BLOCK = 2**19  # numbers of Z in a block: two megabytes, which a CPU keeps in its cache
LEAST_ROWS, MOST_ROWS = 256, 4096  # of a block of wide Z: each block adds to all of the totals
PER_CLUSTER = 16  # rows of a block for each cluster, as far as MOST_ROWS allows
# An accelerator has no such cache, and starts few large products faster than many small ones.
ACCELERATOR_BLOCK = 2**26
LANES = 512  # numbers that are added side by side
NEAR = 64  # rows whose mean is what means are measured from
# Of |m|^2 over a column's variance: beyond it a product with Z rounds off more of the deviations
# from the mean than float32 need (4e-5), so that it is taken from the centred rows.
FAR = 2.0**17


class Wide(NamedTuple):
    """high + low: a number with twice the digits, of which `high` is the nearest short one."""

    high: Float[Array, "..."]
    low: Float[Array, "..."]

    # A sum of numbers, not a longer tuple.
    def __add__(self, other: "Wide | Array") -> "Wide":  # pyright: ignore[reportIncompatibleMethodOverride]
        """The sum, with what rounding takes from it in `low`."""
        if not isinstance(other, Wide):
            other = Wide(other, jnp.zeros_like(other))
        high = self.high + other.high
        of_other = high - self.high
        lost = (self.high - (high - of_other)) + (other.high - of_other)
        return _nearest_first(high, lost + self.low + other.low)

    def times(self, factor: float) -> "Wide":
        """The product with a power of two."""
        return Wide(self.high * factor, self.low * factor)

    @property
    def value(self) -> Float[Array, "..."]:
        """The nearest number of one part."""
        return self.high + self.low


def _nearest_first(high: Array, low: Array) -> Wide:
    value = high + low
    return Wide(value, low - (value - high))


def total(values: Float[Array, "..."] | Wide) -> Wide:
    """The sum of all values, as a pair: halves are added until one number is left."""
    if not isinstance(values, Wide):
        values = Wide(values, jnp.zeros_like(values))
    values = Wide(*(part.reshape(-1) for part in values))
    while (count := len(values.high)) > 1:
        if count % 2:
            values, count = Wide(*(jnp.pad(part, (0, 1)) for part in values)), count + 1
        left, right = (Wide(*(p[part] for p in values)) for part in _halves(count))
        values = left + right
    return Wide(*(part[0] for part in values))


def _halves(count: int) -> tuple[slice, slice]:
    return slice(0, count // 2), slice(count // 2, count)


def dot(a: Float[Array, "..."], b: Float[Array, "..."]) -> Wide:
    """The sum of a b over all entries, whose products are pairs too."""
    return total(product(a, b))


def product(a: Float[Array, "..."], b: Float[Array, "..."]) -> Wide:
    """a b as a pair, right to ten digits for float32."""
    a, b = jnp.broadcast_arrays(a, b)
    if a.dtype != jnp.float32:
        return Wide(a * b, jnp.zeros_like(a))
    (a, a_rest), (b, b_rest) = _split(a), _split(b)
    # Products of halves need no more than the 24 bits that there are.
    return _nearest_first(a * b, a * b_rest + a_rest * b) + a_rest * b_rest


def _split(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The leading 12 bits, and the rest."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    leading = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return leading, x - leading


def rows_of_block(width: int, least: int = LEAST_ROWS) -> int:
    """How many rows of so many numbers are added up before a total is touched."""
    # What the sizes are tuned for; the sums are right on any backend with either.
    block = BLOCK if jax.default_backend() == "cpu" else ACCELERATOR_BLOCK
    return max(block // max(width, LANES), least)


def add_up(part: Callable[[Array | int, int], Any], N: int, size: int) -> Any:
    """The sum of `part(first, count)`, arrays from rows on, over blocks; each array as `Wide`."""
    size = max(min(size, N), 1)
    whole, rest = divmod(N, size)

    def plus(totals: Any, parts: Any) -> Any:
        return jax.tree.map(lambda t, p: t + p, totals, parts, is_leaf=_is_wide)

    first = part(0, size if whole else rest)
    totals = jax.tree.map(lambda p: Wide(p, jnp.zeros_like(p)), first)
    if whole > 1:
        totals = jax.lax.fori_loop(1, whole, lambda i, t: plus(t, part(i * size, size)), totals)
    return plus(totals, part(whole * size, rest)) if whole and rest else totals


def _is_wide(leaf: Any) -> bool:
    return isinstance(leaf, Wide)


def block_of(values: Float[Array, "N ..."], first: Array | int, count: int) -> Array:
    """`count` rows from one on, in float32 or wider."""
    rows = jax.lax.dynamic_slice_in_dim(values, first, count)
    return rows.astype(real_dtype(rows))


def column_means(
    Z: Float[Array, "N D"],
    num_samples: int | None = None,
    rows: Rows = ONE_DEVICE,
    weights: Float[Array, " N"] | None = None,
) -> Wide:
    """The mean of the first `num_samples` rows (of all of them): error 1e-6 of a deviation.

    A mean of 10,000 deviations has a last digit of 1e-3 of them; `low` holds what is beyond it.
    Where weights are given, they say what each row counts for.
    """
    N, D = Z.shape
    if weights is None:
        num_samples = N if num_samples is None else num_samples
        near = rows.take(Z, jnp.arange(min(NEAR, num_samples)))
        origin, whole = jnp.mean(near, axis=0), num_samples
        weights = (rows.numbers(N) < num_samples).astype(near.dtype)
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
    """The sum of all rows."""

    def part(first: Array | int, count: int) -> Array:
        return _down(block_of(values, first, count))

    return add_up(part, len(values), rows_of_block(values.shape[1]))


def _down(block: Float[Array, "B D"]) -> Float[Array, " D"]:
    """The sum of a block's rows: of narrow ones some lie side by side, so that chains are short."""
    B, D = block.shape
    beside = min(max(LANES // D, 1), B)
    deep = B // beside
    side_by_side = block[: deep * beside].reshape(deep, beside * D)
    summed = matmul(jnp.ones(deep, block.dtype), side_by_side).reshape(beside, D)
    return jnp.sum(summed, axis=0) + jnp.sum(block[deep * beside :], axis=0)


def squared_distances(
    Z: Float[Array, "N D"], origin: Float[Array, " D"], beyond: Float[Array, " D"] | float = 0.0
) -> Float[Array, " N"]:
    """|z_n - origin - beyond|^2."""
    return jnp.sum(((Z - origin) - beyond) ** 2, axis=1)


def cluster_sums(
    Z: Float[Array, "N D"],
    labels: Int[Array, " N"],
    num_clusters: int,
    origin: Float[Array, " D"],
    weights: Float[Array, " N"] | None = None,
) -> tuple[Wide, Wide]:
    """How many rows each cluster has, and the sum of their differences from the origin [K, D].

    Where weights are given, a row counts for its weight in both.
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

        # Accelerators multiply faster than they scatter; a CPU adds rows at the speed of reading.
        totals = jax.lax.platform_dependent(z, cpu=by_segment, default=by_product)
        counts = jax.ops.segment_sum(of_rows, of, num_clusters)
        return counts, totals

    def block_of_labels(first: Array | int, count: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(labels, first, count)

    size = rows_of_block(D, min(max(LEAST_ROWS, PER_CLUSTER * num_clusters), MOST_ROWS))
    # A float32 counts to 2^24; the pair of them goes on.
    return add_up(part, N, size)


def cluster_means(
    Z: Float[Array, "N D"], labels: Int[Array, " N"], num_clusters: int
) -> tuple[Int[Array, " K"], Wide]:
    """How many rows each cluster has, and their mean [K, D]; zeros for a cluster without rows."""
    origin = column_means(Z).high
    counted, totals = cluster_sums(Z, labels, num_clusters, origin)
    counts = counted.high.astype(jnp.int32) + counted.low.astype(jnp.int32)
    moved = Wide(*(part / jnp.maximum(counts, 1)[:, None] for part in totals))
    means = Wide(jnp.broadcast_to(origin, moved.high.shape), jnp.zeros_like(moved.high)) + moved
    return counts, Wide(*(jnp.where(counts[:, None] > 0, part, 0) for part in means))


def is_far(mean: Float[Array, " D"], variance: Float[Array, ""]) -> Array:
    """Whether products with rows around a mean lose what tells the rows apart, see FAR."""
    return jnp.sum(mean**2) > FAR * variance


def centred_products(
    vectors: Float[Array, "K D"],
    Z: Float[Array, "N D"],
    mean: Float[Array, " D"],
    far: Bool[Array, ""] | bool,
) -> Float[Array, "K N"]:
    """vectors (Z - 1 m)^T, from the rows less the mean where that is far from them."""
    return _of_centred(lambda rows: inner_products(vectors, rows), Z, mean, far, 1)


def centred_scores(
    Z: Float[Array, "N D"],
    basis: Float[Array, "D R"],
    mean: Float[Array, " D"],
    far: Array,
) -> Float[Array, "N R"]:
    """(Z - 1 m) basis, as `centred_products`; a row's numbers lie together, without a transpose."""
    return _of_centred(lambda rows: matmul(rows, basis), Z, mean, far, 0)


def _of_centred(
    product: Callable[[Array], Array], Z: Array, mean: Array, far: Bool[Array, ""] | bool, axis: int
) -> Array:
    """The product of the rows less the mean, a linear function that has them along an axis."""
    N, D = Z.shape

    def at_once() -> Array:
        return product(Z) - product(mean[None])

    def by_blocks() -> Array:
        size = max(min(rows_of_block(D, least=1), N), 1)

        def block(first: Array | int, found: Array) -> Array:
            products = product(block_of(Z, first, size) - mean)
            return jax.lax.dynamic_update_slice_in_dim(found, products, first, axis)

        def step(i: Array, found: Array) -> Array:
            return block(jnp.minimum(i * size, N - size), found)  # the last reaches back

        shaped = jax.eval_shape(product, Z)
        return jax.lax.fori_loop(0, -(-N // size), step, jnp.zeros(shaped.shape, shaped.dtype))

    return jax.lax.cond(far, by_blocks, at_once) if N else at_once()


def weighted(codes: Float[Array, "K N"], Z: Float[Array, "N D"], mean: Array | None = None) -> Wide:
    """codes (Z - 1 m)^T, the rows added up with weights: [K, D]."""

    def part(first: Array | int, count: int) -> Array:
        z = block_of(Z, first, count)
        some = jax.lax.dynamic_slice_in_dim(codes, first, count, axis=1)
        return weighted_sums(some, z if mean is None else z - mean)

    return add_up(part, len(Z), rows_of_block(Z.shape[1]))


def overlaps(left: Float[Array, "N K"], right: Float[Array, "N L"]) -> Wide:
    """left^T right: [K, L]."""
    width = left.shape[1] + right.shape[1]

    def part(first: Array | int, count: int) -> Array:
        return matmul(block_of(left, first, count).T, block_of(right, first, count))

    return add_up(part, len(left), rows_of_block(width))
