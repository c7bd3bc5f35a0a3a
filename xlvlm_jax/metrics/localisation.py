"""Localisation: does a map point at what it should, on pictures whose contents are known?

    pointing   whether the highest cell lies in the region
    AUC        how often a pixel of the region lies in a higher cell than another pixel; ties count
               half, so that a constant map has .5

Source: pointing game, Zhang et al. 2016, "Top-down neural attention by excitation backprop".

N pictures, C cells of a picture, n rows, K columns.
"""

import numpy as np
from jaxtyping import Bool, Float, Num


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

    return rankdata(values, axis=0)


def rank_auc(
    ranks: Float[np.ndarray, "n K"], positive: Bool[np.ndarray, " n"]
) -> Float[np.ndarray, " K"]:
    """Returns the area under the ROC curve of each column, from its ranks.

    Args:
        ranks: float[n, K], of `ranks`, computed once for many classes.
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
    if len(ranks) != len(positive) or not p or not n:
        raise ValueError(
            f"{len(ranks)} rows have {p} positive and {n} negative labels; expected some of both"
        )
    return (ranks[positive].sum(axis=0) - p * (p + 1) / 2) / (p * n)
