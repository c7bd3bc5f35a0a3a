"""Writes files for torch.load, also with weights_only: the zip format of torch.save."""

import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from xlvlm_jax.features.pth.torch_globals import STORAGES

_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}
_ALIGNMENT = 64  # of storages in the file, as in torch, so that they can be memory-mapped


def write_pth(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value like torch.save; numpy arrays become tensors.

    Args:
        path: written under a temporary name and renamed.
        value: dict, list, tuple, str, int, float, bool or None; numpy arrays of the dtypes that
            torch has a storage class for (bfloat16 from ml_dtypes).

    Raises:
        ValueError: the value is anything else; its type or dtype is named.
    """
    path = Path(path)
    pickle = bytearray(b"\x80\x02")  # protocol 2, like torch.save
    storages: list[np.ndarray] = []
    _emit(value, pickle, storages)
    pickle += b"."
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            _store(archive, "data.pkl", bytes(pickle))
            _store(archive, "byteorder", b"little")
            for number, array in enumerate(storages):
                _store(archive, f"data/{number}", _little(array))
            _store(archive, "version", b"3\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _store(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    # A constant date, so that the same value gives the same bytes.
    info = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
    assert archive.fp is not None, "the archive is open"
    begins = archive.fp.tell() + 30 + len(info.filename) + 4
    # An extra field like torch's, as long as needed.
    missing = -begins % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", missing) + bytes(missing)
    archive.writestr(info, content)


def _little(array: np.ndarray) -> memoryview:
    array = np.ascontiguousarray(array)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.reshape(-1).view(np.uint8).data


def _emit(value: Any, out: bytearray, storages: list[np.ndarray]) -> None:
    """Appends the opcodes that build a value (see the standard library's pickletools)."""
    if value is None or isinstance(value, bool):
        out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
    elif isinstance(value, int):
        content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        if len(content) > 255:
            raise ValueError("an integer of more than 255 bytes can't be written to a .pth file")
        out += b"\x8a" + bytes([len(content)]) + content
    elif isinstance(value, float):
        out += b"G" + struct.pack(">d", value)
    elif isinstance(value, str):
        content = value.encode("utf-8", "surrogatepass")
        out += b"X" + struct.pack("<I", len(content)) + content
    elif isinstance(value, list):
        out += b"]("
        for item in value:
            _emit(item, out, storages)
        out += b"e"
    elif isinstance(value, tuple):
        out += b"("
        for item in value:
            _emit(item, out, storages)
        out += b"t"
    elif isinstance(value, dict):
        out += b"}("
        for key, item in value.items():
            _emit(key, out, storages)
            _emit(item, out, storages)
        out += b"u"
    elif isinstance(value, np.ndarray):
        _emit_tensor(value, out, storages)
    elif isinstance(value, np.generic):
        _emit(value.item(), out, storages)
    else:
        raise ValueError(
            f"a {type(value).__name__} can't be written to a .pth file; use plain values, lists, "
            "dictionaries and arrays"
        )


def _emit_tensor(array: np.ndarray, out: bytearray, storages: list[np.ndarray]) -> None:
    """Appends torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())."""
    dtype = array.dtype.newbyteorder("=") if array.dtype.byteorder == ">" else array.dtype
    if dtype not in _STORAGE_OF:
        raise ValueError(
            f"torch has no storage class for dtype {array.dtype}; expected one of "
            f"{', '.join(str(known) for known in _STORAGE_OF)}"
        )
    strides = [1]
    for length in array.shape[:0:-1]:
        strides.append(strides[-1] * max(length, 1))
    key = str(len(storages))
    storages.append(array)
    out += b"ctorch._utils\n_rebuild_tensor_v2\n("
    # The storage is outside; its persistent identifier is ("storage", class, key, device, n).
    out += b"("
    _emit("storage", out, storages)
    out += f"ctorch\n{_STORAGE_OF[dtype]}\n".encode()
    for part in (key, "cpu", array.size):
        _emit(part, out, storages)
    out += b"tQ"
    for part in (0, array.shape, tuple(strides[::-1][: array.ndim] if array.ndim else ()), False):
        _emit(part, out, storages)
    out += b"ccollections\nOrderedDict\n)RtR"
