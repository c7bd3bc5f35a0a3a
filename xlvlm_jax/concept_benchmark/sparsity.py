"""Makes dictionaries equally sparse, so that none explains more because it uses more concepts.

M rows, K concepts, D width.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from xlvlm_jax import sae
from xlvlm_jax.concepts.decomposition import project
from xlvlm_jax.concepts.encoding import encode
from xlvlm_jax.concepts.methods import method_named
from xlvlm_jax.concepts.record import Concepts

DENSE = 2**26  # codes that are computed together
SEARCHED = 4096  # rows, spread evenly, that a penalty is searched on
CLOSE = 0.02  # deviation of the mean L0 at which the search for a penalty ends
STEPS = 20
FIRST_FACTOR = 1.5  # by which a penalty changes before there are two to draw a line through
LEAST = 1e-6  # of the first penalty, below which there is none


def with_mean_l0(concepts: Concepts, rows: Float[np.ndarray, "M D"], k: int) -> Concepts:
    """Returns a dictionary that uses k concepts per row on average.

    Its components and its encoder stay. The thresholds of a sparse autoencoder are multiplied by
    one factor (one that is not positive first gets the least positive one), and the penalty that
    snmf encodes with is found by regula falsi. Other dictionaries are returned as they are. Where
    fewer than k codes per row are positive without any threshold or penalty, there is none.

    Args:
        concepts: the dictionary.
        rows: float[M, D], states; others than those that are tested on.
        k: mean number of codes other than zero per row.

    Raises:
        ValueError: k is not in 1..K, there are no rows, or as for `project`.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import Concepts, concept_benchmark, sae
        >>> params = {"W_enc": np.eye(2), "W_dec": np.eye(2), "b_enc": [0, 0], "b_dec": [0, 0]}
        >>> params["threshold"] = [9, 9]  # above all that rows reach
        >>> silent = sae.Dictionary.of(params, sae.Settings("batchtopk"))
        >>> rows = np.float32([[3, 1], [5, 2]])
        >>> found = concept_benchmark.with_mean_l0(Concepts.from_dictionary(silent), rows, 1)
        >>> found.dictionary.encode(rows).tolist()
        [[3.0, 0.0], [5.0, 0.0]]
    """
    K = len(concepts.components)
    if not 1 <= k <= K:
        raise ValueError(f"k is {k}; expected 1 to the {K} concepts")
    if not len(rows):
        raise ValueError("there are no rows to count codes of; expected one or more")
    dictionary = concepts.dictionary
    if dictionary is not None and "threshold" in dictionary.params:
        found = _with_thresholds(dictionary, rows, k)
        return dataclasses.replace(concepts, dictionary=found)
    if dictionary is not None or not method_named(concepts.method).is_sparse:
        return concepts
    alpha = _penalty(concepts, rows, k)
    return dataclasses.replace(concepts, options={**concepts.options, "alpha": alpha})


def _with_thresholds(
    dictionary: sae.Dictionary, rows: Float[np.ndarray, "M D"], k: int
) -> sae.Dictionary:
    given = np.asarray(dictionary.params["threshold"], np.float32)
    # Zero times a factor stays zero.
    positive = given[given > 0]
    unit = np.where(given > 0, given, positive.min() if positive.size else 1).astype(np.float32)

    def scaled(factor: float) -> sae.Dictionary:
        params = dictionary.params | {
            "threshold": (unit * factor).astype(dictionary.params["threshold"].dtype)
        }
        return dataclasses.replace(dictionary, params=params)

    # The largest k codes per row and the one after them, without all codes in memory at once.
    bare, count = scaled(0.0), k * len(rows) + 1
    largest = np.zeros(1)
    size = max(DENSE // len(given), 1)
    for at in range(0, len(rows), size):
        values = (np.asarray(encode(bare, rows[at : at + size]), np.float64) / unit).reshape(-1)
        if len(largest) == count:
            values = values[values > largest.min()]
        largest = np.concatenate([largest, values])
        if len(largest) > count:
            largest = np.partition(largest, -count)[-count:]
    last, first = np.partition(largest, 1)[:2]  # the largest that is left out, the smallest kept
    return scaled((last + first) / 2)


def _penalty(concepts: Concepts, rows: Float[np.ndarray, "M D"], k: int) -> float:
    """Returns the alpha at which rows have k codes on average; lines in logarithms of both."""

    def excess(alpha: float) -> float:
        """Returns log L0 - log k."""
        options = {**concepts.options, "alpha": alpha}
        codes = project(rows, dataclasses.replace(concepts, options=options))
        return math.log(max(np.count_nonzero(np.asarray(codes)), 0.5) / (k * len(rows)))

    if len(rows) > SEARCHED:
        rows = rows[np.linspace(0, len(rows) - 1, SEARCHED).astype(int)]
    close = CLOSE / k
    alpha = float(concepts.options.get("alpha", 1.0))
    if alpha <= 0:
        largest = np.max(rows @ np.asarray(concepts.components, np.float32).T, axis=1).mean()
        alpha = float(max(largest, 1e-30)) / 10
    above: tuple[float, float] | None = None  # (log alpha, excess) with too many codes
    below: tuple[float, float] | None = None
    x = lowest = math.log(alpha)
    lowest += math.log(LEAST)
    for step in range(STEPS):
        if x < lowest:
            return 0.0
        y = excess(math.exp(x))
        if abs(y) <= close:
            break
        if y > 0:
            above = x, y
        else:
            below = x, y
        if above is None or below is None:
            # Further each time, for an alpha that is far off.
            x += math.copysign(math.log(FIRST_FACTOR) * 2**step, y)
            continue
        share = above[1] / (above[1] - below[1])
        x = above[0] + min(max(share, 0.1), 0.9) * (below[0] - above[0])
    return math.exp(x)
