"""Nearest contextual neighbours: which states of other tokens a state resembles.

The index is a directory of features: states of one site, each with its token and the sample it
comes from. It is read a tile at a time, so that it may be larger than memory.

M states, N rows of the index, D width, k neighbours.

After LatentLens, arXiv 2602.00462.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from ports.tables import kind
from xlvlm_jax.concepts.grounding import tiles_of
from xlvlm_jax.features.reader import Features
from xlvlm_jax.solvers.linalg import matmul
from xlvlm_jax.storage.zarr_rows import StoredRows

Array = jax.Array
BLOCK = 2**12  # states compared with a tile at a time


class Neighbours(NamedTuple):
    """The nearest rows of an index, nearest first.

    Attributes:
        rows: int[..., k], numbers of the rows.
        cosine: float32[..., k], from -1 to 1.
    """

    rows: Int[np.ndarray, "*batch k"]
    cosine: Float[np.ndarray, "*batch k"]

    def __repr__(self) -> str:
        return f"Neighbours(rows: {kind(self.rows)})"


def _unit(x: Array) -> Array:
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm > 0, norm, 1)


@functools.partial(jax.jit, static_argnames="k")
def _merged(
    states: Array, tile: Array, values: Array, rows: Array, start: Array, size: Array, *, k: int
) -> tuple[Array, Array]:
    """Returns the k best of what was found and of a tile of which `size` rows are real."""
    cosine = matmul(_unit(states), _unit(tile.astype(jnp.float32)).T)
    cosine = jnp.where(jnp.arange(len(tile)) < size, cosine, -jnp.inf)
    here, index = jax.lax.top_k(cosine, min(k, len(tile)))
    # Earlier rows come first, so that ties go to them.
    values = jnp.concatenate([values, here], axis=1)
    rows = jnp.concatenate([rows, start + index], axis=1)
    best, place = jax.lax.top_k(values, k)
    return best, jnp.take_along_axis(rows, place, axis=1)


def nearest(
    states: Float[Any, "*batch D"],
    index: Float[Any, "N D"] | StoredRows,
    k: int = 5,
) -> Neighbours:
    """Returns the rows of an index with the largest cosine to each state.

    The N x M cosines are never all in memory: the index is read in tiles, and only the best rows so
    far are kept. Runs on the host and cannot be traced.

    Args:
        states: float[..., D].
        index: float[N, D], or rows on disk, such as `Features.stored(site)`.
        k: number of neighbours.

    Returns:
        Row numbers and cosines [..., k], nearest first; ties go to the earlier row.

    Raises:
        ValueError: the widths differ, or k is not in 1..N.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import lenses
        >>> index = np.float32([[0, 5], [1, 0], [1, 1]])
        >>> found = lenses.nearest(np.float32([[3, 0]]), index, k=2)
        >>> found.rows.tolist(), found.cosine.round(2).tolist()
        ([[1, 2]], [[1.0, 0.7099999785423279]])
    """
    states = np.asarray(states, np.float32)
    N, D = index.shape
    if states.shape[-1] != D:
        raise ValueError(
            f"states are {states.shape[-1]} wide, but the index has width {D}; choose an index of "
            "the same site and model"
        )
    if not 1 <= k <= N:
        raise ValueError(f"k is {k}; expected 1 to {N}, the number of rows of the index")
    flat = states.reshape(-1, D)
    blocks = [jnp.asarray(flat[i : i + BLOCK]) for i in range(0, len(flat), BLOCK)]
    found = [(jnp.full((len(b), k), -jnp.inf), jnp.zeros((len(b), k), jnp.int32)) for b in blocks]
    first = None
    for start, tile in tiles_of(index):
        first = first or len(tile)
        # All tiles have the size of the first: one program.
        rows = jnp.asarray(np.pad(tile, ((0, first - len(tile)), (0, 0))))
        found = [
            _merged(block, rows, *best, jnp.int32(start), jnp.int32(len(tile)), k=k)
            for block, best in zip(blocks, found, strict=True)
        ]
    shape = (*states.shape[:-1], k)
    cosine, numbers = (
        np.concatenate([np.asarray(part) for part in column]).reshape(shape)
        for column in zip(*found, strict=True)
    )
    return Neighbours(numbers, cosine)


def describe(
    features: Features, rows: Int[np.ndarray, "*batch k"], tokenizer: Any
) -> dict[int, tuple[str, str]]:
    """Returns {row: (the token that it predicted, the text that it comes from)}.

    Args:
        features: the index.
        rows: row numbers.
        tokenizer: of the model that the features were extracted from.
    """
    found = {}
    for row in np.unique(rows).tolist():
        sample = features.samples[int(features.sample_rows[row])]
        said = sample.get("prediction") or " ".join(sample.get("references") or ())
        found[row] = (tokenizer.decode([int(features.tokens[row])]).strip(), str(said))
    return found
