"""Properties of codes: how much they explain, and how few concepts they use.

N samples, K concepts, D width.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Num, Shaped

from ports.tracing import is_traced
from xlvlm_jax.metrics.precision import Figure, as_figure, as_real, column_means

TILE_ROWS = 2**14  # rows converted to float64 at once
AnyArray = jax.Array | np.ndarray


def explained_variance(Z: Float[AnyArray, "N D"], reconstruction: Float[AnyArray, "N D"]) -> Figure:
    """Returns 1 - |Z - reconstruction|^2 / |Z - mean of Z|^2.

    Works under jit, vmap and grad.

    Args:
        Z: float[N, D].
        reconstruction: float[N, D].

    Returns:
        at most 1; negative if the mean of Z alone does better; NaN if all rows of Z are equal.

    Raises:
        ValueError: the shapes differ.
    """
    xp, (Z, reconstruction) = as_real(Z, reconstruction)
    if Z.shape != reconstruction.shape:
        raise ValueError(
            f"Z has shape {Z.shape} but its reconstruction has {reconstruction.shape}; expected "
            "the same"
        )

    def mean_square(rows: AnyArray) -> Any:  # a scalar of numpy's or of JAX's
        return column_means(xp.sum(rows**2, axis=1, keepdims=True))[0]

    variance = mean_square(Z - column_means(Z))
    varies = variance > 0
    share = mean_square(Z - reconstruction) / xp.where(varies, variance, 1)
    return as_figure(xp.where(varies, 1 - share, xp.nan))


def squared_deviations(tiles: Iterable[tuple[int, Shaped[np.ndarray, "B D"]]]) -> float:
    """Returns the sum of |row - mean of all rows|^2 in one pass over tiles, in float64.

    Source: Chan, Golub and LeVeque 1983, merging sums of squares of parts.
    """
    count, mean, total = 0, 0.0, 0.0
    for _, rows in tiles:
        rows = rows.astype(np.float64)
        own, joined = rows.mean(axis=0), count + len(rows)
        total += np.sum((rows - own) ** 2)
        total += np.sum((own - mean) ** 2) * count * len(rows) / joined
        mean, count = mean + (own - mean) * len(rows) / joined, joined
    return float(total)


def hoyer_sparsity(activations: Float[AnyArray, "N K"] | Sequence[Sequence[float]]) -> Figure:
    """Returns the mean over samples of (sqrt(K) - |u|_1 / |u|_2) / (sqrt(K) - 1).

    Works under jit, vmap and grad.

    Args:
        activations: float[N, K].

    Returns:
        1 if each sample uses one concept, 0 if it uses all equally. Samples that use none are left
        out; NaN if none is left, or K is 1.

    Source: Hoyer 2004, section 3.1.
    """
    root = float(np.sqrt(np.shape(activations)[1]))
    if not len(activations) or root == 1:
        return float("nan")
    if not is_traced(activations):
        return _hoyer_of_tiles(np.asarray(activations), root)
    _, (codes,) = as_real(jnp.asarray(activations))
    used = (codes != 0).any(axis=1)
    norms = jnp.sqrt(jnp.where(used, jnp.sum(codes**2, axis=1), 1))
    sparsity = (root - jnp.abs(codes).sum(axis=1) / norms) / (root - 1)
    both = jnp.stack([jnp.where(used, sparsity, 0), jnp.where(used, 1.0, 0.0)], axis=1)
    total, count = column_means(both)
    return as_figure(jnp.where(count > 0, total / jnp.where(count > 0, count, 1), jnp.nan))


def _hoyer_of_tiles(activations: Num[np.ndarray, "N K"], root: float) -> float:
    """Does `hoyer_sparsity` for some rows at a time, without a float64 copy of all codes."""
    total, count = 0.0, 0
    for start in range(0, len(activations), TILE_ROWS):
        codes = activations[start : start + TILE_ROWS].astype(np.float64)
        codes = codes[codes.any(axis=1)]
        norms = np.linalg.norm(codes, axis=1)
        total += np.sum((root - np.abs(codes).sum(axis=1) / norms) / (root - 1))
        count += len(codes)
    return float(total / count) if count else float("nan")


def active_share(activations: Float[AnyArray, "N K"]) -> Figure:
    """Returns the share of nonzero codes.

    Works under jit and vmap.

    Args:
        activations: float[N, K].

    Returns:
        a number in [0, 1].
    """
    if is_traced(activations):
        _, (codes,) = as_real(activations)
        return jnp.mean(column_means((codes != 0).astype(codes.dtype)))
    return float(np.mean(np.asarray(activations) != 0))


def dead_concepts(activations: Float[AnyArray, "N K"]) -> Bool[AnyArray, " K"]:
    """Returns which concepts are not the most active one of any sample.

    These are concepts with only zero codes, and concepts that are never the strongest: their words
    are compared to no image. A sample whose codes are all zero has no most active concept. Works
    under jit and vmap.

    Args:
        activations: float[N, K]; ties go to the first concept.

    Returns:
        bool[K].
    """
    xp: Any = jnp if is_traced(activations) else np
    codes = xp.asarray(activations)
    K = codes.shape[1]
    first = xp.where((codes != 0).any(axis=1), codes.argmax(axis=1), K)
    found = jnp.bincount(first, length=K + 1) if xp is jnp else np.bincount(first, minlength=K + 1)
    return found[:K] == 0
