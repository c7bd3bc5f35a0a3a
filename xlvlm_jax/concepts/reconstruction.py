"""From activations back to states, and how much of the states that explains.

N samples, K concepts, D width."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from xlvlm_jax.concepts.methods import method_named
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.metrics.codes import TILE_ROWS, squared_deviations
from xlvlm_jax.metrics.precision import is_traced
from xlvlm_jax.storage.zarr_rows import StoredRows

AnyArray = jax.Array | np.ndarray


def squared_residual(
    concepts: Concepts, rows: Shaped[np.ndarray, "B D"], activations: Float[np.ndarray, "B K"]
) -> float:
    """The sum of |row - what its activations stand for|^2, in float64."""
    residual = rows.astype(np.float64) - reconstruct(concepts, activations)
    return float(np.sum(residual**2))


def explained_by(
    concepts: Concepts, stored: StoredRows, activations: Float[np.ndarray, "N K"]
) -> float:
    """`explained_variance` of rows on disk, tile by tile, of which none stays in memory."""
    total = squared_deviations(stored.tiles(TILE_ROWS))
    left = sum(
        squared_residual(concepts, rows, activations[start : start + len(rows)])
        for start, rows in stored.tiles(TILE_ROWS)
    )
    return 1 - left / total if total > 0 else float("nan")


def reconstruct(concepts: Concepts, activations: Float[AnyArray, "N K"]) -> Float[AnyArray, "N D"]:
    """The rows that activations stand for: those times components, and for pca its mean added.

    For kmeans and simple, whose activations are no coefficients, each row's nearest component.
    Traces under jit, vmap and grad.
    """
    xp: Any = jnp if is_traced(concepts.components, activations) else np
    components, codes = xp.asarray(concepts.components), xp.asarray(activations)
    mean = None if concepts.mean is None else xp.asarray(concepts.mean)
    return method_named(concepts.method).reconstruct(codes, components, mean)
