"""Arrays as a safetensors file."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import ArrayLike

from xlvlm_jax.storage import atomic

_KINDS = {"int64": "I64", "int32": "I32", "float32": "F32"}


def as_bytes(tensors: Mapping[str, ArrayLike], metadata: Mapping[str, str] | None = None) -> bytes:
    """Returns the content of a safetensors file.

    Args:
        tensors: name -> array, of any layout in memory; its dtype is kept.
        metadata: the file's metadata; None for none.
    """
    # safetensors 0.8 writes the bytes as they lie in memory, whatever the strides.
    contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    return safetensors.numpy.save(contiguous, None if metadata is None else dict(metadata))


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
    header, end = {}, 0
    for key, kind, extent in (
        *((key, _KINDS[array.dtype.name], array.shape) for key, array in ordered),
        (name, "F32", shape),
    ):
        start, end = end, end + int(np.prod(extent)) * (8 if kind == "I64" else 4)
        header[key] = {"dtype": kind, "shape": list(extent), "data_offsets": [start, end]}
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % 8)
    with atomic.writing(path) as file:
        file.write(len(described).to_bytes(8, "little") + described)
        for _, array in ordered:
            file.write(array.astype(array.dtype.newbyteorder("<")).tobytes())
        for block in blocks:
            file.write(block.astype("<f4").tobytes())
