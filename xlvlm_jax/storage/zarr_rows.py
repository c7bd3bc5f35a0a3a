"""Arrays on disk that grow row by row: Zarr v3 through TensorStore, [rows, ...].

They are not compressed (hidden states hardly shrink), so a missing or truncated chunk shows in the
size of its file, and the chunk size depends only on the width, so the bytes are the same whatever
the batches. Arrays name their dimensions, "row" and "width_<D>", and are in Zarr groups, which
xarray opens (`xarray.open_zarr(path, consolidated=False)`).
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Int, Shaped

from xlvlm_jax.storage import atomic

_CHUNK_BYTES = 2**20
_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}]


def _spec(path: Path) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path.absolute()}/"},
        # also write chunks of zeros, so that a missing chunk means it was lost
        "store_data_equal_to_fill_value": True,
    }


def create_array(path: Path, dtype: str, shape: tuple[int, ...]) -> ts.TensorStore:
    """Creates a Zarr v3 array in chunks of whole rows.

    Args:
        path: directory of the array.
        dtype: data type.
        shape: (rows, ...). A chunk has `_CHUNK_BYTES`, or one row if a row is larger.
    """
    row_bytes = ts.dtype(dtype).numpy_dtype.itemsize * math.prod(shape[1:])
    chunk = [max(_CHUNK_BYTES // row_bytes, 1), *shape[1:]]
    metadata = {
        "data_type": dtype,
        "shape": shape,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "codecs": _CODECS,
        # xarray requires one size per dimension name in a group, and sites may differ in width.
        "dimension_names": ["row", *(f"width_{size}" for size in shape[1:])],
    }
    return wait(ts.open(_spec(path) | {"metadata": metadata}, create=True))


def create_group(path: Path) -> None:
    """Makes a directory the Zarr v3 group of the arrays and groups below it."""
    path.mkdir(parents=True, exist_ok=True)
    atomic.write(path / "zarr.json", json.dumps({"zarr_format": 3, "node_type": "group"}) + "\n")


def open_array(path: Path) -> ts.TensorStore:
    """Opens an existing array.

    Raises:
        ValueError: there is none that can be read.
    """
    try:
        # JSON nested too deeply would end the process in TensorStore, but raises here.
        json.loads((path / "zarr.json").read_bytes())
        return ts.open(_spec(path), open=True).result()
    except Exception as error:
        raise ValueError(f"{path}: not a readable Zarr v3 array ({reason(error)})") from None


def _chunk(array: ts.TensorStore) -> tuple[int, ...]:
    """Returns the shape of an array's chunks."""
    return array.chunk_layout.write_chunk_template.shape


def check_chunks(path: Path, array: ts.TensorStore, rows: int) -> None:
    """Checks that chunks are whole rows, exist and have the right size.

    Raises:
        ValueError: one is not; the first such chunk is named.
    """
    if array.shape[0] < rows:
        raise ValueError(
            f"{path}: {array.shape[0]} rows, expected {rows}; extract the features again"
        )
    chunk = _chunk(array)
    if array.shape[1:] != chunk[1:]:
        # A width that the files do not match would be read as fill values, in memory of that size.
        raise ValueError(
            f"{path}: shape {list(array.shape)} in chunks of {list(chunk)}, expected chunks of "
            "whole rows; extract the features again"
        )
    size = math.prod(chunk) * array.dtype.numpy_dtype.itemsize
    for i in range(-(-rows // chunk[0])):
        file = path.joinpath("c", str(i), *["0"] * (len(chunk) - 1))
        try:
            got = file.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            got = None
        if got != size:
            state = "missing" if got is None else f"{got} bytes, expected {size}"
            raise ValueError(f"{file}: chunk is {state}; extract the features again")


class StoredRows:
    """Rows of an array on disk, read a tile at a time; the input of the streamed solvers.

    numpy reads all of them if it needs an array.

    Attributes:
        path: path of the array.
        shape: (N, D).
        dtype: numpy dtype.
    """

    def __init__(self, path: Path, rows: int):
        self.path = path = path.absolute()  # files are opened later
        self._array = open_array(path)
        check_chunks(path, self._array, rows)
        self.shape = (rows, self._array.shape[1])
        self.dtype = self._array.dtype.numpy_dtype
        codecs = self._array.spec().to_json()["metadata"]["codecs"]
        # True for arrays of `create_array`: the bytes of a file are those of its rows.
        self._is_plain = codecs == _CODECS and sys.byteorder == "little"

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(
                f"{self.path}: rows on disk can't become an array without a copy; allow the copy"
            )
        return self.read(0, len(self)).astype(dtype or self.dtype, copy=False)

    def tiles(self, count: int) -> Iterator[tuple[int, Shaped[np.ndarray, "B D"]]]:
        """Yields (first row, rows) in order, `count` rows each except the last; reads one ahead."""
        following = None
        for start in range(0, self.shape[0], count):
            reading = following or self._read(start, count)
            following = None
            if start + count < self.shape[0]:
                following = self._read(start + count, count)
            yield start, reading.result()

    def read(self, start: int, stop: int) -> Shaped[np.ndarray, "B D"]:
        """Returns the rows from `start` up to `stop`."""
        return self._array[start:stop].read().result()

    def take(self, numbers: Int[np.ndarray, " R"]) -> Shaped[np.ndarray, "R D"]:
        """Returns rows by number, in any order, without reading the rest of their chunks.

        Raises:
            IndexError: there is no row with this number.
        """
        numbers = np.asarray(numbers, np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"rows {numbers.min()} to {numbers.max()} of {len(self)}")
        if len(numbers) and np.all(np.diff(numbers) == 1):
            return self.read(int(numbers[0]), int(numbers[-1]) + 1)
        if not self._is_plain:
            return self._array[numbers].read().result()
        found = np.empty((len(numbers), self.shape[1]), self.dtype)
        raw = found.view(np.uint8)
        size, order = _chunk(self._array)[0], np.argsort(numbers, kind="stable")
        chunks = numbers[order] // size
        for some in np.split(order, np.flatnonzero(np.diff(chunks)) + 1):
            if not len(some):
                continue
            name = self.path / "c" / str(numbers[some[0]] // size) / "0"
            with open(name, "rb", buffering=0) as file:
                for i, row in zip(some.tolist(), (numbers[some] % size).tolist(), strict=True):
                    file.seek(row * raw.shape[1])
                    if file.readinto(raw[i].data) != raw.shape[1]:
                        raise OSError(f"{name}: truncated; extract the features again")
        return found

    def _read(self, start: int, count: int) -> ts.Future:
        return self._array[start : min(start + count, self.shape[0])].read()


def cut(array: ts.TensorStore, rows: int) -> None:
    """Keeps the first `rows` rows, and fills the rest of their last chunk with zeros."""
    chunk = _chunk(array)[0]
    whole = -(-rows // chunk) * chunk
    array = wait(array.resize(exclusive_max=[whole, *array.shape[1:]]))
    if whole > rows:
        wait(array[rows:whole].write(np.zeros((), array.dtype.numpy_dtype)))
    wait(array.resize(exclusive_max=[rows, *array.shape[1:]]))


def wait(future: ts.Future | ts.WriteFutures) -> Any:
    """Returns the result of a write.

    Raises:
        OSError: the write failed, which TensorStore reports as many types.
    """
    try:
        return future.result()
    except Exception as error:
        raise OSError(reason(error)) from error


def reason(error: Exception) -> str:
    """Returns an error's first line, or the operating system's message."""
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0] if text else type(error).__name__
