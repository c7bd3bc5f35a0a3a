"""Bootstrap intervals and McNemar's test: by hand, against scipy, and messages."""

import math

import numpy as np
import pytest
from scipy import stats

from xlvlm_jax.metrics import bootstrap, chair_counts, chair_scores, mcnemar, pope_counts


def accuracy(sums):
    return {"accuracy": sums[:, 0] / sums[:, 1], "recall": sums[:, 0] / sums[:, 2]}


def test_intervals_of_independent_answers_are_those_of_scipy():
    right = np.random.default_rng(0).random(300) < 0.8
    counts = np.stack([right, np.ones(300), right], axis=1).astype(float)
    found = bootstrap(counts, [str(i) for i in range(300)], accuracy, resamples=4000)
    theirs = stats.bootstrap(
        (right.astype(float),), np.mean, n_resamples=4000, method="percentile", rng=1
    ).confidence_interval
    np.testing.assert_allclose(found["accuracy"], theirs, atol=0.006)
    assert found["recall"] == (1, 1)


def test_pictures_are_drawn_whole():
    # Two pictures whose answers agree: a draw has both of one, of the other, or one of each.
    counts = np.float64([[1, 1, 1], [1, 1, 1], [0, 1, 1], [0, 1, 1]])
    found = bootstrap(counts, ["a", "a", "b", "b"], accuracy)
    assert found["accuracy"] == (0, 1)
    alone = bootstrap(counts, ["a", "b", "c", "d"], accuracy, level=0.5)
    assert 0 < alone["accuracy"].low < alone["accuracy"].high < 1


def test_more_answers_narrow_the_interval():
    rng = np.random.default_rng(0)
    widths = []
    for number in (50, 500):
        right = rng.random(number) < 0.5
        counts = np.stack([right, np.ones(number), right], axis=1).astype(float)
        low, high = bootstrap(counts, [str(i) for i in range(number)], accuracy)["accuracy"]
        assert low < right.mean() < high
        widths.append(high - low)
    assert widths[1] < 0.5 * widths[0]


def test_a_score_that_is_undefined_in_some_draws():
    counts = chair_counts([["dog"], []], [{"dog"}, {"cat"}])
    found = bootstrap(counts, ["a", "b"], chair_scores)
    assert found["chair_i"] == (0, 0)  # of the draws with a mention
    nothing = bootstrap(chair_counts([[], []], [{"dog"}, {"cat"}]), ["a", "b"], chair_scores)
    assert np.isnan(nothing["chair_i"]).all() and nothing["recall"] == (0, 0)


def test_mcnemar_by_hand():
    # Ten questions: two wrong before only, six wrong after only.
    first = [False] * 2 + [True] * 6 + [True, False]
    second = [True] * 2 + [False] * 6 + [True, False]
    expected = 2 * sum(stats.binom.pmf(k, 8, 0.5) for k in range(3))
    lost, gained, p_value = mcnemar(first, second)
    assert (lost, gained) == (6, 2) and p_value == pytest.approx(expected)
    assert mcnemar(second, first) == (2, 6, p_value)
    assert mcnemar(first, first) == (0, 0, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mcnemar([True], []), "1 and 0 answers; expected the same questions"),
        (lambda: bootstrap(np.zeros((0, 3)), [], accuracy), "0 answers and 0 groups; expected a"),
        (lambda: bootstrap(np.ones((2, 3)), ["a"], accuracy), "2 answers and 1 groups"),
        (lambda: bootstrap(np.ones((1, 3)), ["a"], accuracy, level=95.0), "the level is 95"),
        (lambda: pope_counts(["yes"], ["Yes"]), "a label is 'Yes'; expected 'yes' or 'no'"),
        (lambda: chair_counts([["dog"]], []), "mentions of 1 captions and objects of 0 images"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_picture_has_no_interval():
    right = np.float64([[1, 1, 1], [0, 1, 1], [1, 1, 1]])
    found = bootstrap(right, ["a"] * 3, accuracy)
    assert all(math.isnan(end) for interval in found.values() for end in interval)
