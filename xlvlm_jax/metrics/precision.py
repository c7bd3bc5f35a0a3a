"""Number types of metrics: numpy in float64, or JAX if the arguments are traced."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ports.tracing import is_traced
from xlvlm_jax.solvers import sums

AnyArray = jax.Array | np.ndarray
Figure = float | jax.Array  # a scalar array if the function is traced


def as_real(*arrays: AnyArray) -> tuple[Any, tuple[Any, ...]]:
    """Returns the namespace to compute in, and the arrays in it: numpy float64, or JAX float32.

    Traced float64 arrays stay float64.
    """
    if not is_traced(*arrays):
        return np, tuple(np.asarray(array, np.float64) for array in arrays)
    arrays = tuple(map(jnp.asarray, arrays))
    return jnp, tuple(array.astype(jnp.result_type(*arrays, jnp.float32)) for array in arrays)


def column_means(rows: Float[AnyArray, "N D"]) -> Float[AnyArray, " D"]:
    """Returns the mean of each column, with an error that does not grow with N."""
    return sums.column_means(rows).value if isinstance(rows, jax.Array) else rows.mean(axis=0)


def as_figure(value: Any) -> Figure:
    """Returns a number as a float, or unchanged if it is traced."""
    return value if is_traced(value) else float(value)
