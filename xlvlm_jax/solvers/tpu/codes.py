"""Semi-NMF on a TPU: codes and the sums of an update, with one read of Z.

    codes_n = some sweeps of coordinate descent on   1/2 u G u - u (V z_n) + alpha |u|_1,  G = V V^T
    cost_n = 1/2 |z_n|^2 - u (V z_n - 1/2 G u) + alpha |u|_1
    images = codes Z,   overlap = codes codes^T,   used = sum of |codes|

A block of rows is copied into fast memory once. There its parts are computed, which give the
products V Z^T and with the codes the sums. The gradients of all codes of a block stay in fast
memory too: a step of the descent corrects them by one row of G.

The codes are [K, N], see `semi_nmf_codes`. N rows, D width, K atoms; B rows per block.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xlvlm_jax.solvers.sums import Wide
from xlvlm_jax.solvers.tpu import blocks
from xlvlm_jax.solvers.tpu.blocks import CORES, Sizes

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
    specs = blocks.Specs(N, sizes)
    shapes = [(1, G, 1)] * 2 + [(1, G, G)] * 2 + [(1, G, D)] * 2
    codes, cost, *sums = pl.pallas_call(
        partial(_kernel, sizes=sizes, num_rows=N, sweeps=sweeps, nonnegative=nonnegative),
        in_specs=[
            specs.rows(D),
            specs.values(),
            specs.values(K),
            specs.whole(*stack.shape),
            specs.whole(G, G),
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
            *[pltpu.VMEM((1, G, B), jnp.float32)] * 2,
            pltpu.VMEM((1, 3 * G, B), jnp.bfloat16),
        ],
        interpret=interpret,
        name="codes_and_sums",
        **specs.options,
    )(Z, energy[None], codes, stack, gram, alpha.reshape(1, 1))  # fmt: skip
    used, overlap, images = (
        blocks.both(pair, (K, width))
        for pair, width in ((sums[:2], 1), (sums[2:4], G), (sums[4:], D))
    )
    used, overlap = Wide(*(n[:, 0] for n in used)), Wide(*(n[:, :K] for n in overlap))
    return Collected(codes, cost[0], images, overlap, used)


def _kernel(
    Z: Any, energy: Any, given: Any, stack: Any, gram: Any, alpha: Any,
    codes: Any, cost: Any, *rest: Any,
    sizes: Sizes, num_rows: int, sweeps: int, nonnegative: bool,
) -> None:  # fmt: skip
    """Handles one block of rows; the arguments are references to what lies in fast memory."""
    from jax.experimental import pallas as pl

    (used, overlap, images), rest = (rest[:2], rest[2:4], rest[4:6]), rest[6:]
    split, (products, padded, members) = rest[:3], rest[3:]
    B, K = sizes.rows, len(given)
    first, counts_here, step = blocks.place(num_rows, B)

    @pl.when(step == 0)
    def _() -> None:
        for total in (*used, *overlap, *images):
            total[...] = jnp.zeros_like(total)

    is_row = first + jax.lax.broadcasted_iota(jnp.int32, (1, B), 1) < num_rows
    products[...] = jnp.zeros_like(products)
    blocks.score(Z, None, stack, split, products, sizes, num_rows - first if num_rows % B else None)
    padded[...] = jnp.zeros_like(padded)
    padded[0, :K] = jnp.where(is_row, given[...], 0)
    new, gains = _descend(padded[0], products[0], gram[...], alpha[...], K, sweeps, nonnegative)
    codes[...] = new[:K]
    gained = new * gains - alpha[...] * jnp.abs(new)
    cost[...] = energy[...] - jnp.sum(gained, axis=0, keepdims=True)

    counted = jnp.where(counts_here, new, 0)
    blocks.add(used, 0, jnp.sum(jnp.abs(counted), axis=1, keepdims=True))
    blocks.add(overlap, 0, _multiplied(counted, counted, blocks.BY_ROWS))
    members[0] = blocks.stacked(counted)
    blocks.sum_up(members, split, images, sizes, False)


def _descend(
    codes: Array,
    products: Array,
    gram: Array,
    alpha: Array,
    num_concepts: int,
    sweeps: int,
    nonnegative: bool,
) -> tuple[Array, Array]:
    """Returns codes[G, B] after some sweeps, and V z_n - 1/2 G u."""
    rows = jax.lax.broadcasted_iota(jnp.int32, codes.shape, 0)

    def sweep(_: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        codes, gradients = carry
        for k in range(num_concepts):
            of_atom, length = gram[:, k : k + 1], gram[k : k + 1, k : k + 1]
            curvature, old = jnp.maximum(length, TINY), codes[k : k + 1]
            step, threshold = old + gradients[k : k + 1] / curvature, alpha / curvature
            # Not by sign(), whose lowering asks the machine which TPU it has.
            best = jnp.maximum(step - threshold, 0)
            best = best if nonnegative else best + jnp.minimum(step + threshold, 0)
            new = jnp.where(length > 0, best, 0)
            gradients = gradients - of_atom * (new - old)
            codes = jnp.where(rows == k, new, codes)
        return codes, gradients

    gradients = products - _multiplied(gram, codes, blocks.BY_COLUMNS)
    codes, _ = jax.lax.fori_loop(0, sweeps, sweep, (codes, gradients))
    # Computed again: those of the descent have the rounding of every step.
    half = 0.5 * _multiplied(gram, codes, blocks.BY_COLUMNS)
    return codes, products - half


def _multiplied(left: Array, right: Array, dimensions: Any) -> Array:
    return jax.lax.dot_general(
        left, right, dimensions, precision="highest", preferred_element_type=jnp.float32
    )
