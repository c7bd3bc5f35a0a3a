"""Agreement of concepts with known attributes: by hand, against scikit-learn, properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score

from xlvlm_jax.metrics import attribute_scores


def test_scores_by_hand():
    # concepts 0 0 1 1: colour is the concept, place is independent of it
    activations = np.float32([[2, 1], [3, 0], [0, 1], [1, 4]])
    attributes = {"colour": ["red", "red", "blue", "blue"], "place": ["sea", "city"] * 2}
    scores = attribute_scores(activations, attributes)
    assert scores["colour"].nmi == pytest.approx(1)
    assert scores["place"].nmi == pytest.approx(0, abs=1e-6)
    assert scores["colour"].num_samples == 4


def test_scores_against_scikit_learn():
    rng = np.random.default_rng(0)
    activations = rng.random((50, 4), np.float32)
    values = rng.integers(0, 3, 50)
    expected = normalized_mutual_info_score(values, activations.argmax(axis=1))
    assert attribute_scores(activations, {"count": list(values)})["count"].nmi == expected


def test_the_random_baseline_is_low_where_samples_are_many_and_seeded():
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 5, 500)
    activations = np.eye(5, dtype=np.float32)[colours]
    score = attribute_scores(activations, {"colour": list(colours)})["colour"]
    assert score.nmi == pytest.approx(1)
    assert 0 < score.random_mean < 0.05 and 0 < score.random_std < 0.02
    assert attribute_scores(activations, {"colour": list(colours)})["colour"] == score


def test_samples_without_the_attribute_are_left_out():
    activations = np.float32([[1, 0], [0, 1], [0, 1], [1, 0]])
    score = attribute_scores(activations, {"mood": ["happy", "sad", None, None]})["mood"]
    assert (score.nmi, score.num_samples) == (pytest.approx(1), 2)


@given(st.permutations(range(12)), st.permutations(range(3)))
@settings(max_examples=10, deadline=None)
def test_scores_do_not_depend_on_the_order_of_samples_or_concepts(samples, concepts):
    rng = np.random.default_rng(0)
    activations, values = rng.random((12, 3), np.float32), rng.integers(0, 3, 12)
    score = attribute_scores(activations, {"a": list(values)}, num_random=1)["a"]
    shuffled = activations[samples][:, concepts]
    again = attribute_scores(shuffled, {"a": list(values[samples])}, num_random=1)["a"]
    assert again.nmi == pytest.approx(score.nmi)


def test_attributes_have_one_value_per_sample():
    activations = np.ones((3, 2), np.float32)
    with pytest.raises(ValueError, match="'mood' has 2 values, expected 3, one per sample"):
        attribute_scores(activations, {"mood": ["happy", "sad"]})
    with pytest.raises(ValueError, match="attribute 'mood' is unknown for all samples; omit it"):
        attribute_scores(activations, {"mood": [None] * 3})


def test_samples_without_a_concept_are_a_class_of_their_own():
    """They counted as the first concept."""
    activations = np.float32([[0, 0], [0, 0], [1, 0], [2, 0], [0, 1], [0, 3]])
    values = ["none", "none", "a", "a", "b", "b"]
    score = attribute_scores(activations, {"kind": values})["kind"]
    assert score.nmi == pytest.approx(1)
    expected = normalized_mutual_info_score(["x", "x", "x", "x", "y", "y"], [2, 2, 0, 0, 1, 1])
    other = attribute_scores(activations, {"kind": ["x", "x", "x", "x", "y", "y"]})["kind"]
    assert other.nmi == pytest.approx(expected)
