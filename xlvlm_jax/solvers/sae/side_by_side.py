"""Rows of several sources side by side: what transcoders and crosscoders learn from."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from xlvlm_jax.solvers.validation import StoredMatrix, read_block


class SideBySide:
    """Reads rows of several sources as one, block by block.

    Attributes:
        sources: each reads rows[N, D_m], or is an array of them.
        shape: (N, the sum of all D_m).
    """

    def __init__(self, *sources: Any):
        self.sources = sources
        self.shape = (sources[0].shape[0], sum(source.shape[1] for source in sources))

    def read(self, start: int, stop: int) -> Shaped[np.ndarray, "B D"]:
        """Returns the rows from `start` up to `stop`."""
        parts = [
            np.asarray(source[start:stop])
            if isinstance(source, jax.Array | np.ndarray)
            else read_block(source, start, stop)
            for source in self.sources
        ]
        return np.concatenate(parts, axis=1)


def side_by_side(
    *sources: Any,
) -> tuple[Shaped[jax.Array | np.ndarray, "N D"] | StoredMatrix, tuple[int, ...]]:
    """Returns the rows of several sources as one matrix, and the sources' widths.

    Args:
        *sources: arrays [N, D_m], or objects that read their rows.

    Returns:
        An array if all are arrays, otherwise what reads them together; and all D_m.

    Raises:
        ValueError: they have different numbers of rows.
    """
    counts = [source.shape[0] for source in sources]
    if len(set(counts)) > 1:
        raise ValueError(
            f"Z and target have {' and '.join(map(str, counts))} rows; expected the same states of "
            "both, row for row"
        )
    widths = tuple(source.shape[1] for source in sources)
    if all(isinstance(source, jax.Array) for source in sources):
        return jnp.concatenate(sources, axis=1), widths  # on the device
    if all(isinstance(source, jax.Array | np.ndarray) for source in sources):
        return np.concatenate(sources, axis=1), widths
    return SideBySide(*sources), widths
