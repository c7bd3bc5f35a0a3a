"""K-means on a TPU: nearest centroids and sums of the clusters, with one read of Z.

    score[k, n] = |c'_k|^2 - 2 c'_k (z_n - m)      see `kmeans_assignment`
    totals[k] = sum over the rows n of cluster k of w_n (z_n - m)

A block of rows is copied into fast memory once. There its mean is subtracted and its parts are
computed, which give the scores, and with the labels the sums. Scores never leave fast memory.

N rows, D width, K centroids; B, C, G rows, columns and centroids that are handled together.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xlvlm_jax.solvers.sums import Wide
from xlvlm_jax.solvers.tpu import blocks
from xlvlm_jax.solvers.tpu.blocks import CORES, Sizes

COPIES = 2 * 2  # of totals: a pair, written while the other core's are computed


class Assigned(NamedTuple):
    """What a pass over the rows returns."""

    labels: Int[Array, " N"]
    least: Float[Array, " N"]  # the scores of those centroids
    second: Float[Array, " N"]  # lowest score of any other centroid; Inf if there is none
    counts: Wide  # [K]
    totals: Wide  # [K, D]


def takes(Z: Array | jax.ShapeDtypeStruct, num_clusters: int) -> bool:
    """Returns whether `assign` is used for these rows and so many clusters.

    Raises:
        ValueError: the variable XLVLM_TPU_KERNELS is neither "on" nor "off".
    """
    return blocks.is_on() and blocks.sizes(Z, num_clusters, COPIES) is not None


def assign(
    Z: Float[Array, "N D"],
    offsets: Float[Array, "K D"],
    mean: Float[Array, " D"],
    bias: Float[Array, " K"],
    counted: Float[Array, " N"],
    are_ones: bool,
) -> Assigned:
    """Returns the nearest centroid of every row and the sums of the clusters.

    Traces under jit, vmap and shard_map; has no derivative.

    Args:
        Z: float32[N, D], see `takes`.
        offsets: float32[K, D], the centroids minus m.
        mean: float32[D], m.
        bias: float32[K], |offsets|^2; Inf for a centroid that gets no rows.
        counted: float32[N], the weight of each row in the sums.
        are_ones: whether the weights are only zeros and ones.
    """
    found = blocks.sizes(Z, len(offsets), COPIES)
    assert found is not None, "`takes` was asked"
    run = partial(_assign, sizes=found, are_ones=are_ones)
    # On another backend, in tests, the same kernel runs as ordinary operations.
    return jax.lax.platform_dependent(
        Z, offsets, mean, bias, counted,
        tpu=partial(run, interpret=False), default=partial(run, interpret=True),
    )  # fmt: skip


def _assign(
    Z: Array,
    offsets: Array,
    mean: Array,
    bias: Array,
    counted: Array,
    *,
    sizes: Sizes,
    are_ones: bool,
    interpret: bool,
) -> Assigned:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (N, D), K = Z.shape, len(offsets)
    B, _, G, groups = sizes
    missing = sizes.height - K
    bias = jnp.pad(bias, (0, missing), constant_values=jnp.inf).reshape(groups, G, 1)
    grouped = jnp.pad(-2 * offsets, ((0, missing), (0, 0))).reshape(groups, G, D)
    stack = jax.vmap(blocks.stacked)(grouped)
    specs = blocks.Specs(N, sizes)
    row = jax.ShapeDtypeStruct((1, N), jnp.float32)
    shapes = [(groups, G, 1)] * 2 + [(groups, G, D)] * 2
    labels, least, second, *sums = pl.pallas_call(
        partial(_kernel, sizes=sizes, num_rows=N, are_ones=are_ones),
        in_specs=[
            specs.rows(D),
            specs.values(),
            specs.whole(1, D),
            specs.whole(*stack.shape),
            specs.whole(*bias.shape),
        ],
        out_specs=[specs.values()] * 3 + [specs.total(*shape) for shape in shapes],
        out_shape=[
            row.update(dtype=jnp.int32), row, row,
            *(jax.ShapeDtypeStruct((CORES, *shape), jnp.float32) for shape in shapes),
        ],
        scratch_shapes=[
            *[pltpu.VMEM((B // 2, D), jnp.int32)] * 3,
            pltpu.VMEM((groups, G, B), jnp.float32),
            pltpu.VMEM((groups, G if are_ones else 3 * G, B), jnp.bfloat16),
        ],
        interpret=interpret,
        name="nearest_centroids",
        **specs.options,
    )(Z, counted[None], mean[None], stack, bias)  # fmt: skip
    counts, totals = blocks.both(sums[:2], (K, 1)), blocks.both(sums[2:], (K, D))
    return Assigned(labels[0], least[0], second[0], Wide(*(n[:, 0] for n in counts)), totals)


def _kernel(
    Z: Any, counted: Any, mean: Any, stack: Any, bias: Any,
    labels: Any, least: Any, second: Any, *rest: Any,
    sizes: Sizes, num_rows: int, are_ones: bool,
) -> None:  # fmt: skip
    """Handles one block of rows; the arguments are references to what lies in fast memory."""
    from jax.experimental import pallas as pl

    counts, totals, split, (scores, members) = rest[:2], rest[2:4], rest[4:7], rest[7:]
    B, G, groups = sizes.rows, sizes.group, sizes.groups
    first, counts_here, step = blocks.place(num_rows, B)

    @pl.when(step == 0)
    def _() -> None:
        for total in (*counts, *totals):
            total[...] = jnp.zeros_like(total)

    scores[...] = jnp.broadcast_to(bias[...], scores.shape)
    blocks.score(Z, mean, stack, split, scores, sizes, num_rows - first if num_rows % B else None)
    label, best, other = _nearest(scores, sizes)
    labels[...], least[...], second[...] = label, best, other

    is_row = first + jax.lax.broadcasted_iota(jnp.int32, (1, B), 1) < num_rows
    weights = jnp.where(is_row & counts_here, counted[...], 0)
    for g in range(groups):
        clusters = g * G + jax.lax.broadcasted_iota(jnp.int32, (G, B), 0)
        chosen = jnp.where(clusters == label, weights, 0)
        blocks.add(counts, g, jnp.sum(chosen, axis=1, keepdims=True))
        members[g] = chosen.astype(jnp.bfloat16) if are_ones else blocks.stacked(chosen)
    blocks.sum_up(members, split, totals, sizes, are_ones)


def _nearest(scores: Any, sizes: Sizes) -> tuple[Array, Array, Array]:
    """Returns label, lowest and second lowest score of each row, [1, B]; ties go to the first."""
    B, _, G, groups = sizes

    def of_group(g: int) -> tuple[Array, Array, Array]:
        here = scores[g]
        numbers = jax.lax.broadcasted_iota(jnp.int32, (G, B), 0)
        least = jnp.min(here, axis=0, keepdims=True)
        label = jnp.min(jnp.where(here == least, numbers, G - 1), axis=0, keepdims=True)
        others = jnp.where(numbers == label, jnp.inf, here)
        return g * G + label, least, jnp.min(others, axis=0, keepdims=True)

    label, least, second = of_group(0)
    for g in range(1, groups):
        own, own_least, own_second = of_group(g)
        second = jnp.minimum(jnp.maximum(least, own_least), jnp.minimum(second, own_second))
        label = jnp.where(own_least < least, own, label)
        least = jnp.minimum(least, own_least)
    return label, least, second
