"""Which concepts of two dictionaries belong together. K concepts, D width."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

Array = jax.Array | np.ndarray


def match(components_a: Float[Array, "K D"], components_b: Float[Array, "K D"]) -> Int[Array, " K"]:
    """The row of b that belongs to each row of a: the one-to-one matching of highest total cosine.

    The Hungarian method (Kuhn 1955). Traces under jit and vmap, as a callback to the host; it has
    no gradient. Raises ValueError unless both have the same shape.
    """
    shapes = np.shape(components_a), np.shape(components_b)
    if shapes[0] != shapes[1] or len(shapes[0]) != 2:
        raise ValueError(
            f"concepts have shapes {shapes[0]} and {shapes[1]}; expected the same [K, D] for both"
        )
    if any(isinstance(each, Tracer) for each in (components_a, components_b)):
        result = jax.ShapeDtypeStruct(shapes[0][:1], jnp.int32)
        # A matching of whole numbers does not change with its arguments.
        arguments = map(jax.lax.stop_gradient, (components_a, components_b))
        return jax.pure_callback(_hungarian, result, *arguments, vmap_method="sequential")
    return _hungarian(components_a, components_b)


def _hungarian(a: Array, b: Array) -> Int[np.ndarray, " K"]:
    similarity = unit_rows(a) @ unit_rows(b).T
    rows, columns = linear_sum_assignment(np.nan_to_num(similarity, nan=-1.0), maximize=True)
    return columns[np.argsort(rows)].astype(np.int32)


def matched_cosines(
    components_a: Float[Array, "K D"], components_b: Float[Array, "K D"]
) -> Float[np.ndarray, " K"]:
    """The cosine of each row of a with the row of b that belongs to it; 0 for a row of zeros."""
    a, b = np.asarray(components_a), np.asarray(components_b)
    return np.sum(unit_rows(a) * unit_rows(b)[match(a, b)], axis=1)


def unit_rows(rows: Float[Array, "K D"]) -> Float[np.ndarray, "K D"]:
    """The rows at length 1, in float64; a row of zeros stays one."""
    rows = np.asarray(rows, np.float64)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)
