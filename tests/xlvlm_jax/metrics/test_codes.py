"""Explained variance, sparsity, dead concepts."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import r2_score

from xlvlm_jax import Concepts, decompose, metrics


def test_explained_variance_by_hand():
    Z = np.float32([[0, 0], [2, 0]])  # one from their mean each: variance 2
    assert metrics.explained_variance(Z, Z) == 1
    assert metrics.explained_variance(Z, np.float32([[1, 0], [1, 0]])) == 0
    assert metrics.explained_variance(Z, np.float32([[1, 0], [2, 0]])) == 0.5
    assert metrics.explained_variance(Z, -Z) == -7
    assert np.isnan(metrics.explained_variance(np.ones((3, 2)), np.zeros((3, 2))))


@pytest.mark.wrong_types
def test_explained_variance_against_scikit_learn():
    rng = np.random.default_rng(0)
    Z, other = rng.normal(size=(2, 40, 6))
    expected = r2_score(Z, other, multioutput="variance_weighted")
    assert metrics.explained_variance(Z, other) == pytest.approx(expected)
    with pytest.raises(
        ValueError, match=r"Z has shape \(40, 6\) but its reconstruction has \(39, 6\)"
    ):
        metrics.explained_variance(Z, other[1:])


def test_reconstructions_against_scikit_learn():
    Z = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32) + 3
    pca = PCA(2).fit(Z)
    concepts = decompose(Z, 2, "pca", key=jax.random.key(0))
    np.testing.assert_allclose(
        metrics.reconstruct(concepts, concepts.activations),
        pca.inverse_transform(pca.transform(Z)),
        atol=1e-3,
    )
    centroids = KMeans(3, n_init=1, random_state=0).fit(Z)
    concepts = Concepts.from_components(centroids.cluster_centers_, "kmeans")
    distances = np.linalg.norm(Z[:, None] - centroids.cluster_centers_, axis=2)
    np.testing.assert_allclose(
        metrics.reconstruct(concepts, 1 / (1 + distances)),
        centroids.cluster_centers_[centroids.labels_],
        atol=1e-6,
    )


def test_reconstruction_of_semi_nmf_by_hand():
    concepts = Concepts.from_components(np.float32([[1, 0], [0, 1]]))
    codes = np.float32([[2, 3]])
    assert metrics.reconstruct(concepts, codes).tolist() == [[2, 3]]


def test_hoyer_by_hand():
    # K = 4: (2 - 1) / 1, (2 - 2) / 1 and (2 - 7/5) / 1; a sample without codes is left out.
    assert metrics.hoyer_sparsity([[5, 0, 0, 0]]) == 1
    assert metrics.hoyer_sparsity([[1, 1, 1, 1]]) == 0
    assert metrics.hoyer_sparsity([[3, 0, 4, 0], [0, 0, 0, 0]]) == pytest.approx(0.6)
    assert metrics.hoyer_sparsity([[-3, 0, 4, 0]]) == pytest.approx(0.6)
    assert np.isnan(metrics.hoyer_sparsity([[1], [2]]))
    assert np.isnan(metrics.hoyer_sparsity(np.zeros((3, 4))))


@given(
    npst.arrays(np.float64, (4, 5), elements=st.floats(0.01, 9)),
    st.floats(0.1, 10),
    st.permutations(range(5)),
)
def test_sparsity_does_not_depend_on_scale_or_order(codes, scale, order):
    hoyer = metrics.hoyer_sparsity(codes)
    assert -1e-9 <= hoyer <= 1
    assert metrics.hoyer_sparsity(scale * codes[:, order]) == pytest.approx(hoyer, abs=1e-9)


def test_active_and_dead_by_hand():
    codes = np.array([[1, 0, 0.5, 0], [2, 0, 3, 0], [0, 0, 0, 0]])
    assert metrics.active_share(codes) == 4 / 12
    # The second and fourth are never active; a row of zeros activates none first.
    assert metrics.dead_concepts(codes).tolist() == [False, True, False, True]
    assert metrics.dead_concepts(np.zeros((2, 2))).all()
