"""Overlap of the words of concepts: by hand, against numpy, properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlvlm_jax.metrics import overlap_matrix, word_overlap


def test_overlap_by_hand():
    words = [["dog", "grass"], ["dog", "beach", "sand", "sea"], ["train"]]
    # 0 -> 1: 1 / 2, 1 -> 0: 1 / 4, the other four pairs share nothing
    assert word_overlap(words) == pytest.approx((1 / 2 + 1 / 4) / 6)


def test_repeats_count_each_time():
    words = [["dog", "dog", "sea"], ["dog"], []]
    expected = [[1, 2 / 3, 0], [1, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(overlap_matrix(words), expected)
    assert word_overlap(words) == pytest.approx((2 / 3 + 1) / 6)


def test_overlap_against_numpy():
    rng = np.random.default_rng(0)
    member = rng.random((6, 20)) < 0.4  # concept k has word w
    words = [[str(w) for w in np.nonzero(row)[0]] for row in member]
    shares = (member[:, None] & member[None]).sum(axis=2) / member.sum(axis=1)[:, None]
    assert word_overlap(words) == pytest.approx(shares[~np.eye(6, dtype=bool)].mean())


@given(st.lists(st.lists(st.sampled_from("abcdef")), min_size=2, max_size=5), st.randoms())
def test_overlap_is_a_share_and_ignores_order(words, random):
    overlap = word_overlap(words)
    assert 0 <= overlap <= 1
    shuffled = [random.sample(concept, len(concept)) for concept in words]
    assert word_overlap(random.sample(shuffled, len(words))) == pytest.approx(overlap)


def test_overlap_of_equal_and_of_disjoint_concepts():
    assert word_overlap([["dog"]] * 3) == 1
    assert word_overlap([["dog"], ["cat"], []]) == 0


def test_overlap_needs_two_concepts():
    with pytest.raises(ValueError, match="needs the words of two concepts or more, got 1"):
        word_overlap([["dog"]])
