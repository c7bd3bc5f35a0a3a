"""Compresses a source to few columns that fit into memory, in one pass; see `compression`.

N rows, D width, R compressed width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from xlvlm_jax.solvers.compression import SAMPLE, directions_of_sample, sketch_directions
from xlvlm_jax.solvers.linalg import matmul, orthonormal, weighted_sums
from xlvlm_jax.solvers.restarts import draw_rows
from xlvlm_jax.solvers.streamed.tiles import Source, Tile, add_up, check_rows, give_back, values_of
from xlvlm_jax.solvers.sums import Wide, column_sums, total

ALIGNMENT = 64  # bytes; XLA uses an array in place if it starts at a multiple of this
TURNED = 4096  # rows that are rotated together, in a cache
CANCELS = 0.05  # of its terms: a smaller difference is computed from the residual itself

# Each one program, which is kept.
_orthonormal = jax.jit(orthonormal)
_directions_of_sample = jax.jit(directions_of_sample, static_argnames="width")


class Compressed(NamedTuple):
    """A source minus an origin, like `compression.Compressed`, and its rows' energy."""

    basis: Float[Array, "D R"]  # orthonormal, in no order before `turn_to_axes`
    X: Float[np.ndarray, "N R"]
    energy: Float[np.ndarray, " N"]  # |z_n - origin|^2
    outside: float  # sum of squares outside the span of the basis
    origin: Float[Array, " D"]


@jax.jit
def sketch(
    Z: Float[Array, "B D"],
    real: Float[Array, " B"],
    directions: Float[Array, "D R"],
    origin: Float[Array, " D"],
) -> tuple[tuple[Float[Array, "D R"], Wide], Float[Array, " B"]]:
    """Returns the sums and the row energies of a tile minus the origin.

    Returns:
        (Z^T Z directions, sum of the rows), and the sum of squares of each row.
    """
    Z = real[:, None] * (Z.astype(jnp.float32) - origin)
    image = weighted_sums(matmul(Z, directions).T, Z).T
    return (image, column_sums(Z)), jnp.sum(Z**2, axis=1)


@jax.jit
def _project(
    Z: Array, real: Array, basis: Array, origin: Array
) -> tuple[Wide, tuple[Array, Array]]:
    Z = real[:, None] * (Z.astype(jnp.float32) - origin)
    X, squares = matmul(Z, basis), jnp.sum(Z**2, axis=1)
    outside = squares - jnp.sum(X**2, axis=1)

    def of_residual() -> Array:
        return jnp.sum((Z - matmul(X, basis.T)) ** 2, axis=1)

    cancels = jnp.sum(outside) < CANCELS * jnp.sum(squares)
    outside = jax.lax.cond(cancels, of_residual, lambda: outside)
    return total(outside), (X, squares)


def leading(
    source: Source, key: PRNGKeyArray, width: int, origin: Float[Array, " D"]
) -> Float[Array, "D R"]:
    """Returns a basis of the leading directions of the rows minus the origin; one pass.

    Raises:
        ValueError: a row has NaN or Inf; the first such row is named.
    """
    directions = sketch_directions(key, source.shape[1], width)

    def on_tile(tile: Tile) -> tuple:
        return sketch(tile.Z, tile.real, directions, origin)

    spanned, _ = values_of(add_up(source, on_tile, check_rows))
    return _orthonormal(spanned)


def leading_of_sample(
    source: Source, key: PRNGKeyArray, width: int, origin: Float[Array, " D"]
) -> Float[Array, "D R"]:
    """Does the same for a sample of the rows, without a pass."""
    row_key, key = jax.random.split(key)
    numbers = np.asarray(draw_rows(row_key, source.shape[0], SAMPLE * width))
    X = jnp.asarray(source.take(numbers), jnp.float32) - origin
    return _directions_of_sample(X, key, width)


def compress(source: Source, basis: Float[Array, "D R"], origin: Float[Array, " D"]) -> Compressed:
    """Returns the rows minus the origin in the columns of a basis; one pass.

    Raises:
        ValueError: a row has NaN or Inf; the first such row is named.
    """
    N = source.shape[0]
    X, energy = _aligned(N, basis.shape[1]), np.empty(N, np.float32)

    def keep(tile: Tile, kept: tuple[Array, Array]) -> None:
        check_rows(tile, kept[1])
        for whole, part in zip((X, energy), kept, strict=True):
            whole[tile.start : tile.start + tile.num_rows] = part[: tile.num_rows]

    def on_tile(tile: Tile) -> tuple:
        return _project(tile.Z, tile.real, basis, origin)

    outside = float(add_up(source, on_tile, keep).value)
    give_back()
    return Compressed(basis, X, energy, max(outside, 0.0), origin)


def turn_to_axes(small: Compressed) -> Compressed:
    """Rotates the rows to the principal axes of their space, highest energy first, in place."""
    X = small.X

    def blocks() -> Iterator[Float[np.ndarray, "B R"]]:
        return (X[first : first + TURNED] for first in range(0, len(X), TURNED))

    overlaps = np.zeros((X.shape[1],) * 2)
    with np.errstate(over="ignore", invalid="ignore"):
        for rows in blocks():
            overlaps += rows.T @ rows
    if not np.isfinite(overlaps).all():  # the solver's objective tells of it
        return small
    axes = np.linalg.eigh(overlaps)[1][:, ::-1].astype(np.float32)
    for rows in blocks():
        rows[:] = rows @ axes
    return small._replace(basis=matmul(small.basis, jnp.asarray(axes)))


def _aligned(N: int, R: int) -> Float[np.ndarray, "N R"]:
    """Returns an empty matrix that a CPU uses in place, without a copy."""
    room = np.empty(4 * N * R + ALIGNMENT, np.uint8)
    first = -room.ctypes.data % ALIGNMENT
    return room[first : first + 4 * N * R].view(np.float32).reshape(N, R)
