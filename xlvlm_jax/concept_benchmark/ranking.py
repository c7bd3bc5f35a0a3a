"""Ranks dictionaries by their scores, and tells whether the ranking holds over seeds.

E dictionaries, S seeds, J measures.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float


def rank(values: Float[np.ndarray, "E J"], higher: Sequence[bool]) -> Float[np.ndarray, "E J"]:
    """Returns the place of each dictionary by each measure, 1 for the best; ties share the mean.

    Args:
        values: float[E, J]; NaN is last.
        higher: for each measure whether higher is better.

    Raises:
        ValueError: there is another number of directions than of measures.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import concept_benchmark
        >>> values = np.array([[0.9, 0.3], [0.5, 0.1], [0.5, np.nan]])
        >>> concept_benchmark.rank(values, [True, False]).tolist()
        [[1.0, 2.0], [2.5, 1.0], [2.5, 3.0]]
    """
    from scipy.stats import rankdata

    if values.ndim != 2 or values.shape[1] != len(higher):
        raise ValueError(
            f"values have shape {values.shape} for {len(higher)} measures; expected [E, J]"
        )
    losses = np.where(higher, -values, values)
    return rankdata(np.float64(np.where(np.isnan(losses), np.inf, losses)), axis=0)


def agreement(scores: Float[np.ndarray, "S E"]) -> float:
    """Returns Kendall's tau-b of the order of dictionaries, mean over pairs of seeds.

    Args:
        scores: float[S, E], a score or rank of each dictionary for each seed.

    Returns:
        a number in [-1, 1], 1 if the order is the same for all seeds and 0 for chance; NaN for a
        single seed or dictionary, or if all are alike.

    Source: Kendall 1945, "The treatment of ties in ranking problems".

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import concept_benchmark
        >>> concept_benchmark.agreement(np.array([[0.1, 0.2, 0.3], [0.2, 0.1, 0.3]])).__round__(3)
        0.333
    """
    from scipy.stats import kendalltau

    tau: Any = kendalltau
    pairs = [
        float(tau(a, b).statistic)
        for a, b in combinations(scores, 2)
        if len(a) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0
    ]
    return float(np.mean(pairs)) if pairs else float("nan")
