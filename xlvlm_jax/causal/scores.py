"""Scores of concepts from what their edits change: does a concept cause what its words say?

    score = own / (|own| + others)

`own` is the mean change of the log-probabilities of a concept's own words, where changes by an
ablation count with the opposite sign; `others` is the mean size of the changes of other words that
are as likely without the edit. Sizes do not cancel: a word list that is off the concept scores near
0, however its few changes add up. The score is 1 if only the own words move, and in the direction
of the edit, and 1/2 if all words move alike.

K concepts, N samples, W words.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from xlvlm_jax.causal.words import matched_words


@dataclasses.dataclass(frozen=True)
class CausalScores:
    """A causal score for every concept; NaN for a concept without words.

    Attributes:
        score: float[K], share of the effect on the concept's own words, in [-1, 1].
        low: float[K], lower end of the bootstrap interval over samples.
        high: float[K], its upper end.
        null: float[K], mean score of shuffled words.
        null_high: float[K], the score that `confidence` of the lists of shuffled words stay below.
        own: float[K], mean change of the own words' log-probabilities, in nats.
        others: float[K], mean size of the changes of the matched other words, in nats.
        confidence: of interval and null.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import causal
        >>> changes = np.zeros((1, 2, 4), "float32")  # one concept, two samples, four words
        >>> changes[0, :, 0] = 2.0  # only the first word moves
        >>> found = causal.causal_scores(changes, [[0]], np.arange(4.0))
        >>> found.score.tolist(), found.low.tolist(), found.null_high.tolist()
        ([1.0], [1.0], [0.0])
        >>> found.includes_null.tolist()
        [False]
    """

    score: Float[np.ndarray, " K"]
    low: Float[np.ndarray, " K"]
    high: Float[np.ndarray, " K"]
    null: Float[np.ndarray, " K"]
    null_high: Float[np.ndarray, " K"]
    own: Float[np.ndarray, " K"]
    others: Float[np.ndarray, " K"]
    confidence: float = 0.95

    @property
    def includes_null(self) -> Bool[np.ndarray, " K"]:
        """bool[K]: whether the interval reaches into the scores of shuffled words."""
        return ~(self.low > self.null_high)


def share(own: ArrayLike, others: ArrayLike) -> np.ndarray:
    """Returns own / (|own| + others), elementwise; 0 where nothing changes.

    Runs on the host and cannot be traced.

    Args:
        own: mean changes of the own words.
        others: mean sizes of the changes of other words, of the same shape.

    Examples:
        >>> from xlvlm_jax import causal
        >>> causal.share([3.0, -1.0, 0.0], [1.0, 0.0, 0.0]).tolist()
        [0.75, -1.0, 0.0]
    """
    own, others = np.asarray(own, np.float64), np.asarray(others, np.float64)
    total = np.abs(own) + others
    return np.divide(own, total, out=np.zeros_like(total), where=total > 0)


def causal_scores(
    changes: Float[Any, "K N W"],
    own: Sequence[Sequence[int]],
    likelihood: Float[Any, " W"],
    *,
    num_matched: int = 3,
    num_shuffles: int = 100,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> CausalScores:
    """Scores concepts by the share of their effect that is on their own words.

    Runs on the host and cannot be traced.

    Args:
        changes: float[K, N, W], the change of each word's log-probability in each sample, as the
            mean over the concept's edits; those by ablations with the opposite sign.
        own: for each concept the indices of its words.
        likelihood: float[W], mean log-probability of each word without an edit, by whose rank
            other words are matched (see `matched_words`).
        num_matched: number of other words per own word.
        num_shuffles: number of lists of as many other words that each concept's null is made of.
        num_resamples: resamples of the bootstrap over samples.
        confidence: of the interval (percentiles) and of the null.
        seed: random seed of both.

    Returns:
        The scores.

    Raises:
        ValueError: there are fewer than two samples, shapes do not fit together, or changes are not
            finite.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import causal
        >>> changes = np.float32([[[2, 0, -1, 0], [4, 0, -1, 0]]])
        >>> causal.causal_scores(changes, [[0]], np.zeros(4), num_matched=2).score.tolist()
        [0.8571428571428571]
    """
    from scipy import stats

    changes, likelihood = np.asarray(changes, np.float64), np.asarray(likelihood)
    K, N, W = changes.shape if changes.ndim == 3 else (-1, -1, -1)
    if len(own) != K or likelihood.shape != (W,):
        raise ValueError(
            f"changes have shape {changes.shape} for {len(own)} concepts and likelihoods of shape "
            f"{likelihood.shape}; expected [K, N, W] and [W]"
        )
    if N < 2:
        raise ValueError(f"an interval needs at least two samples; got {N}")
    if not np.isfinite(changes).all():
        raise ValueError("changes of log-probabilities hold NaN or Inf; check the strengths")
    random = np.random.default_rng(seed)
    columns: dict[str, np.ndarray] = {
        field.name: np.full(K, np.nan)
        for field in dataclasses.fields(CausalScores)
        if field.name != "confidence"
    }
    for k, mine in enumerate(own):
        others = matched_words(likelihood, mine, num_matched=num_matched)
        if not len(mine) or not others:
            continue
        pairs = changes[k][:, mine].mean(1), np.abs(changes[k][:, others]).mean(1)
        means = [float(values.mean()) for values in pairs]
        interval = stats.bootstrap(
            pairs,
            lambda a, b, axis=-1: share(a.mean(axis), b.mean(axis)),
            paired=True,
            vectorized=True,
            n_resamples=num_resamples,
            confidence_level=confidence,
            method="percentile",
            rng=random,
        ).confidence_interval
        null = _null(changes[k], mine, likelihood, num_matched, num_shuffles, random)
        found = {
            "score": float(share(*means)),
            "low": interval.low,
            "high": interval.high,
            "null": null.mean() if len(null) else np.nan,
            "null_high": np.quantile(null, confidence) if len(null) else np.nan,
            "own": means[0],
            "others": means[1],
        }
        for name, value in found.items():
            columns[name][k] = value
    return CausalScores(**columns, confidence=confidence)


def _null(
    changes: Float[np.ndarray, "N W"],
    own: Sequence[int],
    likelihood: Float[np.ndarray, " W"],
    num_matched: int,
    num_shuffles: int,
    random: np.random.Generator,
) -> Float[np.ndarray, " S"]:
    """Returns the scores of lists of words that are not the concept's."""
    means, sizes = changes.mean(0), np.abs(changes).mean(0)
    pool = np.setdiff1d(np.arange(len(means)), own)
    count = min(len(own), len(pool) // 2)  # some are left to compare with
    scores = []
    for _ in range(num_shuffles if count else 0):
        drawn = random.choice(pool, count, replace=False)
        others = matched_words(likelihood, drawn.tolist(), without=own, num_matched=num_matched)
        scores.append(share(means[drawn].mean(), sizes[others].mean()))
    return np.array(scores)


def loss_recovered(own: Any, spliced: Any, ablated: Any) -> Any:
    """Returns the share of the loss that a reconstruction recovers, as SAEBench defines it.

    (ablated - spliced) / (ablated - own): 1 if the reconstruction is as good as the states, 0 if it
    is no better than the ablation. Works under jit, vmap and grad.

    Args:
        own: the model's own loss, a number or an array.
        spliced: the loss with reconstructed states.
        ablated: the loss with zeros, or mean states, in their place.

    Returns:
        The share; NaN or infinite where the ablation changes nothing.

    Karvonen et al. 2025, "SAEBench" (arXiv 2503.09532).

    Examples:
        >>> from xlvlm_jax import causal
        >>> causal.loss_recovered(own=1.0, spliced=1.5, ablated=3.0)
        0.75
    """
    return (ablated - spliced) / (ablated - own)


def rank_correlation(cheap: ArrayLike, true: ArrayLike) -> float:
    """Returns Spearman's rank correlation of estimated with true effects.

    Runs on the host and cannot be traced.

    Args:
        cheap: estimated effects, of any shape.
        true: true effects, of the same shape.

    Returns:
        In [-1, 1]; NaN if one of them is constant or there are fewer than two.

    Examples:
        >>> from xlvlm_jax import causal
        >>> causal.rank_correlation([0.1, 0.2, 5.0], [1.0, 2.0, 3.0])
        1.0
    """
    from scipy import stats

    cheap, true = np.ravel(cheap), np.ravel(true)
    if len(cheap) < 2 or np.ptp(cheap) == 0 or np.ptp(true) == 0:
        return float("nan")
    found: Any = stats.spearmanr(cheap, true)
    return float(found.statistic)


def auc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Returns the area under the ROC curve: how often a positive score exceeds a negative one.

    Ties count half. Runs on the host and cannot be traced.

    Args:
        positive: scores that should be high, such as those of true words.
        negative: scores that should be low, such as those of shuffled words.

    Examples:
        >>> from xlvlm_jax import causal
        >>> causal.auc([2.0, 3.0], [1.0, 2.0])
        0.875
    """
    positive, negative = np.asarray(positive)[:, None], np.asarray(negative)[None]
    return float(np.mean((positive > negative) + 0.5 * (positive == negative)))


def signs(add: Sequence[float], ablate: Sequence[float]) -> Float[np.ndarray, " S"]:
    """Returns the sign with which each edit of a concept should move its own words.

    Runs on the host and cannot be traced.

    Args:
        add: strengths of additions.
        ablate: fractions removed.

    Returns:
        1 for what strengthens the concept, -1 for what weakens it.

    Examples:
        >>> from xlvlm_jax import causal
        >>> causal.signs([0.1, -0.1], [1.0]).tolist()
        [1.0, -1.0, -1.0]
    """
    return np.sign(np.asarray([*add, *(-fraction for fraction in ablate)], np.float32))


def as_json(scores: CausalScores) -> dict[str, Any]:
    """Returns the scores as JSON values, a list per field."""
    described: dict[str, Any] = {"confidence": scores.confidence}
    for field in dataclasses.fields(scores):
        if field.name != "confidence":
            described[field.name] = numbers(getattr(scores, field.name))
    return described | {"includes_null": scores.includes_null.tolist()}


def numbers(values: Float[np.ndarray, " N"]) -> list[float | None]:
    """Returns JSON numbers with six digits; None for NaN."""
    return [round(value, 6) if math.isfinite(value) else None for value in map(float, values)]
