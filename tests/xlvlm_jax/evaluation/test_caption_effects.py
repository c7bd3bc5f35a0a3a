"""Captions before and after, by hand."""

import pytest

from xlvlm_jax.evaluation import caption_changes, count_said


def test_changes_by_hand():
    before = ["a dog", "a red dog", "a red red cat", "a cat"]
    after = ["a Blue dog", "a red dog", "the cat", "a big cat"]
    changes = caption_changes(before, after, ["red", "blue"])
    assert changes == (4, 3, 2, 2, 1, 1, 3, 2, pytest.approx(11 / 4), pytest.approx(11 / 4))
    assert changes.gain == 0
    assert caption_changes(before[:1], after[:1], ["red", "blue"]).gain == 1


def test_words_are_counted_over_all_captions():
    assert count_said(["a dog, a cat.", "A cat"]) == {"a": 3, "cat": 2, "dog": 1}


def test_messages():
    with pytest.raises(ValueError, match="1 captions before and 2 after"):
        caption_changes(["a"], ["a", "b"], ["a"])
    with pytest.raises(ValueError, match="no words to look for"):
        caption_changes(["a"], ["a"], [])
