"""From activations back to states, and how much of the states that explains.

N samples, K concepts, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from ports.tracing import is_traced
from xlvlm_jax.concepts.decomposition import distances, project
from xlvlm_jax.concepts.encoding import decode
from xlvlm_jax.concepts.methods import method_named
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.metrics.codes import TILE_ROWS, squared_deviations
from xlvlm_jax.storage.zarr_rows import StoredRows

AnyArray = jax.Array | np.ndarray


def squared_residual(
    concepts: Concepts, rows: Shaped[np.ndarray, "B D"], activations: Float[np.ndarray, "B K"]
) -> float:
    """Returns the sum of |row - its reconstruction|^2, in float64."""
    residual = rows.astype(np.float64) - np.asarray(reconstruct(concepts, activations, rows))
    return float(np.sum(residual**2))


def explained_by(
    concepts: Concepts, stored: StoredRows, activations: Float[np.ndarray, "N K"] | None
) -> float:
    """Returns the explained variance of rows on disk, tile by tile.

    Args:
        concepts: concepts of width D.
        stored: reads rows[N, D].
        activations: float[N, K] of the rows; None to compute them.

    Returns:
        1 - |Z - reconstruction|^2 / |Z - mean|^2; NaN if all rows are equal.
    """
    total = squared_deviations(stored.tiles(TILE_ROWS))

    def of_rows(start: int, rows: np.ndarray) -> np.ndarray:
        if activations is None:
            return np.asarray(project(rows, concepts))
        return activations[start : start + len(rows)]

    left = sum(
        squared_residual(concepts, rows, of_rows(start, rows))
        for start, rows in stored.tiles(TILE_ROWS)
    )
    return 1 - left / total if total > 0 else float("nan")


def reconstruct(
    concepts: Concepts,
    activations: Float[AnyArray, "N K"],
    states: Shaped[AnyArray, "N D"] | None = None,
) -> Float[AnyArray, "N E"]:
    """Reconstructs states from activations.

    Activations times components, plus the mean for pca. For kmeans and simple, whose activations
    are not coefficients, the component of each row's largest activation; for sparse autoencoders
    what they decode. Works under jit, vmap and grad.

    Args:
        concepts: K concepts.
        activations: float[N, K].
        states: the states that were encoded, whose mean and scale are restored where a sparse
            autoencoder normalises its input. For kmeans and simple, whose activations
            1 / (1 + distance) round to one at distances below 1e-8, they tell which of several
            largest activations is of the nearest component; without them it is the first. Other
            methods do not need them.

    Returns:
        float[N, E]; E is D, but for transcoders the width of the site that they write.

    Raises:
        ValueError: `states` are needed and not given, or the method is unknown.
    """
    if concepts.dictionary is not None:
        return decode(concepts.dictionary, activations, states)
    method = method_named(concepts.method)
    xp: Any = jnp if is_traced(concepts.components, activations, states) else np
    components, codes = xp.asarray(concepts.components), xp.asarray(activations)
    if method.is_centroids and states is not None:
        return components[_nearest(xp, concepts, codes, states)]
    mean = None if concepts.mean is None else xp.asarray(concepts.mean)
    return method.reconstruct(codes, components, mean)


def _nearest(
    xp: Any, concepts: Concepts, codes: Float[AnyArray, "N K"], states: Shaped[AnyArray, "N D"]
) -> Int[AnyArray, " N"]:
    """Returns the number of each row's largest activation, of several that of the nearest."""
    largest = codes == codes.max(axis=1, keepdims=True)
    if xp is jnp:
        return jnp.argmin(jnp.where(largest, distances(states, concepts)[1], jnp.inf), axis=1)
    found, tied = largest.argmax(axis=1), np.flatnonzero(largest.sum(axis=1) > 1)
    if tied.size:
        apart = np.asarray(distances(np.asarray(states)[tied], concepts)[1])
        found[tied] = np.where(largest[tied], apart, np.inf).argmin(axis=1)
    return found
