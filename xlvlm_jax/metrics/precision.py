"""What metrics are computed with: numpy in float64, or JAX where their arguments are traced."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from xlvlm_jax.solvers import sums

AnyArray = jax.Array | np.ndarray
Figure = float | jax.Array  # an array, of no axes, where the function is traced


def is_traced(*values: Any) -> bool:
    """Whether one of the values is an argument of a function that JAX transforms."""
    return any(isinstance(value, Tracer) for value in values)


def as_real(*arrays: AnyArray) -> tuple[Any, tuple[Any, ...]]:
    """The namespace to compute in, and the arrays in it: numpy and float64, or JAX and float32.

    Traced float64 arrays stay what they are.
    """
    if not is_traced(*arrays):
        return np, tuple(np.asarray(array, np.float64) for array in arrays)
    arrays = tuple(map(jnp.asarray, arrays))
    return jnp, tuple(array.astype(jnp.result_type(*arrays, jnp.float32)) for array in arrays)


def column_means(rows: Float[AnyArray, "N D"]) -> Float[AnyArray, " D"]:
    """The mean of each column, whose error does not grow with N."""
    return sums.column_means(rows).value if isinstance(rows, jax.Array) else rows.mean(axis=0)


def as_figure(value: Any) -> Figure:
    """A number as a float, or as it is where it is traced."""
    return value if is_traced(value) else float(value)
