"""The most activated concepts of samples: by hand, and properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from xlvlm_jax import metrics
from xlvlm_jax.metrics.most_activated import NONE, strongest_concept

CODES = np.array([[0.2, 0.9, 0.5], [0, 0, 0.3], [0, 0, 0], [-1, 2, -3.0]])


def test_top_concepts_by_hand():
    assert metrics.top_concepts(CODES, 1).tolist() == [
        [False, True, False],
        [False, False, True],
        [False, False, False],
        [False, True, False],
    ]
    assert metrics.top_concepts(CODES, 2).sum(axis=1).tolist() == [2, 1, 0, 1]
    assert metrics.top_concepts(CODES, 9).sum(axis=1).tolist() == [3, 1, 0, 1]
    assert metrics.top_concepts(np.ones((1, 3)), 2).tolist() == [[True, True, False]]


def test_means_by_hand():
    scores = np.arange(12.0).reshape(4, 3)
    means = metrics.mean_of_top(scores, metrics.top_concepts(CODES, 2))
    np.testing.assert_array_equal(means, [1.5, 5, np.nan, 10])


@given(npst.arrays(np.float32, (5, 4), elements=st.floats(0, 8, width=16)), st.integers(1, 4))
def test_what_is_chosen_is_at_least_what_is_not(codes, count):
    chosen = metrics.top_concepts(codes, count)
    assert (chosen.sum(axis=1) == np.minimum((codes > 0).sum(axis=1), count)).all()
    for row, mask in zip(codes, chosen, strict=True):
        if mask.any() and not mask.all():
            assert row[mask].min() >= row[~mask].max()


def test_the_number_is_at_least_one():
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        metrics.top_concepts(CODES, 0)


def test_a_row_belongs_to_its_largest_activation_or_to_none():
    activations = np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 0.0], [-1.0, -2.0]])
    assert strongest_concept(activations).tolist() == [1, 0, NONE, 0]
    assert strongest_concept(activations[:, :0]).tolist() == [NONE] * 4


@settings(max_examples=50, deadline=None)
@given(
    npst.arrays(np.float32, (6, 4), elements=st.floats(0, 8, width=16), unique=True),
    st.permutations(range(4)),
)
def test_permuting_concepts_permutes_the_assignment(activations, order):
    renamed = strongest_concept(activations[:, order])
    assert [order[k] for k in renamed] == strongest_concept(activations).tolist()
