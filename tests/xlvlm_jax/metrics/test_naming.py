"""Naming accuracy: by hand, against shuffling, messages."""

import itertools

import numpy as np
import pytest

from xlvlm_jax import metrics

WORDS = [["red", "ruby"], ["sea", "dog"], [], ["cat"]]
NAMES = [{"red", "crimson"}, {"dog", "pup"}, {"cat"}]


def test_by_hand():
    found = metrics.naming_accuracy(WORDS, np.array([0, 1, 2]), NAMES)
    assert found.accuracy == pytest.approx(2 / 3)
    assert metrics.naming_accuracy(WORDS, np.array([3, 3, 3]), NAMES).accuracy == pytest.approx(
        1 / 3
    )


def test_null_is_the_mean_over_all_shuffles():
    best = np.array([0, 1, 1])
    every = [
        metrics.naming_accuracy([WORDS[k] for k in order], best, NAMES).accuracy
        for order in itertools.permutations(range(4))
    ]
    assert metrics.naming_accuracy(WORDS, best, NAMES).shuffled == pytest.approx(np.mean(every))


def test_messages():
    with pytest.raises(ValueError, match="2 values have a concept and 3 have names"):
        metrics.naming_accuracy(WORDS, np.array([0, 1]), NAMES)
    with pytest.raises(ValueError, match="concepts 0 to 4 are asked for; expected 0 to 3"):
        metrics.naming_accuracy(WORDS, np.array([0, 4, 1]), NAMES)
