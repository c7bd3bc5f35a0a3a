"""Passes over a Z that need not fit into memory: rows come tile by tile from a source.

B rows per tile, D width.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from xlvlm_jax.solvers.sums import NEAR, Wide
from xlvlm_jax.solvers.validation import LEAST, MOST, check_block, unit_for

TILE_BYTES = 2**22  # the second product of a tile then finds it in the cache
Write = Callable[[int, np.ndarray], None]


@runtime_checkable
class Source(Protocol):
    """A matrix whose rows are read on demand."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        ...

    def tiles(self, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first row, rows[B, D]) in order, `count` rows each except the last, read ahead.

        A CPU computes on the rows in place: they must not be overwritten afterwards.
        """
        ...

    def take(self, numbers: Int[np.ndarray, " R"]) -> Float[np.ndarray, "R D"]:
        """Returns rows by number."""
        ...


class TooLargeError(ValueError):
    """A row is finite, but its squares are not fit for the solvers; see `Scaled`."""


class Scaled:
    """A source divided by a power of two, so that products of its sums of squares fit float32.

    Args:
        source: the rows of Z.
        unit: the power of two. Rows are read as they are if it is one.
    """

    def __init__(self, source: Source, unit: float):
        self._source, self.unit = source, unit

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return self._source.shape

    def tiles(self, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields as the source does, divided by the unit."""
        for start, values in self._source.tiles(count):
            yield start, self._divided(values)

    def take(self, numbers: Int[np.ndarray, " R"]) -> Shaped[np.ndarray, "R D"]:
        """Returns rows by number, divided by the unit."""
        return self._divided(self._source.take(numbers))

    def _divided(self, values: Any) -> np.ndarray:
        # In float64, which holds the inverse of any unit.
        return values if self.unit == 1 else (np.asarray(values, np.float64) / self.unit)


class Scale(NamedTuple):
    """The unit of a source, and the root mean square norm of its rows."""

    unit: float
    norm: float  # of NEAR rows, about that of all


def scale_of(source: Source, exact: bool = False) -> Scale:
    """Returns the unit to divide a source by, see `validation.unit_of`.

    Some rows from all over the source tell that it needs none. Only if they don't, all rows are
    read once.

    Args:
        source: the rows of Z.
        exact: whether to look at all rows anyway.

    Raises:
        ValueError: a row has NaN or Inf; the first such row is named.
    """
    N, D = source.shape
    numbers = np.unique(np.linspace(0, N - 1, min(NEAR, N)).astype(np.int64))
    rows = np.asarray(source.take(numbers)).astype(np.float64)
    rows = rows[np.isfinite(rows).all(axis=1)]  # the first pass reports the others
    energy, most = np.sum(rows**2) / max(len(rows), 1), np.abs(rows).max(initial=0)
    if not exact and most >= LEAST and energy * N < MOST:
        return Scale(1.0, float(energy**0.5))
    largest = total = 0.0
    size = max(TILE_BYTES // (4 * D), 1)
    for number, values in source.tiles(size):
        start = int(number)  # numpy's of some sources
        wide = check_block(values, (min(size, N - start), D), start).astype(np.float64)
        squares = np.sum(wide**2, axis=1)
        _check_finite(squares, start + np.arange(len(squares)))
        largest, total = max(largest, float(np.abs(wide).max())), total + float(squares.sum())
    return Scale(unit_for(largest, total), (total / max(N, 1)) ** 0.5)


class Tile(NamedTuple):
    """Rows on the device; the last tile is padded with zeros, so that all have the same shape."""

    start: int
    num_rows: int
    Z: Float[Array, "B D"]
    real: Float[Array, " B"]  # 1 for a row of the source, 0 for padding


def tiles(source: Source) -> Iterator[Tile]:
    """Yields all tiles of the source once.

    Raises:
        ValueError: the source yields other rows than its shape promises.
    """
    D = source.shape[1]
    size = min(max(TILE_BYTES // (4 * D), 1), source.shape[0])
    real = jnp.ones(size, jnp.float32)
    following = 0
    for number, values in source.tiles(size):
        start = int(number)
        values = check_block(values, (min(size, source.shape[0] - start), D), start)
        if start != following:
            raise ValueError(
                f"the source of Z gave row {start} where {following} was expected; yield rows in "
                "order"
            )
        count = len(values)
        following += count
        if count < size:
            values = np.concatenate([values, np.zeros((size - count, D), values.dtype)])
            real = jnp.asarray(np.arange(size) < count, jnp.float32)
        # device_put, as asarray would copy an array that a CPU can use in place.
        yield Tile(start, count, jax.device_put(values), real)
    if following != source.shape[0]:
        raise ValueError(
            f"the source of Z ended after {following} rows; expected {source.shape[0]}, from its "
            "own shape; fix its shape or its reader"
        )


def add_up(
    source: Source,
    work: Callable[[Tile], tuple[Any, Any]],
    keep: Callable[[Tile, Any], None] | None = None,
) -> Any:
    """Adds up what `work` returns over all tiles.

    Args:
        source: rows of Z.
        work: maps a tile to (sums, rest).
        keep: called with each tile and its rest. It runs one tile late, so that reading and
            computing need not wait for it.

    Returns:
        the total of the sums, with a `Wide` for each array.
    """
    totals, last = None, None
    for tile in tiles(source):
        sums, rest = work(tile)
        if last is not None:
            # At most two tiles are held, however fast they are read.
            jax.block_until_ready(totals)
            if keep is not None:
                keep(*last)
        totals = _begun(sums) if totals is None else _sum(totals, sums)
        last = tile, rest
    if keep is not None and last is not None:
        keep(*last)
    return totals


def write_out(source: Source, work: Callable[[Tile], tuple[Any, Array]], write: Write) -> Any:
    """Runs the last pass: `add_up`, with activations[B, K] as the rest, which it writes."""
    return add_up(
        source, work, lambda tile, found: write(tile.start, np.asarray(found[: tile.num_rows]))
    )


def check_rows(tile: Tile, squares: Float[Array, " B"]) -> None:
    """Checks that the sums of squares of a tile's rows are finite.

    Raises:
        ValueError: one is not; the first such row is named.
        TooLargeError: a sum is, as no row of a source in its unit has.
    """
    found = np.asarray(squares[: tile.num_rows])
    if (found < MOST).all():
        return
    large = np.flatnonzero(~(found < MOST))
    rows = np.asarray(tile.Z[large], np.float32)
    _check_finite(np.where(np.isfinite(rows).all(axis=1), 0, np.nan), tile.start + large)
    raise TooLargeError(
        f"squares of row {tile.start + large[0]} of Z exceed float32; divide Z by its largest value"
    )


def _check_finite(of_rows: Float[np.ndarray, " B"], numbers: Int[np.ndarray, " B"]) -> None:
    """Raises ValueError if a value of these rows is not finite; names the first such row."""
    bad = np.flatnonzero(~np.isfinite(of_rows))
    if bad.size:
        raise ValueError(
            f"Z has NaN or Inf in row {numbers[bad[0]]}, or values beyond float32; drop these rows "
            "or fix their source"
        )


def origin(source: Source) -> Float[np.ndarray, " D"]:
    """Returns the mean of some rows from all over the source, the origin for all others."""
    N = source.shape[0]
    numbers = np.unique(np.linspace(0, N - 1, min(NEAR, N)).astype(np.int64))
    rows = np.asarray(source.take(numbers)).astype(np.float64)
    # The first pass reports rows that are not finite.
    mean = rows[np.isfinite(rows).all(axis=1)].mean(axis=0) if len(rows) else 0
    return np.where(np.isfinite(mean), mean, 0).astype(np.float32)


def give_back() -> None:
    """Returns memory that readers and compilers freed to the system; glibc would keep it."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def values_of(totals: Any) -> Any:
    """Returns each total of `add_up` as one array."""
    return jax.tree.map(lambda total: total.value, totals, is_leaf=_is_wide)


def _is_wide(leaf: Any) -> bool:
    return isinstance(leaf, Wide)


@jax.jit
def _begun(sums: Any) -> Any:
    return jax.tree.map(
        lambda new: new if _is_wide(new) else Wide(new, jnp.zeros_like(new)), sums, is_leaf=_is_wide
    )


@jax.jit
def _sum(totals: Any, sums: Any) -> Any:
    return jax.tree.map(lambda total, new: total + new, totals, sums, is_leaf=_is_wide)


class Largest:
    """Tracks the numbers of the rows of largest score over tiles."""

    def __init__(self, count: int):
        self.count = count
        self.numbers, self.scores = np.zeros(0, np.int64), np.zeros(0, np.float32)

    def add(self, start: int, scores: Float[np.ndarray, " B"]) -> None:
        """Adds the scores of one tile."""
        numbers = start + np.arange(len(scores))
        if len(self.scores) == self.count > 0:
            # Few rows of a tile are larger than all that were kept; sorting the tile takes longer.
            larger = np.flatnonzero(scores > self.scores[-1])
            scores, numbers = scores[larger], numbers[larger]
        scores = np.concatenate([self.scores, scores])
        numbers = np.concatenate([self.numbers, numbers])
        kept = np.argsort(-scores, kind="stable")[: self.count]
        self.numbers, self.scores = numbers[kept], scores[kept]
