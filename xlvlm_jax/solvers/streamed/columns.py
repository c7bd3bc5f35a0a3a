"""A source in few columns, which fit into memory: `compression` in one pass or two.

N rows, D width, R compressed width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from xlvlm_jax.solvers.compression import SAMPLE, directions_of_sample, sketch_directions
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
def _project(Z: Array, real: Array, basis: Array) -> tuple[Array, tuple[Array, Array]]:
    Z = Z.astype(jnp.float32)
    return matmul(real, Z), (matmul(Z, basis), jnp.sum(Z**2, axis=1))


class _Sampled(NamedTuple):
    """What `directions_of_sample` asks of rows, from a source."""

    source: Source

    def take(self, _: Source, numbers: Array) -> Array:
        return jnp.asarray(self.source.take(np.asarray(numbers)), jnp.float32)

    def total(self, value: Array) -> Array:
        return value


def compress(source: Source, key: PRNGKeyArray, width: int) -> Compressed:
    """Two passes: the leading directions of the row space, and the rows in them.

    Raises ValueError that names the first row with NaN or Inf.
    """
    directions = sketch_directions(key, source.shape[1], width)
    spanned, _ = add_up(source, lambda tile: sketch(tile.Z, tile.real, directions), check_rows)
    return _in_columns(source, orthonormal(spanned))


def compress_by_sample(source: Source, key: PRNGKeyArray, width: int) -> Compressed:
    """One pass, with directions that lead in a sample of the rows: those of `compression`'s.

    Raises ValueError that names the first row with NaN or Inf.
    """
    count, N = SAMPLE * width, source.shape[0]
    return _in_columns(source, directions_of_sample(source, key, width, count, N, _Sampled(source)))


def _in_columns(source: Source, basis: Float[Array, "D R"]) -> Compressed:
    """A pass: the rows in the columns of a basis."""
    N = source.shape[0]
    X, energy = np.empty((N, basis.shape[1]), np.float32), np.empty(N, np.float32)

    def keep(tile: Tile, kept: tuple[Array, Array]) -> None:
        check_rows(tile, kept[1])
        for whole, part in zip((X, energy), kept, strict=True):
            whole[tile.start : tile.start + tile.count] = part[: tile.count]

    total = add_up(source, lambda tile: _project(tile.Z, tile.real, basis), keep)
    return Compressed(basis, X, energy, total / N)
