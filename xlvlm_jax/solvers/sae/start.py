"""Where training starts: the scale of the rows, their median, and the first features.

S sampled rows, D width, K features, M sources whose rows stand side by side.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from xlvlm_jax.solvers.linalg import TINY, matmul

MEDIAN_TOLERANCE, MEDIAN_ITERATIONS = 1e-5, 100


class Start(NamedTuple):
    """What is known of the rows before training."""

    scale: float | tuple[float, ...]  # rows are multiplied by it; of several sources one for each
    widths: tuple[int, ...]  # of the sources, which add up to D
    median: Float[Array, " D"]  # geometric median of the scaled rows
    rows: Float[Array, "S D"]  # scaled rows


def start(
    rows: Float[np.ndarray, "S D"],
    scale: float | tuple[float, ...] | None,
    widths: tuple[int, ...] | None = None,
) -> Start:
    """Returns the start for a sample of rows.

    Args:
        rows: float32[S, D].
        scale: factor of the rows, of several sources one for each; None for sqrt(D) over their mean
            norm, so that the loss and the penalties mean the same for every site. Of several
            sources it is the norm of what differs from their means, so that each varies as much.
        widths: widths of the sources; None for one.
    """
    widths = widths or (rows.shape[1],)
    chosen = _scales(rows, widths) if scale is None else scale
    factor = per_column(chosen, widths)
    scaled = jax.device_put((rows.astype(np.float64) * factor).astype(np.float32))
    return Start(chosen, widths, geometric_median(scaled), scaled)


def _scales(rows: Float[np.ndarray, "S D"], widths: tuple[int, ...]) -> float | tuple[float, ...]:
    # In float64: squares may exceed float32.
    parts = np.split(rows.astype(np.float64), np.cumsum(widths)[:-1], axis=1)
    if len(parts) > 1:
        parts = [part - part.mean(axis=0) for part in parts]
    norms = [float(np.mean(np.linalg.norm(part, axis=1))) for part in parts]
    first, *others = (
        width**0.5 / norm if norm > 0 else 1.0 for width, norm in zip(widths, norms, strict=True)
    )
    return (first, *others) if others else first


def per_column(
    scale: float | tuple[float, ...], widths: tuple[int, ...]
) -> float | Float[np.ndarray, " D"]:
    """Returns the factor of the rows: a number, or of several sources one per column."""
    return np.repeat(scale, widths) if isinstance(scale, tuple) else scale


@jax.jit
def geometric_median(rows: Float[Array, "S D"]) -> Float[Array, " D"]:
    """Returns the point of least summed distance to the rows.

    Unlike the mean it does not follow a few rows of very large norm, which states have.

    Args:
        rows: float32[S, D].

    Returns:
        float32[D], once a step moves it by at most 1e-5 of the mean distance, or after 100 steps.

    Source: Weiszfeld 1937.
    """

    def closer(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        point, _, count = state
        distances = jnp.linalg.norm(rows - point, axis=1)
        weights = 1 / jnp.maximum(distances, TINY + 1e-6 * distances.mean())
        following = matmul(weights / weights.sum(), rows)
        moved = jnp.linalg.norm(following - point) / jnp.maximum(distances.mean(), TINY)
        return following, moved, count + 1

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        return (state[1] > MEDIAN_TOLERANCE) & (state[2] < MEDIAN_ITERATIONS)

    first = rows.mean(axis=0), jnp.float32(jnp.inf), jnp.int32(0)
    return jax.lax.while_loop(unfinished, closer, first)[0]


def unit_directions(key: PRNGKeyArray, K: int, D: int) -> Float[Array, "K D"]:
    """Returns K random directions of length one."""
    return unit_length(jax.random.normal(key, (K, D), jnp.float32))


def unit_length(rows: Float[Array, "K D"]) -> Float[Array, "K D"]:
    """Returns the rows at length one."""
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), TINY)
