"""Sums and squared residuals over tiles of rows: Z is the only matrix of its size in memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xlvlm_jax.solvers.linalg import matmul

TILE = 2**19  # elements of Z per tile: two megabytes, which fit into a CPU's cache
# An accelerator has no such cache and runs a few large products faster than many small ones.
ACCELERATOR_TILE = 2**26


def of_products(
    Z: Float[Array, "N D"],
    codes: Float[Array, "N K"],
    atoms: Float[Array, "K D"],
    origin: Float[Array, " D"] | float = 0.0,
) -> Float[Array, " N"]:
    """Returns |z_n - origin - codes_n atoms|^2."""

    def squares(z: Array, codes: Array) -> Array:
        return jnp.sum(((z - origin) - matmul(codes, atoms)) ** 2, axis=1)

    return _by_tiles(squares, Z, codes)


def of_labels(
    Z: Float[Array, "N D"],
    labels: Int[Array, " N"],
    centroids: Float[Array, "K D"],
    origin: Float[Array, " D"] | float = 0.0,
) -> Float[Array, " N"]:
    """Returns |z_n - origin - centroids[labels_n]|^2."""

    def squares(z: Array, labels: Array) -> Array:
        return jnp.sum(((z - origin) - centroids[labels]) ** 2, axis=1)

    return _by_tiles(squares, Z, labels)


def fold(function: Callable[..., Any], total: Any, Z: Float[Array, "N D"], other: Array) -> Any:
    """Folds function(total, Z, other) over tiles of rows, each with the total so far."""
    size, rows = _tiles(Z, other)
    whole = len(Z) // size

    def add(i: Array, total: Any) -> Any:
        return function(total, *rows(i * size, size))

    total = jax.lax.fori_loop(0, whole, add, total)
    return function(total, *rows(whole * size, len(Z) % size)) if len(Z) % size else total


def _by_tiles(function: Callable[..., Array], Z: Array, other: Array) -> Array:
    """Returns function(Z, other), computed one tile of rows after another."""
    N = len(Z)
    size, rows = _tiles(Z, other)
    if size >= N:
        return function(*rows(0, N))
    whole = N // size
    found = jax.lax.map(lambda i: function(*rows(i * size, size)), jnp.arange(whole)).reshape(-1)
    if N % size == 0:
        return found
    return jnp.concatenate([found, function(*rows(whole * size, N % size))])


def _tiles(Z: Array, other: Array) -> tuple[int, Callable[[Array | int, int], tuple[Array, ...]]]:
    """Returns the rows per tile, and a function that slices both arrays."""

    def rows(first: Array | int, count: int) -> tuple[Array, ...]:
        return tuple(jax.lax.dynamic_slice_in_dim(array, first, count) for array in (Z, other))

    tile = TILE if jax.default_backend() == "cpu" else ACCELERATOR_TILE
    return max(min(len(Z), tile // Z.shape[1]), 1), rows
