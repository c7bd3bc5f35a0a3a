"""The estimators: scikit-learn's own checks, its estimators, and decompose."""

import jax
import numpy as np
import pytest
from sklearn import cluster, decomposition
from sklearn.utils.estimator_checks import parametrize_with_checks

import xlvlm_jax
from xlvlm_jax import KMeans, SemiNMF

RANDOM = np.random.default_rng(0)
CENTRES = 10 * RANDOM.standard_normal((3, 5))
X = (CENTRES[np.arange(60) % 3] + RANDOM.standard_normal((60, 5))).astype(np.float32)


@parametrize_with_checks([SemiNMF(2), KMeans(2), xlvlm_jax.PCA(1)])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def test_kmeans_is_scikit_learns():
    ours = KMeans(3, random_state=0).fit(X)
    theirs = cluster.KMeans(3, n_init=5, random_state=0).fit(X)
    order = theirs.predict(ours.cluster_centers_)
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_[order], atol=1e-4)
    np.testing.assert_array_equal(order[ours.labels_], theirs.labels_)
    np.testing.assert_allclose(ours.transform(X), theirs.transform(X)[:, order], atol=1e-3)
    np.testing.assert_array_equal(ours.predict(X), ours.labels_)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-4)


def test_pca_is_scikit_learns():
    ours = xlvlm_jax.PCA(2, random_state=0).fit(X)
    theirs = decomposition.PCA(2).fit(X)
    np.testing.assert_allclose(ours.explained_variance_, theirs.explained_variance_, rtol=1e-4)
    np.testing.assert_allclose(
        ours.explained_variance_ratio_, theirs.explained_variance_ratio_, rtol=1e-4
    )
    np.testing.assert_allclose(
        ours.inverse_transform(ours.transform(X)),
        theirs.inverse_transform(theirs.transform(X)),
        atol=1e-3,
    )


def test_semi_nmf_is_decompose():
    ours = SemiNMF(3, alpha=0.5, random_state=0).fit(X)
    seed = int(np.random.RandomState(0).randint(2**31 - 1))
    concepts = xlvlm_jax.decompose(X, 3, "snmf", key=jax.random.key(seed), alpha=0.5)
    np.testing.assert_array_equal(ours.components_, concepts.components)
    assert ours.objective_ == concepts.objective
    codes = ours.transform(X)
    np.testing.assert_allclose(codes, concepts.activations, atol=1e-3)
    np.testing.assert_allclose(ours.inverse_transform(codes), codes @ ours.components_)


def test_messages():
    with pytest.raises(ValueError, match="70 components of n_samples=60"):
        SemiNMF(70).fit(X)
    with pytest.raises(ValueError, match="6 components of n_features=5"):
        xlvlm_jax.PCA(6).fit(X)
