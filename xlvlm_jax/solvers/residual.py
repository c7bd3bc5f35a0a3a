"""Squared residuals of rows, some rows at a time: Z itself is the only matrix of its size."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xlvlm_jax.solvers.loop import matmul

TILE = 2**19  # numbers of Z in a tile


def of_products(
    Z: Float[Array, "N D"],
    codes: Float[Array, "N K"],
    atoms: Float[Array, "K D"],
) -> Float[Array, " N"]:
    """|z_n - codes_n atoms|^2."""

    def squares(z: Array, codes: Array) -> Array:
        return jnp.sum((z - matmul(codes, atoms)) ** 2, axis=1)

    return _by_tiles(squares, Z, codes)


def of_labels(
    Z: Float[Array, "N D"], labels: Int[Array, " N"], centroids: Float[Array, "K D"]
) -> Float[Array, " N"]:
    """|z_n - centroids[labels_n]|^2."""

    def squares(z: Array, labels: Array) -> Array:
        return jnp.sum((z - centroids[labels]) ** 2, axis=1)

    return _by_tiles(squares, Z, labels)


def _by_tiles(function: Callable[..., Array], Z: Array, other: Array) -> Array:
    """function(Z, other) of rows, a tile after the other."""
    N, D = Z.shape
    size = max(min(N, TILE // D), 1)

    def rows(first: Array | int, count: int) -> Array:
        tile = (jax.lax.dynamic_slice_in_dim(array, first, count) for array in (Z, other))
        return function(*tile)

    if size >= N:
        return rows(0, N)
    whole = N // size
    found = jax.lax.map(lambda i: rows(i * size, size), jnp.arange(whole)).reshape(-1)
    return jnp.concatenate([found, rows(whole * size, N % size)]) if N % size else found
