"""Reads and writes safetensors files one tensor at a time.

The safetensors library maps a whole file into memory, where pages once read count as the
process's own until the file is closed; here a tensor is read into its own buffer, so that loading
a checkpoint peaks at the parameters' size and one tensor more.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from ports.messages import few

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_COMPARED_AT_ONCE = 1 << 22  # numbers
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `read` gets it."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, rows: tuple[int, int] | None = None) -> np.ndarray:
        """The tensor in its stored dtype, or of its first axis the rows from one to another."""
        shape, offset = self.shape, self.offset
        if rows is not None:
            first, last = rows
            offset += first * math.prod(shape[1:]) * self.dtype.itemsize
            shape = (last - first, *shape[1:])
        count = math.prod(shape)
        values = np.fromfile(self.file, self.dtype, count, offset=offset)
        if values.size != count:
            raise ValueError(f"{self.file}: ends early; download the file again")
        return values.reshape(shape)


def open_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by name, none of them read yet.

    Raises ValueError, naming the file, if it is truncated or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            raise ValueError(
                f"{path}: {size} bytes, shorter than its own header; download the file again"
            )
        text = file.read(start - 8)
    strange = f"{path}: its header is not one of a safetensors file; download the file again"
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = [(name, *_entry(entry)) for name, entry in header.items()]
        if not all(name.isprintable() for name in header):
            raise ValueError  # no module is called so, and messages that name it stay in one line
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(strange) from None
    tensors = {}
    for name, dtype, shape, begin, end in entries:
        if dtype not in _DTYPES:
            raise ValueError(
                f"{path}: tensor {name!r} has dtype {dtype!r}; expected one of {', '.join(_DTYPES)}"
            )
        if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
            raise ValueError(strange)
        if start + end > size:
            raise ValueError(
                f"{path}: truncated, tensor {name!r} ends at byte {start + end} of a file of "
                f"{size} bytes; download the file again"
            )
        tensors[name] = StoredTensor(path, start + begin, shape, _DTYPES[dtype])
    return tensors


def _entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """An entry of a header -> dtype, shape, begin and end; TypeError if it is something else."""
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    natural = all(type(n) is int and 0 <= n < 1 << 48 for n in (*shape, begin, end))
    if not natural or not isinstance(dtype, str):
        raise TypeError
    return dtype, shape, begin, end


def open_directory(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint directory: one file, or those that its index names.

    Raises FileNotFoundError for missing files and ValueError as `open_file` does.
    """
    files = _files(directory)
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {few(missing)}; expected {_SINGLE}, or {_INDEX} and every "
            "file that it names (PyTorch .bin files are not read: convert them to safetensors)"
        )
    return {name: tensor for file in files for name, tensor in open_file(file).items()}


def open_available(directory: Path) -> dict[str, StoredTensor]:
    """As `open_directory`, but files that are missing or damaged are left out."""
    tensors: dict[str, StoredTensor] = {}
    with contextlib.suppress(ValueError):
        for file in filter(Path.exists, _files(directory)):
            tensors |= open_file(file)
    return tensors


def equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two stored tensors, of one axis at least, hold the same numbers; read in parts."""
    if a.shape != b.shape:
        return False
    rows = max(1, _COMPARED_AT_ONCE // max(1, math.prod(a.shape[1:])))
    spans = [(row, min(row + rows, a.shape[0])) for row in range(0, a.shape[0], rows)]
    return all(np.array_equal(a.read(span), b.read(span)) for span in spans)


def _files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if not index.exists():
        return [directory / _SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index}: expected a JSON object with a 'weight_map'") from None
    unsafe = [n for n in names if not re.fullmatch(r"[\w.-]+\.safetensors", str(n))]
    if unsafe:
        raise ValueError(f"{index}: {unsafe[0]!r} is no name of a safetensors file beside it")
    return [directory / name for name in names]


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one safetensors file under a temporary name, then renames it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # The format stores bytes in C order and the writer takes them from the buffer as they lie.
        # The writer makes a file for its owner alone; ours has the mode of any new file.
        temporary.touch()
        mode = temporary.stat().st_mode
        contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
        save_file(contiguous, temporary, metadata={"format": "pt"})
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
