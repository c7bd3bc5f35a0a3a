"""Blocks of rows in a TPU's fast memory, and products with them at the precision of float32.

A TPU multiplies bfloat16 numbers, of 8 bits, and adds in float32. A float32 number is the sum of
three of them, x = x1 + x2 + x3, and six of the nine products of two such sums reach its precision:
x1 y1 + (x1 y2 + x2 y1) + (x1 y3 + x2 y2 + x3 y1). That is what XLA multiplies at precision
"highest", in six products. If one factor has only K rows, it fills the unit better to stack its
parts: with S = [y1; y2; y3], the products x1 S, x2 S[: 2K] and x3 S[: K] are all six, and the parts
of a block, the large factor, are loaded into the unit three times instead of six. A factor of zeros
and ones is its own first part, and three products are exact.

N rows in all, B rows per block, D width, K rows of the small factor. C columns are split at once,
many of them: each step of the loop over them waits for the unit to finish.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float

from xlvlm_jax.solvers.sums import Wide

# "off" makes a TPU run the same programs as other backends. Read when a program is traced.
VARIABLE = "XLVLM_TPU_KERNELS"
# Bytes of fast memory that a kernel may take; a core has 128 MiB on v5e and v6e, 64 MiB on v5p.
FAST, SPARE = 56 * 2**20, 4 * 2**20
# Numbers and rows per block: copying a block takes many times as long as beginning one.
BLOCK, ROWS = 2**21, (1024, 512, 256, 128)
LANES, SUBLANES = 128, 8  # arrays lie in tiles of 8 rows of 128 numbers
CHUNKS = (1024, 512, 256, 128)  # columns
PIECE = (128, 256)  # rows and columns whose parts fit into registers
LEAST_WIDTH, LEAST_ROWS = 512, 1024  # of a Z that is worth a kernel
GROUP = 128  # rows of the small factor that are multiplied together
# A v5p divides the outer steps between its two cores; the others have one, which takes both.
CORES = 2
BY_ROWS = (((1,), (1,)), ((), ()))  # a b^T
BY_COLUMNS = (((1,), (0,)), ((), ()))  # a b


class Sizes(NamedTuple):
    """How a kernel divides its work."""

    rows: int  # B
    chunk: int  # C
    group: int  # rows of the small factor per group, in multiples of SUBLANES
    groups: int

    @property
    def height(self) -> int:
        """Number of rows of the small factor, with those that fill the last group."""
        return self.group * self.groups


class Specs:
    """Where the operands of a kernel lie: its grid is cores by steps, a block of rows per step.

    Args:
        num_rows: N.
        sizes: how the work is divided.
    """

    def __init__(self, num_rows: int, sizes: Sizes):
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        self._pl, self._rows = pl, sizes.rows
        self._count = -(-num_rows // sizes.rows)
        self.steps = -(-self._count // CORES)
        self.options: dict[str, Any] = {
            "grid": (CORES, self.steps),
            "compiler_params": pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=FAST + SPARE
            ),
        }

    def _block(self, core: Any, step: Any) -> Any:
        # The last core may have a step too many, which repeats the last block and counts nothing.
        return jnp.minimum(core * self.steps + step, self._count - 1)

    def rows(self, width: int) -> Any:
        """Returns where a [N, width] lies: a block of rows at a time."""
        return self._pl.BlockSpec((self._rows, width), lambda *at: (self._block(*at), 0))

    def values(self, height: int = 1) -> Any:
        """Returns where a [height, N] lies, values of rows: those of a block at a time."""
        return self._pl.BlockSpec((height, self._rows), lambda *at: (0, self._block(*at)))

    def whole(self, *shape: int) -> Any:
        """Returns where an array lies that is copied once."""
        once = self._pl.Buffered(1)
        return self._pl.BlockSpec(shape, lambda *at: (0,) * len(shape), pipeline_mode=once)

    def total(self, *shape: int) -> Any:
        """Returns where sums over the rows lie, a [CORES, *shape]."""
        return self._pl.BlockSpec((None, *shape), lambda core, step: (core,) + (0,) * len(shape))


def place(num_rows: int, size: int) -> tuple[Any, Any, Any]:
    """Returns where a kernel is: the first row of its block, whether it counts, and its step."""
    from jax.experimental import pallas as pl

    core, step = pl.program_id(0), pl.program_id(1)
    number, last = core * pl.num_programs(1) + step, -(-num_rows // size) - 1
    return jnp.minimum(number, last) * size, number <= last, step


def both(total: Sequence[Array], shape: tuple[int, ...]) -> Wide:
    """Returns the sum over cores of a pair, without what fills groups.

    Args:
        total: float32[CORES, groups, G, ...] twice.
        shape: of the sum, [K, ...].
    """
    first, second = (
        Wide(*(part[core].reshape(-1, *shape[1:])[: shape[0]] for part in total))
        for core in range(CORES)
    )
    return first + second


def is_on() -> bool:
    """Returns whether solvers use the kernels: on TPUs, unless XLVLM_TPU_KERNELS is "off".

    Raises:
        ValueError: the variable is neither "on" nor "off".
    """
    asked = os.environ.get(VARIABLE, "on").strip().lower()
    if asked not in ("on", "off"):
        raise ValueError(f"{VARIABLE} is {asked!r}; expected on or off")
    return asked == "on" and jax.default_backend() == "tpu"


def sizes(Z: Array | jax.ShapeDtypeStruct, num_small: int, copies: int) -> Sizes | None:
    """Returns how to divide a product of Z with few rows; None if no kernel takes it.

    Args:
        Z: float[N, D], or its shape and dtype.
        num_small: K, number of rows of the small factor.
        copies: how many float32[K, D] the kernel keeps in fast memory besides that factor.
    """
    (N, D), K = Z.shape, num_small
    if Z.dtype != jnp.float32 or D % LANES or D < LEAST_WIDTH or N < LEAST_ROWS:
        return None
    group = min(-(-K // SUBLANES) * SUBLANES, GROUP)
    groups = -(-K // group)
    chunk = next(chunk for chunk in CHUNKS if D % chunk == 0)
    small = group * groups * D * (3 * 2 + 4 * copies)
    for rows in ROWS:
        # Two blocks, one of which is being copied; the parts of one; and scores and the like.
        block = rows * (D * (2 * 4 + 3 * 2) + group * groups * 4 * 4)
        if rows * D <= max(BLOCK, ROWS[-1] * D) and block + small <= FAST:
            return Sizes(rows, chunk, group, groups)
    return None


def parts(x: Float[Array, "..."]) -> tuple[BFloat16[Array, "..."], ...]:
    """Returns three arrays whose sum is x, to the last bit but one.

    Rounds by bits: XLA would take a conversion to bfloat16 and back for nothing, and the compiler
    of kernels would arrange the converted numbers twice.
    """

    def leading(x: Array, half: int) -> Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.int32)
        return jax.lax.bitcast_convert_type((bits + half) & -0x10000, jnp.float32)

    first = leading(x, 0x8000)
    rest = x - first
    second = leading(rest, 0)
    return tuple(part.astype(jnp.bfloat16) for part in (first, second, rest - second))


def stacked(x: Float[Array, "K ..."]) -> BFloat16[Array, "3*K ..."]:
    """Returns the parts below each other."""
    return jnp.concatenate(parts(x))


def product(
    stack: BFloat16[Array, "S _"], of_block: tuple[Array, ...], dimensions: Any, is_exact: bool
) -> Float[Array, "K _"]:
    """Returns the product of the small factor and a block, at the precision of float32.

    Args:
        stack: parts of the small factor; the factor itself if it is exact in bfloat16.
        of_block: parts of the block.
        dimensions: BY_ROWS or BY_COLUMNS.
        is_exact: whether the small factor is exact in bfloat16.
    """

    def multiplied(rows: Array, part: Array) -> Array:
        return jax.lax.dot_general(rows, part, dimensions, preferred_element_type=jnp.float32)

    first, second, third = of_block
    if is_exact:
        return (multiplied(stack, third) + multiplied(stack, second)) + multiplied(stack, first)
    K = len(stack) // 3
    by_first, by_second = multiplied(stack, first), multiplied(stack[: 2 * K], second)
    least = by_first[2 * K :] + by_second[K:] + multiplied(stack[:K], third)
    return by_first[:K] + (by_first[K : 2 * K] + by_second[:K] + least)


def score(
    Z: Any, mean: Any, stack: Any, split: tuple, scores: Any, sizes: Sizes, count: Any
) -> None:
    """Splits a block of rows, and adds its products with the small factor.

    All but `sizes` and `count` are references.

    Args:
        Z: float32[B, D], the block.
        mean: float32[1, D], subtracted from the rows; None for zeros.
        stack: bfloat16[groups, 3 G, D], parts of the small factor.
        split: three int32[B / 2, D], to which the parts are written in pairs of rows.
        scores: float32[groups, G, B], to which the products are added.
        sizes: how the work is divided.
        count: number of rows of the block that exist; None for all. What lies behind them is
            undefined, and may be NaN.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    high, wide = PIECE[0], min(PIECE[1], sizes.chunk)

    def some(i: Any, carry: None) -> None:
        for within in range(0, sizes.chunk, wide):
            columns = pl.ds(pl.multiple_of(i * sizes.chunk + within, wide), wide)
            for start in range(0, sizes.rows, high):
                piece = slice(start, start + high)
                z = Z[piece, columns]
                z = z if mean is None else z - mean[:, columns]
                if count is not None:
                    numbers = start + jax.lax.broadcasted_iota(jnp.int32, (high, 1), 0)
                    z = jnp.where(numbers < count, z, 0)
                of_piece = parts(z)
                for whole, part in zip(split, of_piece, strict=True):
                    # As integers they lie as the multiplying unit takes them.
                    pairs = slice(start // 2, (start + high) // 2)
                    whole[pairs, columns] = pltpu.bitcast(part, jnp.int32)
                for g in range(sizes.groups):
                    rows = stack[g, :, columns]
                    scores[g, :, piece] += product(rows, of_piece, BY_ROWS, False)

    jax.lax.fori_loop(0, Z.shape[1] // sizes.chunk, some, None)


def sum_up(members: Any, split: tuple, totals: Any, sizes: Sizes, is_exact: bool) -> None:
    """Adds the products of the small factor and a block to totals.

    Args:
        members: reference to bfloat16[groups, 3 G, B], parts of the small factor; [groups, G, B],
            the factor itself, if it is exact in bfloat16.
        split: references to the parts of the block, as `score` leaves them.
        totals: references to a pair of float32[groups, G, D].
        sizes: how the work is divided.
        is_exact: whether the small factor is exact in bfloat16.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    width = split[0].shape[1]
    # Fewer steps than in `score`: the parts are there, so that a step holds less.
    chunk = 2 * sizes.chunk if sizes.groups == 1 and width % (2 * sizes.chunk) == 0 else sizes.chunk

    def some(i: Any, carry: None) -> None:
        columns = pl.ds(pl.multiple_of(i * chunk, chunk), chunk)
        of_block = tuple(pltpu.bitcast(part[:, columns], jnp.bfloat16) for part in split)
        for g in range(sizes.groups):
            part = product(members[g], of_block, BY_COLUMNS, is_exact)
            add(totals, (g, slice(None), columns), part)

    jax.lax.fori_loop(0, width // chunk, some, None)


def add(total: Any, at: Any, part: Float[Array, "..."]) -> None:
    """Adds to a pair of references, like `sums.Wide`: `total[1]` has what rounding removes."""
    high, low = total
    before = high[at]
    after = before + part
    of_part = after - before
    low[at] += (before - (after - of_part)) + (part - of_part)
    high[at] = after
