"""A source in few columns, which fit into memory: `compression` in two passes.

N rows, D width, R compressed width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from xlvlm_jax.solvers.compression import sketch_directions
from xlvlm_jax.solvers.loop import matmul, weighted_sums
from xlvlm_jax.solvers.orthonormal import orthonormal
from xlvlm_jax.solvers.streamed.tiles import Source, Tile, add_up, check_rows


class Compressed(NamedTuple):
    """A source in few columns, as `compression.Compressed`, and the energy of its rows."""

    basis: Float[Array, "D R"]  # orthonormal, in no order: what solves for X turns it to its axes
    X: Float[np.ndarray, "N R"]
    energy: Float[np.ndarray, " N"]  # |z_n|^2
    mean: Float[Array, " D"]  # of the rows

    @property
    def outside(self) -> float:
        """Sum of squares that the columns lack: what lies outside the basis."""
        inside = np.sum(np.square(self.X), dtype=np.float64)
        return float(np.sum(self.energy, dtype=np.float64) - inside)


@jax.jit
def sketch(
    Z: Float[Array, "B D"], real: Float[Array, " B"], directions: Float[Array, "D R"]
) -> tuple[tuple[Float[Array, "D R"], Float[Array, " D"]], Float[Array, " B"]]:
    """Of a tile: (Z^T Z directions, the sum of its rows), and the squares of each row."""
    Z = Z.astype(jnp.float32)
    image = weighted_sums(matmul(Z, directions).T, Z).T
    return (image, matmul(real, Z)), jnp.sum(Z**2, axis=1)


@jax.jit
def _project(Z: Array, basis: Array) -> Array:
    return matmul(Z, basis)


def compress(source: Source, key: PRNGKeyArray, width: int) -> Compressed:
    """Two passes: the leading directions of the row space, and the rows in them.

    Raises ValueError that names the first row with NaN or Inf.
    """
    N, D = source.shape
    energy = np.empty(N, np.float32)

    def keep(tile: Tile, squares: Array) -> None:
        energy[tile.start : tile.start + tile.count] = squares[: tile.count]
        check_rows(tile, squares)

    directions = sketch_directions(key, D, width)
    spanned, total = add_up(source, lambda tile: sketch(tile.Z, tile.real, directions), keep)
    basis = orthonormal(spanned)
    X = np.empty((N, basis.shape[1]), np.float32)

    def keep_columns(tile: Tile, columns: Array) -> None:
        X[tile.start : tile.start + tile.count] = columns[: tile.count]

    add_up(source, lambda tile: ((), _project(tile.Z, basis)), keep_columns)
    return Compressed(basis, X, energy, total / N)
