"""Semi-NMF on a TPU: codes and the sums of an update, with one read of Z.

    codes_n = some sweeps of coordinate descent on   1/2 u G u - u (V z_n) + alpha |u|_1,  G = V V^T
    cost_n = 1/2 |z_n|^2 - u (V z_n - 1/2 G u) + alpha |u|_1
    images = codes Z,   overlap = codes codes^T,   used = sum of |codes|

A block of rows is copied into fast memory once. There its parts are computed, which give the
products V Z^T and with the codes the sums. A step sets one code of every row to where its part of
the objective is least, given the others:

    u_k = max(w_k - alpha / G_kk, 0),   w_k = (V z_n)_k / G_kk - sum over j != k of u_j G_jk / G_kk

The numbers w of all codes of a block stay in registers where they fit (K = 20): a step corrects
them by one column of G_jk / G_kk, with a zero for the code itself.

The codes are [K, N], see `semi_nmf_codes`. N rows, D width, K atoms; B rows per block.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xlvlm_jax.solvers.sums import Wide
from xlvlm_jax.solvers.tpu import blocks
from xlvlm_jax.solvers.tpu.blocks import CORES, LANES, SUBLANES, Sizes

MOST = 64  # atoms: each takes a few lines of the program
COPIES = 2 * 2  # of the images: a pair, written while the other core's are computed
TINY = 1e-30


class Collected(NamedTuple):
    """What a pass over the rows returns."""

    codes: Float[Array, "K N"]
    cost: Float[Array, " N"]
    images: Wide  # [K, D]
    overlap: Wide  # [K, K]
    used: Wide  # [K]


def takes(Z: Array | jax.ShapeDtypeStruct, num_concepts: int) -> bool:
    """Returns whether `improve` is used for these rows and so many atoms.

    Raises:
        ValueError: the variable XLVLM_TPU_KERNELS is neither "on" nor "off".
    """
    few = num_concepts <= MOST
    return blocks.is_on() and few and blocks.sizes(Z, num_concepts, COPIES) is not None


def improve(
    Z: Float[Array, "N D"],
    energy: Float[Array, " N"],
    codes: Float[Array, "K N"],
    atoms: Float[Array, "K D"],
    gram: Float[Array, "K K"],
    alpha: Float[Array, ""] | float,
    sweeps: int,
    nonnegative: bool = True,
) -> Collected:
    """Returns improved codes, their sums and each row's share of the objective.

    Traces under jit, vmap and shard_map; has no derivative.

    Args:
        Z: float32[N, D], see `takes`.
        energy: float32[N], 1/2 |z_n|^2.
        codes: float32[K, N] to start from.
        atoms: float32[K, D], V.
        gram: float32[K, K], V V^T.
        alpha: weight of the l1 penalty.
        sweeps: number of times that each code is set.
        nonnegative: whether codes must be >= 0.
    """
    found = blocks.sizes(Z, len(atoms), COPIES)
    assert found is not None, "`takes` was asked"
    run = partial(_improve, sizes=found, sweeps=sweeps, nonnegative=nonnegative)
    # On another backend, in tests, the same kernel runs as ordinary operations.
    return jax.lax.platform_dependent(
        Z, energy, codes, atoms, gram, jnp.asarray(alpha, jnp.float32),
        tpu=partial(run, interpret=False), default=partial(run, interpret=True),
    )  # fmt: skip


def _improve(
    Z: Array,
    energy: Array,
    codes: Array,
    atoms: Array,
    gram: Array,
    alpha: Array,
    *,
    sizes: Sizes,
    sweeps: int,
    nonnegative: bool,
    interpret: bool,
) -> Collected:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (N, D), K, (B, _, G, _) = Z.shape, len(atoms), sizes
    stack = blocks.stacked(jnp.pad(atoms, ((0, G - K), (0, 0))))[None]
    gram = jnp.pad(gram, ((0, G - K), (0, G - K)))
    length = jnp.diagonal(gram)
    inverse = jnp.where(length > 0, 1 / jnp.maximum(length, TINY), 0)[:, None]
    others = inverse * (gram - jnp.diag(length))
    grams = jnp.stack([blocks.stacked(gram), blocks.stacked(others)])
    columns = jnp.broadcast_to(others.T[:K, :, None], (K, G, LANES))
    specs = blocks.Specs(N, sizes)
    shapes = [(1, G, 1)] * 2 + [(1, G, G)] * 2 + [(1, G, D)] * 2
    codes, cost, *sums = pl.pallas_call(
        partial(_kernel, sizes=sizes, num_rows=N, sweeps=sweeps, nonnegative=nonnegative),
        in_specs=[
            specs.rows(D),
            specs.values(),
            specs.values(K),
            specs.whole(*stack.shape),
            specs.whole(*grams.shape),
            specs.whole(*columns.shape),
            specs.whole(*inverse.shape),
            specs.whole(1, 1),
        ],
        out_specs=[specs.values(K), specs.values(), *(specs.total(*shape) for shape in shapes)],
        out_shape=[
            jax.ShapeDtypeStruct((K, N), jnp.float32),
            jax.ShapeDtypeStruct((1, N), jnp.float32),
            *(jax.ShapeDtypeStruct((CORES, *shape), jnp.float32) for shape in shapes),
        ],
        scratch_shapes=[
            *[pltpu.VMEM((B // 2, D), jnp.int32)] * 3,
            pltpu.VMEM((1, G, B), jnp.float32),
            pltpu.VMEM((G, B), jnp.float32),
            pltpu.VMEM((1, 3 * G, B), jnp.bfloat16),
        ],
        interpret=interpret,
        name="codes_and_sums",
        **specs.options,
    )(Z, energy[None], codes, stack, grams, columns, inverse, alpha.reshape(1, 1))  # fmt: skip
    used, overlap, images = (
        blocks.both(pair, (K, width))
        for pair, width in ((sums[:2], 1), (sums[2:4], G), (sums[4:], D))
    )
    used, overlap = Wide(*(n[:, 0] for n in used)), Wide(*(n[:, :K] for n in overlap))
    return Collected(codes, cost[0], images, overlap, used)


def _kernel(
    Z: Any, energy: Any, given: Any, stack: Any, grams: Any, columns: Any, inverse: Any, alpha: Any,
    codes: Any, cost: Any, *rest: Any,
    sizes: Sizes, num_rows: int, sweeps: int, nonnegative: bool,
) -> None:  # fmt: skip
    """Handles one block of rows; the arguments are references to what lies in fast memory."""
    from jax.experimental import pallas as pl

    (used, overlap, images), rest = (rest[:2], rest[2:4], rest[4:6]), rest[6:]
    split, (products, new, members) = rest[:3], rest[3:]
    B, K = sizes.rows, len(given)
    first, counts_here, step = blocks.place(num_rows, B)

    @pl.when(step == 0)
    def _() -> None:
        for total in (*used, *overlap, *images):
            total[...] = jnp.zeros_like(total)

    is_row = first + jax.lax.broadcasted_iota(jnp.int32, (1, B), 1) < num_rows
    products[...] = jnp.zeros_like(products)
    blocks.score(Z, None, stack, split, products, sizes, num_rows - first if num_rows % B else None)
    new[...] = jnp.zeros_like(new)
    new[:K] = jnp.where(is_row, given[...], 0)
    of_others = blocks.product(grams[1], blocks.parts(new[...]), blocks.BY_COLUMNS, False)
    wanted = inverse[...] * products[0] - of_others
    _descend(new, wanted, columns, alpha[...] * inverse[...], sweeps, nonnegative)
    codes[...] = new[:K]
    of_codes, lengths = blocks.parts(new[...]), jnp.abs(new[...])
    gains = products[0] - 0.5 * blocks.product(grams[0], of_codes, blocks.BY_COLUMNS, False)
    gained = new[...] * gains - alpha[...] * lengths
    cost[...] = energy[...] - jnp.sum(gained, axis=0, keepdims=True)
    members[0] = jnp.concatenate(of_codes)

    @pl.when(counts_here)
    def _() -> None:
        blocks.add(used, 0, jnp.sum(lengths, axis=1, keepdims=True))
        blocks.add(overlap, 0, blocks.product(members[0], of_codes, blocks.BY_ROWS, False))
        blocks.sum_up(members, split, images, sizes, False)


def _descend(
    codes: Any, wanted: Array, columns: Any, thresholds: Array, sweeps: int, nonnegative: bool
) -> None:
    """Sets each code of a block `sweeps` times.

    Args:
        codes: reference to float32[G, B].
        wanted: float32[G, B], what each code would become without a penalty while the others stay.
        columns: reference to float32[K, G, LANES]: by how much `wanted` falls where code k grows.
        thresholds: float32[G, 1], by how much the penalty reduces each code.
        sweeps: number of times that each code is set.
        nonnegative: whether codes must be >= 0.
    """
    (G, B), K = codes.shape, len(columns)
    wanted = wanted - thresholds if nonnegative else wanted

    def sweep(_: Any, tiles: tuple[Array, ...]) -> tuple[Array, ...]:
        for k in range(K):
            tile, row = divmod(k, SUBLANES)
            # In each row of a tile, so that the change can be multiplied with a column.
            best = jnp.broadcast_to(tiles[tile][row : row + 1], (SUBLANES, B))
            old = jnp.broadcast_to(codes[k : k + 1], (SUBLANES, B))
            if nonnegative:
                new = jnp.maximum(best, 0)
            else:
                # Not by sign(), whose lowering asks the machine which TPU it has.
                threshold = thresholds[k : k + 1]
                new = jnp.maximum(best - threshold, 0) + jnp.minimum(best + threshold, 0)
            codes[k : k + 1] = new[:1]
            change = new - old
            of_code = jnp.concatenate([columns[k]] * (B // LANES), axis=1)
            tiles = tuple(
                values - of_code[i * SUBLANES : (i + 1) * SUBLANES] * change
                for i, values in enumerate(tiles)
            )
        return tiles

    tiles = tuple(wanted[i : i + SUBLANES] for i in range(0, G, SUBLANES))
    jax.lax.fori_loop(0, sweeps, sweep, tiles)
