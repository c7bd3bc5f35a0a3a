"""Sparse probing and splitting: by hand, against scikit-learn, null values, messages."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler

from xlvlm_jax import metrics
from xlvlm_jax.metrics import probing

RNG = np.random.default_rng(0)


def test_separation_by_hand():
    # Means 3 and 1, all values 1, 1, 3, 3: the deviation is 1. The second does not vary.
    codes = np.float32([[3, 0.1], [3, 0.1], [1, 0.1], [1, 0.1]])
    positive = np.array([True, True, False, False])
    np.testing.assert_allclose(probing.separation(codes, positive), [2, 0])
    assert probing.best_concepts(codes[:, ::-1], positive, 1).tolist() == [1]


def test_a_concept_that_is_the_value_is_found_and_one_is_enough():
    positive = RNG.random(200) < 0.2
    codes = RNG.random((200, 6)) * 0.1
    codes[positive, 4] += 1
    halves = codes[:100], positive[:100], codes[100:], positive[100:]
    assert metrics.sparse_probing(*halves, 1) == 1
    assert metrics.split_concepts(codes, positive).tolist() == [4]


def test_a_value_that_is_split_between_two_concepts():
    positive = np.arange(90) < 60
    codes = np.zeros((90, 5), np.float32)
    codes[:30, 1] = codes[30:60, 3] = 1  # each fires on half of what has the value
    codes[:, 0] = RNG.random(90)
    assert sorted(metrics.split_concepts(codes, positive).tolist()) == [1, 3]
    assert metrics.sparse_probing(codes, positive, codes, positive, 1) == pytest.approx(0.75)
    assert metrics.sparse_probing(codes, positive, codes, positive, 2) == 1


def test_probe_against_scikit_learn():
    rows = RNG.normal(size=(80, 5)) * [1, 10, 0.1, 1, 3] + 2
    positive = rows[:, 0] + 0.1 * rows[:, 1] + RNG.normal(size=80) > 4
    scaled = StandardScaler().fit_transform(rows)
    theirs = LogisticRegression(class_weight="balanced", max_iter=300).fit(scaled, positive)
    probe = probing.fit_probe(rows, positive)
    np.testing.assert_allclose(
        rows @ probe.weights + probe.bias, theirs.decision_function(scaled), atol=1e-6
    )
    assert (probe.says(rows) == theirs.predict(scaled)).all()
    said = theirs.predict(scaled)
    found = probing.balanced_accuracy(positive, said)
    assert found == pytest.approx(balanced_accuracy_score(positive, said))


def test_codes_that_say_nothing_are_at_chance():
    accuracies = []
    for _ in range(20):
        codes, positive = RNG.normal(size=(400, 30)), RNG.random(400) < 0.1
        halves = codes[:200], positive[:200], codes[200:], positive[200:]
        accuracies.append(metrics.sparse_probing(*halves, 5))
    assert np.mean(accuracies) == pytest.approx(0.5, abs=0.05)


def test_scale_shift_and_order_of_concepts_do_not_matter():
    codes, positive = RNG.normal(size=(60, 5)), RNG.random(60) < 0.4
    order = RNG.permutation(5)
    first = metrics.sparse_probing(codes, positive, codes, positive, 2)
    moved = (codes * RNG.uniform(0.1, 9, 5) + 7)[:, order]
    assert metrics.sparse_probing(moved, positive, moved, positive, 2) == first


@pytest.mark.wrong_types
def test_messages():
    codes, positive = np.ones((4, 2)), np.array([True, False, True, False])
    with pytest.raises(ValueError, match="there are 4 rows but 3 labels; expected one each"):
        probing.separation(codes, positive[:3])
    with pytest.raises(ValueError, match="4 of 4 samples have the value; a probe needs some"):
        probing.fit_probe(codes, np.ones(4, bool))
    with pytest.raises(ValueError, match="needs at least one concept, got 0"):
        metrics.split_concepts(codes, positive, most=0)
    with pytest.raises(ValueError, match="fitted on 2 concepts but tested on 1; encode both"):
        metrics.sparse_probing(codes, positive, codes[:, :1], positive)
