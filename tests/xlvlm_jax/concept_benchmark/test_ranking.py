"""Places and their agreement: by hand, against scipy, properties, messages."""

import numpy as np
import pytest
from scipy import stats

from xlvlm_jax import concept_benchmark as bench


def test_places_by_hand():
    values = np.array([[0.9, 3.0], [0.1, 1.0], [0.9, np.nan]])
    assert bench.rank(values, [True, False]).tolist() == [[1.5, 2], [3, 1], [1.5, 3]]


def test_agreement_by_hand_and_against_scipy():
    scores = np.array([[1, 2, 3, 4], [1, 2, 4, 3], [4, 3, 2, 1]], float)
    # Pairs of seeds: one of six swapped; all; all but that one.
    assert bench.agreement(scores) == pytest.approx((4 / 6 - 1 - 4 / 6) / 3)
    tied = np.array([[1, 1, 2, 5, 3], [2, 1, 1, 4, 4]], float)
    assert bench.agreement(tied) == pytest.approx(stats.kendalltau(*tied).statistic)


def test_order_and_monotone_changes_do_not_matter():
    scores = np.random.default_rng(0).random((3, 6))
    order = np.random.default_rng(1).permutation(6)
    expected = bench.agreement(scores)
    assert bench.agreement(np.exp(5 * scores)[:, order]) == pytest.approx(expected)
    assert np.isnan(bench.agreement(scores[:1])) and np.isnan(bench.agreement(np.ones((2, 3))))


@pytest.mark.wrong_types
def test_messages():
    with pytest.raises(ValueError, match=r"values have shape \(2, 2\) for 1 measures"):
        bench.rank(np.ones((2, 2)), [True])
