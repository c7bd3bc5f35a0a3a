"""Which concepts of two dictionaries belong together. K concepts, D width."""

import jax
import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

Array = jax.Array | np.ndarray


def match(components_a: Float[Array, "K D"], components_b: Float[Array, "K D"]) -> Int[Array, " K"]:
    """The row of b that belongs to each row of a: the one-to-one matching of highest total cosine.

    The Hungarian method (Kuhn 1955). Raises ValueError unless both have the same shape.
    """
    a, b = np.asarray(components_a), np.asarray(components_b)
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(
            f"concepts have shapes {a.shape} and {b.shape}; expected the same [K, D] for both"
        )
    similarity = unit_rows(a) @ unit_rows(b).T
    rows, columns = linear_sum_assignment(np.nan_to_num(similarity, nan=-1.0), maximize=True)
    return columns[np.argsort(rows)]


def matched_cosines(
    components_a: Float[Array, "K D"], components_b: Float[Array, "K D"]
) -> Float[np.ndarray, " K"]:
    """The cosine of each row of a with the row of b that belongs to it; 0 for a row of zeros."""
    a, b = np.asarray(components_a), np.asarray(components_b)
    return np.sum(unit_rows(a) * unit_rows(b)[match(a, b)], axis=1)


def unit_rows(rows: Float[np.ndarray, "K D"]) -> Float[np.ndarray, "K D"]:
    """The rows at length 1, in float64; a row of zeros stays one."""
    rows = np.asarray(rows, np.float64)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)
