"""From activations back to states, and how much of the states that explains.

N samples, K concepts, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from ports.tracing import is_traced
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
    concepts: Concepts, stored: StoredRows, activations: Float[np.ndarray, "N K"]
) -> float:
    """Returns the explained variance of rows on disk, tile by tile.

    Args:
        concepts: concepts of width D.
        stored: reads rows[N, D].
        activations: float[N, K] of the rows.

    Returns:
        1 - |Z - reconstruction|^2 / |Z - mean|^2; NaN if all rows are equal.
    """
    total = squared_deviations(stored.tiles(TILE_ROWS))
    left = sum(
        squared_residual(concepts, rows, activations[start : start + len(rows)])
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
    are not coefficients, each row's nearest component; for sparse autoencoders what they decode.
    Works under jit, vmap and grad.

    Args:
        concepts: K concepts.
        activations: float[N, K].
        states: the states that were encoded, whose mean and scale are restored where a sparse
            autoencoder normalises its input. Others do not need them.

    Returns:
        float[N, E]; E is D, but for transcoders the width of the site that they write.

    Raises:
        ValueError: `states` are needed and not given, or the method is unknown.
    """
    if concepts.dictionary is not None:
        return decode(concepts.dictionary, activations, states)
    xp: Any = jnp if is_traced(concepts.components, activations) else np
    components, codes = xp.asarray(concepts.components), xp.asarray(activations)
    mean = None if concepts.mean is None else xp.asarray(concepts.mean)
    return method_named(concepts.method).reconstruct(codes, components, mean)
