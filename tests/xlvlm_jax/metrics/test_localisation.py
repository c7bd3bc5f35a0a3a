"""Pointing and AUC of maps: by hand, against scikit-learn, null values, messages."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics import roc_auc_score

from xlvlm_jax import metrics
from xlvlm_jax.metrics import localisation

RNG = np.random.default_rng(0)


def test_by_hand():
    values = np.float32([[5, 1, 2], [1, 3, 3], [0, 0, 0]])
    inside = np.array([[True, False, False], [False, True, False], [True, True, False]])
    np.testing.assert_allclose(metrics.pointing(values, inside), [1, 0.5, 2 / 3])
    # A cell of four pixels of which one is outside is compared with itself half.
    counts = np.array([[3, 0, 0], [0, 4, 0], [4, 4, 4]])
    found = metrics.picture_auc(values, counts, 4 - counts)
    np.testing.assert_allclose(
        found[:2], [(3 * 8 + 3 / 2) / (3 * 9), (4 * 4 + 4 * 4 / 2) / (4 * 8)]
    )
    assert np.isnan(found[2])


def test_against_scikit_learn():
    values = RNG.integers(0, 5, (4, 6)).astype(float)
    inside = RNG.integers(0, 4, (4, 6))
    found = metrics.picture_auc(values, inside, 3 - inside)
    for n in range(4):
        labels = np.concatenate([[1] * a + [0] * (3 - a) for a in inside[n]])
        assert found[n] == pytest.approx(roc_auc_score(labels, np.repeat(values[n], 3)))
    columns, positive = RNG.integers(0, 9, (40, 3)).astype(float), RNG.random(40) < 0.3
    areas = localisation.rank_auc(localisation.ranks(columns), positive)
    expected = [roc_auc_score(positive, column) for column in columns.T]
    np.testing.assert_allclose(areas, expected)


def test_random_maps_are_at_chance():
    values, inside = RNG.random((400, 16)), RNG.random((400, 16)) < 0.25
    inside[:, 0], inside[:, 1] = True, False
    assert metrics.pointing(values, inside).mean() == pytest.approx(inside.mean(), abs=0.06)
    assert metrics.picture_auc(values, inside * 1, ~inside * 1).mean() == pytest.approx(
        0.5, abs=0.03
    )


@pytest.mark.wrong_types
def test_messages():
    values = np.ones((2, 3))
    with pytest.raises(ValueError, match=r"values have shape \(2, 3\) and regions \(2, 2\)"):
        metrics.pointing(values, np.ones((2, 2), bool))
    with pytest.raises(ValueError, match=r"pixels \(2, 3\) and \(1, 3\); expected the same"):
        metrics.picture_auc(values, np.ones((2, 3)), np.ones((1, 3)))
    with pytest.raises(ValueError, match="2 rows have 2 positive and 0 negative labels"):
        localisation.rank_auc(values, np.ones(2, bool))


def test_ranks_of_many_rows_are_told_apart():
    """Float32 has no ranks beyond 2^24; SciPy 1.18 and later rank float32 in it."""
    found = localisation.ranks(np.float32([[0.5], [0.25]]))
    assert found.dtype == np.float64 and found.tolist() == [[2], [1]]


@pytest.mark.parametrize("share", [0, 0.1, 0.6, 1])
def test_ranks_of_sparse_columns_are_those_of_all_values(share):
    values = RNG.integers(-2, 4, (50, 7)) * (RNG.random((50, 7)) < share)
    values = values.astype(np.float32)
    values[:, 3] = 0
    found = localisation.sparse_ranks(sparse.csr_array(values))
    whole = localisation.ranks(values)
    np.testing.assert_array_equal(
        found.beyond.toarray() + found.zero * (values == 0),
        np.where(values == 0, whole, whole - found.zero),
    )
    positive = RNG.random(50) < 0.4
    np.testing.assert_allclose(
        localisation.rank_auc(found, positive), localisation.rank_auc(whole, positive), rtol=1e-12
    )
    with pytest.raises(ValueError, match="50 rows have 0 positive and 50 negative"):
        localisation.rank_auc(found, np.zeros(50, bool))
