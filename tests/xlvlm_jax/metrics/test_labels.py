"""Labels as numbers: by hand, and compared with scikit-learn."""

import numpy as np
from sklearn.metrics.cluster import contingency_matrix

from xlvlm_jax.metrics.labels import UNKNOWN, factorise, factorise_each


def test_by_hand():
    labels = factorise(["b", None, 3, "b", "3"])
    assert labels.values == ["b", "3"]
    assert labels.codes.tolist() == [0, UNKNOWN, 1, 0, 1]
    assert labels.counts().tolist() == [2, 2]
    assert labels.take(np.array([4, 4, 1])).counts().tolist() == [0, 2]
    groups = np.array([0, 0, 2, -1, 2])
    assert labels.counts_by(groups, 3).tolist() == [[1, 0], [0, 0], [0, 2]]


def test_each_key_of_many_mappings():
    rows = [{"colour": "red"}, {}, {"colour": "blue", "count": None}, {"count": 2}]
    found = factorise_each(iter(rows), 4)
    for key, labels in found.items():
        expected = factorise(row.get(key) for row in rows)
        assert labels.values == expected.values
        np.testing.assert_array_equal(labels.codes, expected.codes)
    assert list(found) == ["colour", "count"]


def test_counts_are_scikit_learns_contingency_matrix():
    rng = np.random.default_rng(0)
    groups, values = rng.integers(0, 5, 300), rng.integers(0, 7, 300)
    labels = factorise(values)
    counts = labels.counts_by(groups, 5)
    order = np.argsort([int(value) for value in labels.values])
    np.testing.assert_array_equal(counts[:, order], contingency_matrix(groups, values))
