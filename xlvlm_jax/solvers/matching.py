"""Matching of the concepts of two dictionaries. K concepts, D width."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Int

Array = jax.Array | np.ndarray


def match(components_a: Float[Array, "K D"], components_b: Float[Array, "K D"]) -> Int[Array, " K"]:
    """Returns the one-to-one matching of highest total cosine.

    Works under jit and vmap, as a callback to the host; it has no gradient.

    Args:
        components_a: float[K, D].
        components_b: float[K, D].

    Returns:
        int32[K], the row of b that is matched to each row of a.

    Raises:
        ValueError: the shapes differ or are not [K, D].

    Source: the Hungarian method (Kuhn, 1955).
    """
    shapes = np.shape(components_a), np.shape(components_b)
    if shapes[0] != shapes[1] or len(shapes[0]) != 2:
        raise ValueError(
            f"concepts have shapes {shapes[0]} and {shapes[1]}; expected the same [K, D] for both"
        )
    if any(isinstance(each, Tracer) for each in (components_a, components_b)):
        result = jax.ShapeDtypeStruct(shapes[0][:1], jnp.int32)
        # A matching of integers does not change with small changes of its arguments.
        arguments = map(jax.lax.stop_gradient, (components_a, components_b))
        return jax.pure_callback(_hungarian, result, *arguments, vmap_method="sequential")
    return _hungarian(components_a, components_b)


def _hungarian(a: Array, b: Array) -> Int[np.ndarray, " K"]:
    rows, columns, _ = match_any(a, b)
    return columns[np.argsort(rows)].astype(np.int32)


def match_any(
    components_a: Float[Array, "K D"], components_b: Float[Array, "L D"]
) -> tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"], Float[np.ndarray, " P"]]:
    """Returns the matching of highest total cosine of two dictionaries of any sizes.

    Args:
        components_a: float[K, D].
        components_b: float[L, D].

    Returns:
        int[P] rows of a, int[P] rows of b and float64[P] their cosines, P the smaller of K and L.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    similarity = unit_rows(components_a) @ unit_rows(components_b).T
    rows, columns = linear_sum_assignment(np.nan_to_num(similarity, nan=-1.0), maximize=True)
    return rows, columns, similarity[rows, columns]


def matched_cosines(
    components_a: Float[Array, "K D"], components_b: Float[Array, "K D"]
) -> Float[np.ndarray, " K"]:
    """Returns the cosine of each row of a with its matched row of b; 0 for a row of zeros."""
    a, b = np.asarray(components_a), np.asarray(components_b)
    return np.sum(unit_rows(a) * unit_rows(b)[match(a, b)], axis=1)


def unit_rows(rows: Float[Array, "K D"]) -> Float[np.ndarray, "K D"]:
    """Returns the rows scaled to length 1, in float64; a row of zeros stays zero."""
    rows = np.asarray(rows, np.float64)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)
