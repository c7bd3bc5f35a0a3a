"""Reads and writes safetensors files one tensor at a time.

The safetensors library maps the whole file into memory, and pages that were read count towards the
process's memory until the file is closed. Here each tensor is read into its own buffer, so the peak
memory of loading a checkpoint is the size of the parameters plus one tensor.
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
    """Location of a tensor in a file; `read` reads it."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, rows: tuple[int, int] | None = None) -> np.ndarray:
        """Reads the tensor in its stored dtype.

        Args:
            rows: (first, last + 1) along the first axis; None for all.

        Returns:
            The tensor, or only these rows.

        Raises:
            ValueError: the file is too short.
        """
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
    """Lists the tensors of one safetensors file, reading only its header.

    Args:
        path: the file.

    Returns:
        Name -> location of the tensor.

    Raises:
        ValueError: the file is truncated or not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            raise ValueError(
                f"{path}: {size} bytes, shorter than its own header; download the file again"
            )
        text = file.read(start - 8)
    strange = f"{path}: not a valid safetensors header; download the file again"
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = [(name, *_entry(entry)) for name, entry in header.items()]
        if not all(name.isprintable() for name in header):
            raise ValueError  # not a module's name, and it would break one-line messages
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
                f"{path}: truncated, tensor {name!r} ends at byte {start + end} but the file has "
                f"{size} bytes; download the file again"
            )
        tensors[name] = StoredTensor(path, start + begin, shape, _DTYPES[dtype])
    return tensors


def _entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Returns dtype, shape, begin and end of a header entry; raises TypeError if it is invalid."""
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    natural = all(type(n) is int and 0 <= n < 1 << 48 for n in (*shape, begin, end))
    if not natural or not isinstance(dtype, str):
        raise TypeError
    return dtype, shape, begin, end


def open_directory(directory: Path) -> dict[str, StoredTensor]:
    """Lists the tensors of a checkpoint: of its single file or, if there is none, of its index.

    Args:
        directory: the checkpoint.

    Returns:
        Name -> location of the tensor.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the index is damaged, or as for `open_file`.
    """
    files = _files(directory)
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise FileNotFoundError(
            f"{directory} has no {few(missing)}; expected {_SINGLE}, or {_INDEX} and every file "
            "listed in it (PyTorch .bin files are not supported: convert them to safetensors)"
        )
    return {name: tensor for file in files for name, tensor in open_file(file).items()}


def open_available(directory: Path) -> dict[str, StoredTensor]:
    """Lists tensors like `open_directory`, but skips missing and damaged files."""
    tensors: dict[str, StoredTensor] = {}
    with contextlib.suppress(ValueError):
        for file in filter(Path.exists, _files(directory)):
            tensors |= open_file(file)
    return tensors


def available_files(directory: Path) -> list[Path]:
    """Returns the files of a checkpoint that exist; all safetensors if its index is damaged."""
    try:
        return list(filter(Path.exists, _files(directory)))
    except ValueError:
        return list(directory.glob("*.safetensors"))


def equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Returns whether two stored tensors with at least one axis are equal; reads them in parts."""
    if a.shape != b.shape:
        return False
    rows = max(1, _COMPARED_AT_ONCE // max(1, math.prod(a.shape[1:])))
    spans = [(row, min(row + rows, a.shape[0])) for row in range(0, a.shape[0], rows)]
    return all(np.array_equal(a.read(span), b.read(span)) for span in spans)


def _files(directory: Path) -> list[Path]:
    index, single = directory / _INDEX, directory / _SINGLE
    if single.exists() or not index.exists():  # as transformers, which prefers the single file
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index}: expected a JSON object with a 'weight_map'") from None
    unsafe = [n for n in names if not re.fullmatch(r"[\w.-]+\.safetensors", str(n))]
    if unsafe:
        raise ValueError(
            f"{index}: got {unsafe[0]!r}; expected the name of a safetensors file next to it"
        )
    return [directory / name for name in names]


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file atomically: under a temporary name, then renamed.

    Args:
        path: the file.
        tensors: name -> array.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # The writer copies the buffers as they are, and the format needs C order. It also makes
        # files readable only by their owner; use the mode of any new file instead.
        temporary.touch()
        mode = temporary.stat().st_mode
        contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
        save_file(contiguous, temporary, metadata={"format": "pt"})
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
