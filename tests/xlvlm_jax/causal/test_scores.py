"""Scores from changes: by hand, against scikit-learn, properties and messages."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from xlvlm_jax import causal
from xlvlm_jax.causal.scores import as_json


def test_by_hand():
    # Words 0 and 1 belong to the concept; 2 and 3 are the only others.
    changes = np.array([[[3.0, 1.0, 1.0, 0.0], [1.0, 1.0, -1.0, -2.0]]])
    found = causal.causal_scores(changes, [[0, 1]], np.zeros(4), num_matched=2)
    own, others = (2.0 + 1.0) / 2, (0.5 + 1.5) / 2
    assert found.own[0] == own and found.others[0] == others
    assert found.score[0] == pytest.approx(own / (own + others))
    # The resamples are the first sample twice, both, or the second twice.
    assert found.low[0] == pytest.approx(1 / (1 + 1.5))
    assert found.high[0] == pytest.approx(2 / (2 + 0.5))
    assert found.low[0] <= found.score[0] <= found.high[0]


def test_words_that_move_are_told_from_words_that_do_not():
    random = np.random.default_rng(0)
    changes = 0.1 * random.standard_normal((5, 30, 25))
    own = [list(range(5 * k, 5 * k + 5)) for k in range(5)]
    for k in range(4):  # the last concept moves nothing of its own
        changes[k][:, own[k]] += 1.0
    changes[3] *= -1  # and this one moves its words the wrong way
    found = causal.causal_scores(changes, own, random.standard_normal(25))
    assert (found.score[:3] > 0.8).all() and found.score[3] < -0.8
    assert found.includes_null.tolist() == [False, False, False, True, True]
    # A concept's words are among the others of the shuffled lists of another.
    assert (np.abs(found.null[:3]) < 0.6).all()


def test_the_order_of_samples_does_not_count():
    random = np.random.default_rng(1)
    changes = random.standard_normal((2, 9, 8))
    own, likelihood = [[0, 1], [5]], random.standard_normal(8)
    one = causal.causal_scores(changes, own, likelihood)
    two = causal.causal_scores(changes[:, ::-1], own, likelihood)
    np.testing.assert_allclose(one.score, two.score)
    np.testing.assert_allclose(one.null, two.null)


def test_a_concept_without_words_has_no_score():
    found = causal.causal_scores(np.ones((2, 3, 4)), [[], [1]], np.zeros(4))
    assert np.isnan(found.score[0]) and found.score[1] == 0.5
    assert found.includes_null[0]
    described = as_json(found)
    assert described["score"] == [None, 0.5] and described["includes_null"][0] is True


def test_area_under_the_curve_is_scikit_learns():
    random = np.random.default_rng(2)
    positive, negative = random.integers(0, 6, 20) + 1, random.integers(0, 6, 13)
    labels = np.repeat([1, 0], [20, 13])
    expected = roc_auc_score(labels, np.concatenate([positive, negative]))
    assert causal.auc(positive, negative) == pytest.approx(expected)


def test_rank_correlation():
    assert causal.rank_correlation([1, 2, 3], [10, 5, 1]) == pytest.approx(-1)
    assert np.isnan(causal.rank_correlation([1, 1], [2, 3]))


def test_signs():
    assert causal.signs([0.1], [1.0, -1.0]).tolist() == [1, -1, 1]


def test_messages():
    with pytest.raises(ValueError, match="at least two samples; got 1"):
        causal.causal_scores(np.ones((1, 1, 2)), [[0]], np.zeros(2))
    with pytest.raises(ValueError, match=r"expected \[K, N, W\] and \[W\]"):
        causal.causal_scores(np.ones((2, 3, 2)), [[0]], np.zeros(2))
    with pytest.raises(ValueError, match="NaN or Inf; check the strengths"):
        causal.causal_scores(np.full((1, 2, 2), np.nan), [[0]], np.zeros(2))
