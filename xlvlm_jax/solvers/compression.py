"""Compresses Z to few columns: optimal atoms and centroids lie in the row space of Z, mostly in its
leading part. A solver iterates there, at cost N x R instead of N x D, and finishes on Z itself.

Randomised range finder with one product with Z^T Z: Halko, Martinsson and Tropp, "Finding structure
with randomness", SIAM Review 2011, section 4.5. It takes three passes over Z, or one if a sample of
the rows represents all of them. N samples, D width, R compressed width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from xlvlm_jax.solvers import sums
from xlvlm_jax.solvers.collectives import ONE_DEVICE, Rows
from xlvlm_jax.solvers.linalg import matmul, orthonormal, real_dtype, weighted_sums
from xlvlm_jax.solvers.restarts import draw_rows

SAMPLE = 12  # rows per direction in a sample


class Compressed(NamedTuple):
    """Z ~ X basis^T."""

    basis: Float[Array, "D R"]  # orthonormal
    X: Float[Array, "N R"]  # Z basis


class Centre(NamedTuple):
    """What is subtracted from every row, see `sums.centred_products`."""

    mean: Float[Array, " D"]
    far: Bool[Array, ""]
    real: Float[Array, " N"]  # 0 for a row that pads Z; its columns are then zero too
    weights: Float[Array, " N"] | None = None  # row weights in the choice of directions


def sketch_directions(
    key: PRNGKeyArray, D: int, width: int, dtype: DTypeLike = "float32"
) -> Float[Array, "D R"]:
    """Returns random directions, or the identity if D <= `width`."""
    if width < D:
        return jax.random.normal(key, (D, width), dtype)
    return jnp.eye(D, dtype=dtype)


def compress(
    Z: Float[Array, "N D"],
    key: PRNGKeyArray,
    width: int,
    rows: Rows = ONE_DEVICE,
    centre: Centre | None = None,
) -> Compressed:
    """Finds the leading `width` directions of the row space of Z, in no particular order.

    Args:
        Z: float[N, D].
        key: random key.
        width: number of directions.
        rows: where the rows of Z are.
        centre: mean to subtract from the rows; None for none.

    Returns:
        the directions, and the rows in terms of them.
    """
    D, dtype = Z.shape[1], real_dtype(Z)
    if width >= D and centre is None:
        return Compressed(jnp.eye(D, dtype=dtype), Z.astype(dtype))
    directions = sketch_directions(key, D, width, dtype)
    sketch = _in(Z, directions, centre)
    if centre is not None and centre.weights is not None:
        sketch = sketch * centre.weights[:, None]
    mean, far = (None, False) if centre is None else (centre.mean, centre.far)
    images = rows.total(sums.weighted_directions(_once(sketch).T, Z, mean, far))
    basis = _once(orthonormal(_once(images.T)))
    return Compressed(basis, _in(Z, basis, centre))


def compress_by_sample(
    Z: Float[Array, "N D"],
    key: PRNGKeyArray,
    width: int,
    num_samples: Int[Array, ""] | int,
    rows: Rows = ONE_DEVICE,
    centre: Centre | None = None,
) -> Compressed:
    """Like `compress`, with the leading directions of a sample of the first `num_samples` rows."""
    mean = None if centre is None else centre.mean
    basis = basis_of_sample(Z, key, width, num_samples, rows, mean)
    return Compressed(basis, _in(Z, basis, centre))


def basis_of_sample(
    Z: Float[Array, "N D"],
    key: PRNGKeyArray,
    width: int,
    num_samples: Int[Array, ""] | int,
    rows: Rows = ONE_DEVICE,
    mean: Float[Array, " D"] | None = None,
    sample: int = SAMPLE,
    rounds: int = 1,
) -> Float[Array, "D R"]:
    """Returns the directions of `compress_by_sample`.

    The sample has `sample` rows per direction; `rounds` are those of `directions_of_sample`.
    """
    row_key, key = jax.random.split(key)
    X = rows.take(Z, draw_rows(row_key, num_samples, sample * width, len(Z), rows))
    return directions_of_sample(X if mean is None else X - mean, key, width, rounds)


def _once(product: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns a product that is computed before its uses.

    Fused with them, a CPU would compute it in another layout, in twice the time.
    """
    return jax.lax.optimization_barrier(product)


def _in(
    Z: Float[Array, "N D"], basis: Float[Array, "D R"], centre: Centre | None
) -> Float[Array, "N R"]:
    if centre is None:
        return matmul(Z, basis)
    return centre.real[:, None] * sums.centred_scores(Z, basis, centre.mean, centre.far)


def directions_of_sample(
    X: Float[Array, "M D"], key: PRNGKeyArray, width: int, rounds: int = 1
) -> Float[Array, "D R"]:
    """Returns approximate leading directions of a sample of rows.

    Args:
        X: float[M, D], the rows minus their mean.
        key: random key.
        width: number of directions R.
        rounds: how often the directions are multiplied by X^T X.

    Returns:
        float[D, R], orthonormal.
    """
    weights = jax.random.normal(key, (len(X), width), X.dtype)
    found = orthonormal(weighted_sums(weights.T, X).T)

    def better(_: Array | int, found: Array) -> Array:
        return orthonormal(weighted_sums(matmul(X, found).T, X).T)

    return better(0, found) if rounds == 1 else jax.lax.fori_loop(0, rounds, better, found)


def turn_to_axes(compressed: Compressed, rows: Rows = ONE_DEVICE) -> Compressed:
    """Rotates to principal axes of the same space, highest energy first."""
    basis, X = compressed
    axes = jnp.linalg.eigh(rows.total(sums.overlaps(X, X).value))[1][:, ::-1]
    return Compressed(matmul(basis, axes), matmul(X, axes))
