"""Localisation: does a map point at what it should, on pictures whose contents are known?

    pointing   whether the highest cell lies in the region
    AUC        how often a pixel of the region lies in a higher cell than another pixel; ties count
               half, so that a constant map has .5

Source: pointing game, Zhang et al. 2016, "Top-down neural attention by excitation backprop".

N pictures, C cells of a picture, n rows, K columns.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Num
from scipy import sparse


def pointing(
    values: Float[np.ndarray, "N C"], inside: Bool[np.ndarray, "N C"]
) -> Float[np.ndarray, " N"]:
    """Returns whether the highest cell of each picture lies in its region.

    Args:
        values: float[N, C].
        inside: bool[N, C], which cells lie in the region.

    Returns:
        float[N]: 1 or 0; where several cells are the highest, the share of them that is inside, so
        that a constant map scores as the region's size.

    Raises:
        ValueError: the shapes differ.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import metrics
        >>> inside = np.array([[True, False], [True, False]])
        >>> metrics.pointing(np.float32([[3, 1], [0, 0]]), inside).tolist()
        [1.0, 0.5]
    """
    if values.shape != inside.shape:
        raise ValueError(
            f"values have shape {values.shape} and regions {inside.shape}; expected the same"
        )
    highest = values == values.max(axis=1, keepdims=True)
    return (highest & inside).sum(axis=1) / highest.sum(axis=1)


def picture_auc(
    values: Float[np.ndarray, "N C"],
    inside: Num[np.ndarray, "N C"],
    outside: Num[np.ndarray, "N C"],
) -> Float[np.ndarray, " N"]:
    """Returns the area under the ROC curve of the pixels of each picture.

    Args:
        values: float[N, C], one per cell; all pixels of a cell share it.
        inside: numbers[N, C], how many pixels of each cell are in the region.
        outside: numbers[N, C], how many are not.

    Returns:
        float64[N]; NaN for a picture whose pixels are all inside, or all outside.

    Raises:
        ValueError: the shapes differ.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import metrics
        >>> values = np.float32([[3, 1, 2]])
        >>> metrics.picture_auc(values, np.array([[4, 0, 0]]), np.array([[0, 4, 4]])).tolist()
        [1.0]
    """
    if not values.shape == inside.shape == outside.shape:
        raise ValueError(
            f"values have shape {values.shape}, pixels {inside.shape} and {outside.shape}; "
            "expected the same"
        )
    inside, outside = inside.astype(np.float64), outside.astype(np.float64)
    above = np.sign(values[:, :, None] - values[:, None, :]) / 2 + 0.5
    pairs = inside.sum(axis=1) * outside.sum(axis=1)
    won = np.einsum("ni,nj,nij->n", inside, outside, above, optimize=True)
    return np.where(pairs > 0, won / np.where(pairs > 0, pairs, 1), np.nan)


def ranks(values: Float[np.ndarray, "n K"]) -> Float[np.ndarray, "n K"]:
    """Returns the rank of each value in its column, from 1; ties share their mean."""
    from scipy.stats import rankdata

    # From 1.18 on, SciPy ranks float32 in float32, which has no ranks beyond 2^24.
    return rankdata(np.asarray(values, np.float64), axis=0)


class SparseRanks(NamedTuple):
    """Ranks in columns most of whose values are zero."""

    zero: Float[np.ndarray, " K"]  # the rank of the zeros of each column
    # scipy.sparse.csc_array, float64[n, K]: ranks of the other values, less that of the zeros.
    beyond: Any


def sparse_ranks(values: Any) -> SparseRanks:
    """Returns the rank of each value in its column, as `ranks`, from the values that are not zero.

    Args:
        values: float[n, K], scipy.sparse.csr_array or csc_array.

    Examples:
        >>> import numpy as np
        >>> from scipy import sparse
        >>> from xlvlm_jax.metrics import localisation
        >>> found = localisation.sparse_ranks(sparse.csr_array(np.float32([[0], [3], [0], [-1]])))
        >>> (found.beyond.toarray() + found.zero).ravel().tolist()
        [2.5, 4.0, 2.5, 1.0]
    """
    columns: Any = sparse.csc_array(values, copy=True)
    columns.eliminate_zeros()
    (n, K), counts = columns.shape, np.diff(columns.indptr)
    column = np.repeat(np.arange(K), counts)
    order = np.lexsort((columns.data, column))
    data, column = columns.data[order], column[order]
    starts = np.ones(len(data), bool)  # of runs of equal values
    starts[1:] = (data[1:] != data[:-1]) | (column[1:] != column[:-1])
    first, run = np.flatnonzero(starts), np.cumsum(starts) - 1
    lengths = np.diff(np.append(first, len(data)))
    own = (first - columns.indptr[column[first]] + (lengths + 1) / 2)[run]
    zeros = n - counts
    zero = np.bincount(column, data < 0, K) + (zeros + 1) / 2
    beyond = np.empty(len(data))
    beyond[order] = own + np.where(data > 0, zeros[column], 0) - zero[column]
    made = sparse.csc_array((beyond, columns.indices, columns.indptr), shape=(n, K))
    return SparseRanks(zero, made)


def rank_auc(
    ranks: Float[np.ndarray, "n K"] | SparseRanks, positive: Bool[np.ndarray, " n"]
) -> Float[np.ndarray, " K"]:
    """Returns the area under the ROC curve of each column, from its ranks.

    Args:
        ranks: float[n, K], of `ranks` or `sparse_ranks`, computed once for many classes.
        positive: bool[n].

    Returns:
        float64[K]: how often a positive row exceeds another one; ties count half.

    Raises:
        ValueError: the numbers of rows differ, or all or no rows are positive.

    Source: Mann and Whitney 1947.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax.metrics import localisation
        >>> ranks = localisation.ranks(np.float32([[1, 0], [3, 0], [2, 0]]))
        >>> localisation.rank_auc(ranks, np.array([False, True, False])).tolist()
        [1.0, 0.5]
    """
    p, n = int(positive.sum()), int((~positive).sum())
    is_sparse = isinstance(ranks, SparseRanks)
    rows = ranks.beyond.shape[0] if is_sparse else len(ranks)
    if rows != len(positive) or not p or not n:
        raise ValueError(
            f"{rows} rows have {p} positive and {n} negative labels; expected some of both"
        )
    if is_sparse:
        total = positive.astype(np.float64) @ ranks.beyond + p * ranks.zero
    else:
        total = ranks[positive].sum(axis=0)
    return (total - p * (p + 1) / 2) / (p * n)
