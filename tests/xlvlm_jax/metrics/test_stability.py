"""Stability of dictionaries: by hand, against scikit-learn, properties, messages."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from sklearn.metrics.pairwise import cosine_similarity

from xlvlm_jax import metrics

RNG = np.random.default_rng(0)


def test_stability_by_hand():
    a = np.float32([[1, 0, 0], [0, 1, 0]])
    b = np.float32(
        [[0, 5, 0], [0.6, 0, 0.8]]
    )  # the first is a's second, the other .6 off its first
    assert metrics.stability([a, b]) == pytest.approx((1 + 0.6) / 2)
    assert metrics.stability([a, a, b]) == pytest.approx((1 + 0.8 + 0.8) / 3)
    assert metrics.stability([a, np.zeros_like(a)]) == 0


def test_stability_against_scikit_learn():
    a, b = RNG.normal(size=(2, 6, 5))
    cosines = cosine_similarity(a, b)
    expected = cosines[linear_sum_assignment(cosines, maximize=True)].mean()
    assert metrics.stability([a, b]) == pytest.approx(expected)


def test_order_and_scale_do_not_matter():
    a, b = RNG.normal(size=(2, 6, 5))
    again = metrics.stability([a[::-1] * 3, b[[3, 1, 2, 0, 5, 4]]])
    assert again == pytest.approx(metrics.stability([a, b]))
    assert metrics.stability([a, a[::-1]]) == pytest.approx(1)


@pytest.mark.wrong_types
def test_dictionaries_that_cannot_be_compared():
    a = np.ones((3, 4))
    with pytest.raises(ValueError, match="stability compares two dictionaries or more, got 1"):
        metrics.stability([a])
    with pytest.raises(ValueError, match=r"concepts have shapes \(3, 4\) and \(2, 4\); expected"):
        metrics.stability([a, a[:2]])
