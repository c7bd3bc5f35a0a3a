"""Arrays as a safetensors file."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import ArrayLike

from xlvlm_jax.storage import atomic

_KINDS = {"int64": "I64", "int32": "I32", "float32": "F32", "bool": "BOOL"}


def as_bytes(tensors: Mapping[str, ArrayLike], metadata: Mapping[str, str] | None = None) -> bytes:
    """Returns the content of a safetensors file.

    Args:
        tensors: name -> array, of any layout in memory; its dtype is kept.
        metadata: the file's metadata; None for none.
    """
    # safetensors 0.8 writes the bytes as they lie in memory, whatever the strides.
    contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    return safetensors.numpy.save(contiguous, None if metadata is None else dict(metadata))


def write(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file atomically, array by array: no second copy of all is in memory.

    Args:
        path: the file.
        tensors: name -> bool, int32, int64 or float32 array, of any layout in memory.
        metadata: the file's metadata; None for none.
    """
    # By falling size of an element, so that each tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    entries = [(name, array.dtype.name, array.shape) for name, array in ordered]
    with atomic.writing(path) as file:
        file.write(_header(entries, metadata))
        for _, array in ordered:
            little = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
            file.write(little.reshape(-1).view(np.uint8).data)


def write_with_rows(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    name: str,
    shape: tuple[int, int],
    blocks: Iterable[np.ndarray],
) -> None:
    """Writes a safetensors file atomically, one of whose tensors is never in memory as a whole.

    Args:
        path: the file.
        tensors: name -> int64, int32 or float32 array.
        name: the name of the tensor of rows.
        shape: its shape, (N, D).
        blocks: its rows, float32, in order.
    """
    # By falling size of an element, so that each tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    entries = [(key, array.dtype.name, array.shape) for key, array in ordered]
    with atomic.writing(path) as file:
        file.write(_header([*entries, (name, "float32", shape)]))
        for _, array in ordered:
            file.write(array.astype(array.dtype.newbyteorder("<")).tobytes())
        for block in blocks:
            file.write(block.astype("<f4").tobytes())


def _header(
    entries: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Returns what a file of tensors (name, dtype, shape) begins with, in their order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape in entries:
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        kind = {"dtype": _KINDS[dtype], "shape": list(shape)}
        header[name] = kind | {"data_offsets": [start, end]}
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % 8)
    return len(described).to_bytes(8, "little") + described
