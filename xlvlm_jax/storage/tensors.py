"""Arrays as a safetensors file."""

from collections.abc import Mapping

import numpy as np
import safetensors.numpy
from numpy.typing import ArrayLike


def as_bytes(tensors: Mapping[str, ArrayLike], metadata: Mapping[str, str] | None = None) -> bytes:
    """Returns the content of a safetensors file.

    Args:
        tensors: name -> array, of any layout in memory; its dtype is kept.
        metadata: the file's metadata; None for none.
    """
    # safetensors 0.8 writes the bytes as they lie in memory, whatever the strides.
    contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    return safetensors.numpy.save(contiguous, None if metadata is None else dict(metadata))
