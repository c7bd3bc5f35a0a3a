"""Words as tokens of a model, and other words that are as likely."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlvlm_jax import causal
from xlvlm_jax.causal import words as words_module
from xlvlm_jax.causal.words import NONE, filled


class Letters:
    """A tokenizer of seven tokens."""

    texts = ("dog", " dog", "Dog ", "cat", "", "do", "pup")

    def decode(self, ids):
        return self.texts[ids[0]]


def test_every_spelling_of_a_word_counts():
    known = causal.vocabulary_of([["dog", "zebra"], [], ["pup", "dog"]], Letters(), 7)
    assert known.words == ["dog", "pup"] and known.unknown == ["zebra"]
    assert known.tokens.tolist() == [[0, 1, 2], [6, NONE, NONE]]
    assert known.own == [[0], [], [1, 0]]
    assert causal.own_tokens(known).tolist() == [
        [0, 1, 2, NONE],
        [NONE, NONE, NONE, NONE],
        [6, 0, 1, 2],
    ]


def test_tokens_beyond_the_vocabulary_are_left_out():
    known = causal.vocabulary_of([["dog", "pup"]], Letters(), 2)
    assert known.tokens.tolist() == [[0, 1]] and known.unknown == ["pup"]


@pytest.mark.parametrize("words", [[[], []], [["zebra"]]])
def test_no_words_that_are_tokens(words):
    with pytest.raises(ValueError, match=r"none of the concepts has a word that is a token.*grou"):
        causal.vocabulary_of(words, Letters(), 7)


def test_words_of_the_nearest_rank_are_matched():
    likelihood = np.array([-1.0, -9.0, -3.0, -2.0, -8.0, -5.0])  # by rank: 1 4 5 2 3 0
    assert causal.matched_words(likelihood, [0], num_matched=2) == [3, 2]
    assert causal.matched_words(likelihood, [5], num_matched=2) == [2, 4]
    assert causal.matched_words(likelihood, [0], without=[3], num_matched=1) == [2]
    assert causal.matched_words(likelihood, [0, 1, 2, 3, 4, 5]) == []
    assert causal.matched_words(likelihood, [0, 1], without=[2, 3, 4], num_matched=3) == [5, 5]


@settings(max_examples=30)
@given(st.lists(st.floats(-20, 0), min_size=3, max_size=12), st.data())
def test_an_own_word_is_never_matched(likelihood, data):
    index = st.sets(st.integers(0, len(likelihood) - 1), min_size=1, max_size=3)
    own = sorted(data.draw(index))
    found = causal.matched_words(np.array(likelihood), own, num_matched=2)
    assert not set(found) & set(own)
    assert len(found) == len(own) * min(2, len(likelihood) - len(own))


def test_rows_are_filled():
    assert filled([[3], [], [1, 2]]).tolist() == [[3, NONE], [NONE, NONE], [1, 2]]


def test_words_of_others_are_compared_with(monkeypatch):
    others = [["cat"], ["dog", "pup"], ["zebra"]]
    known = causal.vocabulary_of([["dog", "zebra"]], Letters(), 7, others=others)
    assert known.words == ["dog", "cat", "pup"] and known.own == [[0]]
    assert known.unknown == ["zebra"]  # of the concepts' own
    monkeypatch.setattr(words_module, "MOST_OTHERS", 1)
    few = causal.vocabulary_of([["dog"]], Letters(), 7, others=[["cat", "do", "pup"]])
    assert few.words == ["dog", "cat"]
    # Which others count does not depend on the concepts that are asked for.
    monkeypatch.setattr(words_module, "MOST_OTHERS", 2)
    every = [["cat"], ["dog"], ["pup"]]
    counted = [set(causal.vocabulary_of([own], Letters(), 7, others=every).words) for own in every]
    assert counted == [{"cat", "dog"}, {"cat", "dog"}, {"cat", "dog", "pup"}]
