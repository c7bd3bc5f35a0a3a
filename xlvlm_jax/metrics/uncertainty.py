"""How sure a score is: bootstrap intervals over pictures, and exact tests of paired answers.

N answers about I pictures, C counts, S scores.

Answers about one picture depend on each other, so the bootstrap draws pictures, with all their
answers, and not answers (a cluster bootstrap; Field and Welsh 2007). Scores are ratios of sums,
such as right answers / answers: the counts of each picture are summed once, and a draw weighs them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

LEVEL, RESAMPLES = 0.95, 1000


class Interval(NamedTuple):
    """An interval that holds a score with the stated confidence; NaN where it is undefined.

    Attributes:
        low: its lower end.
        high: its upper end.
    """

    low: float
    high: float


def bootstrap(
    counts: Float[np.ndarray, "N C"],
    groups: Sequence[str],
    scores: Callable[[Float[np.ndarray, "R C"]], Mapping[str, Float[np.ndarray, " R"]]],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Returns percentile intervals of scores (Efron 1979).

    Args:
        counts: float[N, C], what each answer adds to the counts that the scores are made of.
        groups: the picture of each answer, which is drawn as a whole.
        scores: takes sums of counts, float[R, C], and returns {score: float[R]}; a row in which a
            score is NaN has no value of it.
        level: the confidence, in (0, 1).
        resamples: R, the number of draws.
        seed: random seed of the draws.

    Returns:
        {score: interval}; NaN if all answers are about one picture, which says nothing of others.

    Raises:
        ValueError: there are no answers, the numbers differ, or the level is not within (0, 1).

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax.metrics import bootstrap
        >>> right = np.float64([[1, 1], [1, 1], [0, 1], [1, 1]])  # right answers, answers
        >>> bootstrap(right, list("abcd"), lambda x: {"accuracy": x[:, 0] / x[:, 1]})["accuracy"]
        Interval(low=0.25, high=1.0)
    """
    if not len(counts) or len(counts) != len(groups):
        raise ValueError(
            f"there are {len(counts)} answers and {len(groups)} groups; expected a group per "
            "answer, at least one"
        )
    if not 0 < level < 1:
        raise ValueError(f"the level is {level}; expected a confidence between 0 and 1")
    _, belongs = np.unique(np.asarray(groups), return_inverse=True)
    number = int(belongs.max()) + 1
    sums = np.zeros((number, counts.shape[1]))
    np.add.at(sums, belongs, counts)
    drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = scores(drawn @ sums)
    if number == 1:
        return {name: Interval(float("nan"), float("nan")) for name in values}
    ends = [50 * (1 - level), 50 * (1 + level)]
    return {name: _interval(np.asarray(each), ends) for name, each in values.items()}


def _interval(values: np.ndarray, ends: Sequence[float]) -> Interval:
    known = values[np.isfinite(values)]
    if not len(known):
        return Interval(float("nan"), float("nan"))
    low, high = np.percentile(known, ends)
    return Interval(float(low), float(high))


class McNemar(NamedTuple):
    """How two sets of answers to the same questions differ.

    Attributes:
        lost: number of answers that are right in the first condition only.
        gained: number of answers that are right in the second only.
        p_value: of an exact two-sided test that both are equally likely.
    """

    lost: int
    gained: int
    p_value: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Tests whether one of two sets of answers is right more often (McNemar 1947).

    The exact test: of the questions that only one side answers right, each side has half.

    Args:
        first, second: whether each of N answers is right.

    Returns:
        The discordant pairs and the p value; 1 if there are none.

    Raises:
        ValueError: the numbers of answers differ.

    Examples:
        >>> from xlvlm_jax.metrics import mcnemar
        >>> mcnemar([True, False, False, False, True], [True, True, True, True, True])
        McNemar(lost=0, gained=3, p_value=0.25)
    """
    from scipy.stats import binomtest  # takes a second to import

    if len(first) != len(second):
        raise ValueError(
            f"there are {len(first)} and {len(second)} answers; expected the same questions"
        )
    pairs = list(zip(map(bool, first), map(bool, second), strict=True))
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    p_value = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    return McNemar(lost, gained, float(p_value))
