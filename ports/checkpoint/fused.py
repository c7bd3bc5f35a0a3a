"""Stored tensors in other pieces than the parameters: fused projections, tables in two parts.

Pieces are read like stored tensors, so that nothing is read twice or kept.
"""

import dataclasses
from pathlib import Path

import numpy as np

from ports.checkpoint.quantised import Tensor


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows `first` to `end` - 1 of a stored tensor."""

    tensor: Tensor
    first: int
    end: int

    @property
    def file(self) -> Path:
        """Path of the tensor's file."""
        return self.tensor.file

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the tensor."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of these rows."""
        return (max(self.end - self.first, 0), *self.tensor.shape[1:])

    def read(self, rows: tuple[int, int] | None = None) -> np.ndarray:
        """Reads (first, last + 1) of these rows; None for all."""
        first, end = rows or (0, self.end - self.first)
        return self.tensor.read((self.first + first, self.first + end))


@dataclasses.dataclass(frozen=True)
class Joined:
    """Two stored tensors, the rows of the second after those of the first."""

    above: Tensor
    below: Tensor

    @property
    def file(self) -> Path:
        """Path of the first tensor's file."""
        return self.above.file

    @property
    def dtype(self) -> np.dtype:
        """Dtype of both together."""
        return np.promote_types(self.above.dtype, self.below.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of both together; of rows of different lengths that of the first."""
        return (self.above.shape[0] + self.below.shape[0], *self.above.shape[1:])

    def read(self, rows: tuple[int, int] | None = None) -> np.ndarray:
        """Reads (first, last + 1) of all rows; None for all."""
        first, end = rows or (0, self.shape[0])
        count = self.above.shape[0]
        parts = [(self.above, first, min(end, count))]
        parts += [(self.below, max(first - count, 0), end - count)]
        read = [tensor.read((start, stop)) for tensor, start, stop in parts if start < stop]
        return read[0] if len(read) == 1 else np.concatenate(read)


def split(tensor: Tensor, *counts: int) -> list[Rows]:
    """Splits a stored tensor after so many rows each; the last part has the rest."""
    ends = np.cumsum([0, *counts]).tolist()
    return [
        Rows(tensor, first, end)
        for first, end in zip(ends, [*ends[1:], tensor.shape[0]], strict=True)
    ]
