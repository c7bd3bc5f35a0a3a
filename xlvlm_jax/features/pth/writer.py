"""Writes files for torch.load, also with weights_only: the zip format of torch.save.

Neither the pickle nor the numbers need fit into memory: lists may be iterators, and tensors may be
views of a storage that is read block by block.
"""

import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from xlvlm_jax.features.pth.torch_globals import STORAGES
from xlvlm_jax.storage import atomic

_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}
_ALIGNMENT = 64  # of storages in the file, as in torch, so that they can be memory-mapped
_ZIP64_BYTES = 20  # that zipfile adds to the header of a large part
_HELD = 2**20  # bytes of the pickle written at once
_BATCH = 1000  # items of a list that a reader appends at once, as in pickle


class Numbers(NamedTuple):
    """A storage that several tensors are views of.

    Attributes:
        dtype: numpy dtype.
        size: number of elements.
        blocks: returns arrays with the elements of the storage, in order.
    """

    dtype: np.dtype
    size: int
    blocks: Callable[[], Iterable[np.ndarray]]

    @classmethod
    def of(cls, array: np.ndarray) -> "Numbers":
        """Returns the storage of an array."""
        return cls(array.dtype, array.size, lambda: [array])


class View(NamedTuple):
    """A tensor: consecutive elements of a storage, in row-major order."""

    numbers: Numbers
    offset: int
    shape: tuple[int, ...]


def write_pth(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value like torch.save; numpy arrays and views become tensors.

    Args:
        path: the file; written as `storage.atomic.writing` does.
        value: dict, list, tuple, str, int, float, bool or None; an iterator, which becomes a list;
            numpy arrays, and `View`s, of the dtypes that torch has a storage class for (bfloat16
            from ml_dtypes).

    Raises:
        ValueError: the value is anything else; its type or dtype is named.
        OSError: the file can't be written; it is named.
    """
    with atomic.writing(Path(path)) as whole, zipfile.ZipFile(whole, "w") as archive:
        with archive.open(_part(archive, "data.pkl"), "w", force_zip64=True) as file:
            storages = _Pickle(file).write(value)
        _store(archive, "byteorder", [b"little"], 6)
        for number, numbers in enumerate(storages):
            size = numbers.size * numbers.dtype.itemsize
            _store(archive, f"data/{number}", map(_little, numbers.blocks()), size)
        _store(archive, "version", [b"3\n"], 2)


def _part(archive: zipfile.ZipFile, name: str, size: int = 0) -> zipfile.ZipInfo:
    # A constant date, so that the same value gives the same bytes.
    info = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
    info.file_size = size
    assert archive.fp is not None, "the archive is open"
    begins = archive.fp.tell() + 30 + len(info.filename) + 4
    if 1.05 * size > zipfile.ZIP64_LIMIT:  # zipfile's own rule
        begins += _ZIP64_BYTES
    # An extra field like torch's, as long as needed.
    missing = -begins % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", missing) + bytes(missing)
    return info


def _store(
    archive: zipfile.ZipFile, name: str, content: Iterable[bytes | memoryview], size: int
) -> None:
    with archive.open(_part(archive, name, size), "w") as file:
        for block in content:
            file.write(block)


def _little(array: np.ndarray) -> memoryview:
    array = np.ascontiguousarray(array)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.reshape(-1).view(np.uint8).data


@runtime_checkable
class _Writable(Protocol):
    """What takes bytes: a file, or an entry of a zip file."""

    def write(self, data: bytearray, /) -> int: ...


class _Pickle:
    """Writes the opcodes that build a value (see the standard library's pickletools)."""

    def __init__(self, file: _Writable):
        self._file, self._out = file, bytearray()
        self._memo: dict[Any, bytes] = {}  # what a reader remembers -> opcodes to recall it
        self._tails: dict[tuple[int, ...], bytes] = {}  # shape -> the end of a tensor
        self._storages: dict[int, Numbers] = {}  # by id; kept alive, so that ids stay unique

    def write(self, value: Any) -> list[Numbers]:
        """Writes a value and returns its storages in the order of their keys."""
        self._out += b"\x80\x02"  # protocol 2, like torch.save
        self._emit(value)
        self._out += b"."
        self._file.write(self._out)
        return list(self._storages.values())

    def _emit(self, value: Any) -> None:
        out = self._out
        if len(out) > _HELD:
            self._file.write(out)
            out.clear()
        if value is None or isinstance(value, bool):
            out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int):
            out += _integer(value)
        elif isinstance(value, float):
            out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            out += _text(value)
        elif isinstance(value, View):
            self._emit_view(value)
        elif isinstance(value, list | Iterator):
            self._emit_list(value)
        elif isinstance(value, tuple):
            out += b"("
            for item in value:
                self._emit(item)
            out += b"t"
        elif isinstance(value, dict):
            out += b"}("
            for key, item in value.items():
                if isinstance(key, str):
                    self._recall(("text", key), lambda key=key: _text(key))
                else:
                    self._emit(key)
                self._emit(item)
            out += b"u"
        elif isinstance(value, np.ndarray):
            self._emit_view(View(Numbers.of(value), 0, value.shape))
        elif isinstance(value, np.generic):
            self._emit(value.item())
        else:
            raise ValueError(
                f"a {type(value).__name__} can't be written to a .pth file; use plain values, "
                "lists, dictionaries and arrays"
            )

    def _emit_list(self, items: Iterable[Any]) -> None:
        self._out += b"]"
        count = 0
        for count, item in enumerate(items, 1):
            if count % _BATCH == 1:
                self._out += b"(" if count == 1 else b"e("
            self._emit(item)
        self._out += b"e" if count else b""

    def _recall(self, key: Any, build: Callable[[], bytes]) -> None:
        """Builds a value that a reader memoises, or recalls it."""
        if key in self._memo:
            self._out += self._memo[key]
            return
        number = len(self._memo)
        self._out += build() + b"r" + struct.pack("<I", number)
        self._memo[key] = (
            b"h" + bytes([number]) if number < 256 else b"j" + struct.pack("<I", number)
        )

    def _emit_view(self, view: View) -> None:
        """Appends torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, ...)."""
        numbers, offset, shape = view
        self._recall("tensor", lambda: b"ctorch._utils\n_rebuild_tensor_v2\n")
        self._out += b"("
        self._recall(id(numbers), lambda: self._storage(numbers))
        self._out += _integer(offset)
        if shape not in self._tails:
            strides = [1]
            for length in shape[:0:-1]:
                strides.append(strides[-1] * max(length, 1))
            steps = tuple(strides[::-1][: len(shape)] if shape else ())
            hooks = b"ccollections\nOrderedDict\n)R"
            self._tails[shape] = _integers(shape) + _integers(steps) + b"\x89" + hooks + b"tR"
        self._out += self._tails[shape]

    def _storage(self, numbers: Numbers) -> bytes:
        """Refers to a storage outside the pickle, by ("storage", class, key, device, n)."""
        dtype = numbers.dtype
        dtype = dtype.newbyteorder("=") if dtype.byteorder == ">" else dtype
        if dtype not in _STORAGE_OF:
            raise ValueError(
                f"torch has no storage class for dtype {numbers.dtype}; expected one of "
                f"{', '.join(str(known) for known in _STORAGE_OF)}"
            )
        key = str(len(self._storages))
        self._storages[id(numbers)] = numbers
        kind = f"ctorch\n{_STORAGE_OF[dtype]}\n".encode()
        described = _text("storage") + kind + _text(key) + _text("cpu") + _integer(numbers.size)
        return b"(" + described + b"tQ"


def _text(value: str) -> bytes:
    content = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(content)) + content


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(content) > 255:
        raise ValueError("an integer of more than 255 bytes can't be written to a .pth file")
    return b"\x8a" + bytes([len(content)]) + content


def _integers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
