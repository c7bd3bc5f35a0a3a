"""Rows in shuffled order, epoch after epoch, as batches of equal size, from memory or from disk.

Every row comes once per epoch. The order is a function of the seed and the epoch, so a run can go
on at any batch. Rows on disk are read in blocks of neighbouring rows: a window of blocks from all
over the source is read at once and shuffled, while the window before it is used. Memory holds two
windows. N rows, D width, B rows per batch.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

from xlvlm_jax.solvers.sae.sharding import sharding_of
from xlvlm_jax.solvers.validation import StoredMatrix, check_block, read_block

BLOCK_BYTES, WINDOW_BYTES = 2**20, 2**27
T = TypeVar("T")


def batches(
    Z: Shaped[Array | np.ndarray, "N D"] | StoredMatrix,
    size: int,
    seed: tuple[int, ...],
    first: int = 0,
    mesh: Mesh | None = None,
) -> Iterator[Shaped[Array, "B D"]]:
    """Yields batches without end, the next one being prepared meanwhile.

    Args:
        Z: [N, D], or an object that reads its rows. A source is read by every host; of an array on
            several hosts, only what a device needs is sent to it.
        size: B.
        seed: of the order.
        first: number of the batch to begin with.
        mesh: devices that hold the rows of a batch along "data"; None for one device.

    Raises:
        ValueError: a source has rows that are not finite, or other rows than its shape promises.
    """
    N, D = Z.shape
    where = sharding_of((size, D), mesh, "data")
    if isinstance(Z, jax.Array) and not _is_on_host(Z):
        take: Any = jax.jit(_take, out_shardings=where)
        for numbers in _cut(_numbers(N, seed, first * size), size):
            yield take(Z, numbers)
        return
    if isinstance(Z, jax.Array | np.ndarray):
        rows = np.asarray(Z)
        found = (rows[numbers] for numbers in _cut(_numbers(N, seed, first * size), size))
    else:
        found = _cut(ahead(windows(Z, seed, first * size)), size)
    yield from ahead(_placed(values, where) for values in found)


def sample(
    Z: Shaped[Array | np.ndarray, "N D"] | StoredMatrix, count: int, seed: tuple[int, ...]
) -> Shaped[np.ndarray, "S D"]:
    """Returns the first rows, at most `count`, of the shuffled order."""
    N = Z.shape[0]
    if isinstance(Z, jax.Array | np.ndarray):
        return take_rows(Z, next(_numbers(N, seed, 0))[:count])
    parts, held = [], 0
    for part in windows(Z, seed, 0):
        parts.append(part[: count - held])
        held += len(parts[-1])
        if held >= min(count, N):
            break
    return np.concatenate(parts)


def take_rows(
    Z: Shaped[Array | np.ndarray, "N D"] | StoredMatrix, numbers: Int[np.ndarray, " R"]
) -> Shaped[np.ndarray, "R D"]:
    """Returns rows by number on every host; those of a source must be neighbours, in order."""
    if not isinstance(Z, jax.Array | np.ndarray):
        return read_block(Z, int(numbers[0]), int(numbers[-1]) + 1)
    if isinstance(Z, np.ndarray) or Z.is_fully_addressable:
        return np.asarray(Z[numbers])
    # Of an array on several hosts, one program gives each of them the rows.
    sharding: Any = Z.sharding
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    return np.asarray(jax.jit(_take, out_shardings=whole)(Z, numbers))


def windows(
    source: StoredMatrix,
    seed: tuple[int, ...],
    first: int,
    block: int | None = None,
    window: int | None = None,
) -> Iterator[Shaped[np.ndarray, "W D"]]:
    """Yields shuffled windows of a source without end, from row `first` of the order on.

    Args:
        source: reads rows[N, D].
        seed: of the order.
        first: number of rows that are skipped.
        block: rows that are read together; None for about 1 MB.
        window: rows that are shuffled together; None for about 128 MB.

    Raises:
        ValueError: rows are not finite, or not those that the source's shape promises.
    """
    N, D = source.shape
    # What a number takes on disk is not known; most states are stored in two or four bytes.
    block = block or max(BLOCK_BYTES // (4 * D), 1)
    count = max((window or WINDOW_BYTES // (4 * D)) // block, 1)
    for epoch, skipped in _epochs(N, first):
        blocks = np.random.default_rng([*seed, epoch]).permutation(-(-N // block))
        for w, some in enumerate(np.split(blocks, range(count, len(blocks), count))):
            ends = [(int(b) * block, min((int(b) + 1) * block, N)) for b in some]
            rows = sum(stop - start for start, stop in ends)
            if skipped >= rows:
                skipped -= rows
                continue
            order = np.random.default_rng([*seed, epoch, w]).permutation(rows)
            yield _shuffled((_read(source, start, stop) for start, stop in ends), order)[skipped:]
            skipped = 0


def ahead(values: Iterator[T]) -> Iterator[T]:
    """Yields the values of an iterator, the next one being made in a thread."""
    with ThreadPoolExecutor(1) as thread:
        end: Any = object()
        following = thread.submit(next, values, end)
        while (found := following.result()) is not end:
            following = thread.submit(next, values, end)
            yield found


def _shuffled(
    blocks: Iterator[Shaped[np.ndarray, "B D"]], order: Int[np.ndarray, " W"]
) -> Shaped[np.ndarray, "W D"]:
    """Returns rows that arrive in blocks in another order; each is copied once."""
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    found, done = None, 0
    for block in blocks:
        if found is None:
            found = np.empty((len(order), block.shape[1]), block.dtype)
        found[place[done : done + len(block)]] = block
        done += len(block)
    assert found is not None, "a window has a block"
    return found


def _epochs(N: int, first: int) -> Iterator[tuple[int, int]]:
    """Yields (epoch, rows of it that are skipped) from the one that row `first` is in."""
    epoch, skipped = divmod(first, N)
    while True:
        yield epoch, skipped
        epoch, skipped = epoch + 1, 0


def _numbers(N: int, seed: tuple[int, ...], first: int) -> Iterator[Int[np.ndarray, " N"]]:
    for epoch, skipped in _epochs(N, first):
        yield np.random.default_rng([*seed, epoch]).permutation(N)[skipped:]


def _cut(parts: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yields pieces of equal size of what the parts are, one after the other."""
    held: list[np.ndarray] = []
    missing = size
    for part in parts:
        while len(part) >= missing:
            yield np.concatenate([*held, part[:missing]]) if held else part[:missing]
            part, held, missing = part[missing:], [], size
        if len(part):
            held.append(part)
            missing -= len(part)


def _read(source: StoredMatrix, start: int, stop: int) -> Shaped[np.ndarray, "B D"]:
    rows = check_block(source.read(start, stop), (stop - start, source.shape[1]), start)
    bad = ~np.isfinite(rows.astype(np.float32, copy=False)).all(axis=1)
    if bad.any():
        raise ValueError(
            f"Z has NaN or Inf in row {start + int(bad.argmax())}, or values beyond float32; drop "
            "these rows or fix their source"
        )
    return rows


def _placed(values: Shaped[np.ndarray, "B D"], where: NamedSharding | None) -> Array:
    if where is None:
        return jax.device_put(values)
    return jax.make_array_from_callback(values.shape, where, lambda index: values[index])


def _is_on_host(Z: Array) -> bool:
    return len(Z.devices()) == 1 and next(iter(Z.devices())).platform == "cpu"


def _take(Z: Array, numbers: Array) -> Array:
    return jnp.take(Z, numbers, axis=0)
