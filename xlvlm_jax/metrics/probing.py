"""Sparse probing: can a few concepts tell an attribute?

The k concepts that separate samples with a value of an attribute from those with another best are
chosen by the difference of means in units of the standard deviation,

    s = |mean over positive - mean over negative| / deviation over all

and a logistic regression on these k is fitted to some samples and tested on others. If k = 1 does
as well as the model's own states, a single concept says it. Both classes weigh the same, so that
chance is .5 whatever their sizes. Feature splitting counts how many concepts share a value: while
one more raises the F1 of the probe by more than a threshold, it is one of them.

Source: Gurnee et al. 2023, "Finding neurons in a haystack"; Karvonen et al. 2025, "SAEBench"
(arXiv 2503.09532); splitting: Chanin et al. 2024, "A is for absorption" (arXiv 2409.14507).

N samples, K concepts, D width.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

SPLIT_GAIN = 0.03  # of F1, from which on one more concept counts
MOST = 10  # concepts that a value is split into


class Probe(NamedTuple):
    """A linear classifier: positive where rows @ weights + bias > 0."""

    weights: Float[np.ndarray, " D"]
    bias: float

    def says(self, rows: Float[np.ndarray, "N D"]) -> Bool[np.ndarray, " N"]:
        """Returns which rows are classified as positive."""
        return rows @ self.weights + self.bias > 0


def separation(
    codes: Float[np.ndarray, "N K"], positive: Bool[np.ndarray, " N"]
) -> Float[np.ndarray, " K"]:
    """Returns how far apart the codes of two classes are, in standard deviations, with a sign.

    Args:
        codes: float[N, K].
        positive: bool[N].

    Returns:
        float64[K]; 0 for a concept that does not vary.

    Raises:
        ValueError: the numbers of rows differ, or one of the classes is empty.
    """
    _check(codes, positive)
    codes = np.asarray(codes, np.float64)
    deviation = codes.std(axis=0)
    apart = codes[positive].mean(axis=0) - codes[~positive].mean(axis=0)
    # A constant has a deviation of rounding errors.
    varies = deviation > 1e-12 * np.abs(codes).max(axis=0)
    return np.where(varies, apart / np.where(varies, deviation, 1), 0.0)


def best_concepts(
    codes: Float[np.ndarray, "N K"], positive: Bool[np.ndarray, " N"], count: int
) -> Int[np.ndarray, " k"]:
    """Returns the concepts of largest separation, best first; ties go to the first.

    Args:
        codes: float[N, K].
        positive: bool[N].
        count: k; all concepts if there are fewer.

    Raises:
        ValueError: as for `separation`, or count is below 1.
    """
    if count < 1:
        raise ValueError(f"a probe needs at least one concept, got {count}")
    return np.argsort(-np.abs(separation(codes, positive)), kind="stable")[:count]


def fit_probe(rows: Float[np.ndarray, "N D"], positive: Bool[np.ndarray, " N"]) -> Probe:
    """Fits a logistic regression in which both classes weigh the same.

    Columns are divided by their standard deviation first, and the penalty (scikit-learn's C = 1) is
    of the weights of the scaled columns.

    Args:
        rows: float[N, D], codes or states.
        positive: bool[N].

    Raises:
        ValueError: the numbers of rows differ, or one of the classes is empty.
    """
    from sklearn.linear_model import LogisticRegression

    _check(rows, positive)
    rows = np.asarray(rows, np.float64)
    mean, scale = rows.mean(axis=0), rows.std(axis=0)
    scale = np.where(scale > 0, scale, 1)
    fitted = LogisticRegression(class_weight="balanced", max_iter=300)
    fitted.fit((rows - mean) / scale, positive)
    weights, bias = np.asarray(fitted.coef_)[0] / scale, np.asarray(fitted.intercept_)[0]
    return Probe(weights, float(bias - mean @ weights))


def balanced_accuracy(positive: Bool[np.ndarray, " N"], said: Bool[np.ndarray, " N"]) -> float:
    """Returns the mean of the shares of positive and of negative samples that are classified so.

    Args:
        positive: bool[N], the truth.
        said: bool[N], the classification.

    Returns:
        a number in [0, 1]; 1/2 for a guess.

    Raises:
        ValueError: the numbers of samples differ, or one of the classes is empty.
    """
    _check(said, positive)
    # scikit-learn's takes a hundred times as long, and pairs of values are many.
    hit, spared = np.mean(said[positive]), 1 - np.mean(said[~positive])
    return float((hit + spared) / 2)


def sparse_probing(
    codes: Float[np.ndarray, "N K"],
    positive: Bool[np.ndarray, " N"],
    test_codes: Float[np.ndarray, "M K"],
    test_positive: Bool[np.ndarray, " M"],
    count: int = 1,
) -> float:
    """Returns the balanced accuracy of a probe on the k concepts that separate two classes best.

    Concepts are chosen and the probe is fitted on the first samples, and tested on the others.

    Args:
        codes: float[N, K], to fit the probe.
        positive: bool[N], which of them have the value of the attribute.
        test_codes: float[M, K].
        test_positive: bool[M].
        count: k.

    Returns:
        a number in [0, 1]; 1/2 for codes that say nothing.

    Raises:
        ValueError: the numbers of rows or concepts differ, one of the classes is empty, or count is
            below 1.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import metrics
        >>> codes = np.float32([[0, 5], [0, 4], [9, 5], [8, 4]])
        >>> positive = np.array([False, False, True, True])
        >>> metrics.sparse_probing(codes, positive, codes, positive, count=1)
        1.0
    """
    if codes.shape[1] != test_codes.shape[1]:
        raise ValueError(
            f"the probe is fitted on {codes.shape[1]} concepts but tested on "
            f"{test_codes.shape[1]}; encode both with the same dictionary"
        )
    chosen = best_concepts(codes, positive, count)
    said = fit_probe(codes[:, chosen], positive).says(np.asarray(test_codes)[:, chosen])
    return balanced_accuracy(test_positive, said)


def split_concepts(
    codes: Float[np.ndarray, "N K"],
    positive: Bool[np.ndarray, " N"],
    *,
    gain: float = SPLIT_GAIN,
    most: int = MOST,
) -> Int[np.ndarray, " k"]:
    """Returns the concepts that share a value of an attribute: one, unless the value is split.

    Args:
        codes: float[N, K].
        positive: bool[N], which of them have the value.
        gain: of F1 by one more concept, from which on the value is split further.
        most: maximum number of concepts.

    Returns:
        int[k], in the order of their separation, at least one.

    Raises:
        ValueError: as for `separation`, or most is below 1.
    """
    from sklearn.metrics import f1_score

    ranked = best_concepts(codes, positive, most)
    codes = np.asarray(codes)

    def f1(k: int) -> float:
        some = codes[:, ranked[:k]]
        return float(f1_score(positive, fit_probe(some, positive).says(some)))

    count, reached = 1, f1(1)
    while count < len(ranked):
        following = f1(count + 1)
        if following - reached <= gain:
            break
        count, reached = count + 1, following
    return ranked[:count]


def _check(rows: np.ndarray, positive: np.ndarray) -> None:
    if len(rows) != len(positive):
        raise ValueError(
            f"there are {len(rows)} rows but {len(positive)} labels; expected one each"
        )
    if positive.all() or not positive.any():
        raise ValueError(
            f"{int(positive.sum())} of {len(positive)} samples have the value; a probe needs some "
            "with it and some without"
        )
