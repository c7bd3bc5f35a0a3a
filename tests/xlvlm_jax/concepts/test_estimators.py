"""The estimators: scikit-learn's own checks, its estimators, and decompose."""

import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import cluster, decomposition
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

import xlvlm_jax
from xlvlm_jax import KMeans, SemiNMF
from xlvlm_jax.concepts import estimators

RANDOM = np.random.default_rng(0)
CENTRES = 10 * RANDOM.standard_normal((3, 5))
X = (CENTRES[np.arange(60) % 3] + RANDOM.standard_normal((60, 5))).astype(np.float32)


FAILS = {
    KMeans: {
        "check_sample_weight_equivalence_on_dense_data": (
            "rows are drawn in their order, which the check changes: other first centres, and of "
            "15 rows of noise in 8 clusters another optimum"
        )
    }
}


@pytest.fixture
def quickly_compiled():
    """Compiles without optimisations, because small programs for many shapes take all the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.wrong_types
@parametrize_with_checks(
    [SemiNMF(), KMeans(), xlvlm_jax.PCA()],
    expected_failed_checks=lambda estimator: FAILS.get(type(estimator), {}),
)
def test_scikit_learns_checks(estimator, check, quickly_compiled):
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


def test_semi_nmf_has_its_explained_variance():
    ours = SemiNMF(3, alpha=0.1, random_state=0).fit(X)
    codes = ours.transform(X)
    squares = float(np.sum((X - codes @ ours.components_).astype(np.float64) ** 2))
    assert ours.reconstruction_err_ == pytest.approx(squares**0.5, rel=1e-3)
    energy = float(np.sum(X.astype(np.float64) ** 2))
    assert ours.score(X) == pytest.approx(1 - squares / energy, abs=1e-5)
    assert ours.objective_ == pytest.approx(squares / 2 + 0.1 * codes.sum(), rel=1e-4)
    assert SemiNMF(random_state=0).fit(X[:7]).n_components_ == 7


def test_pca_has_scikit_learns_attributes():
    ours = xlvlm_jax.PCA(2, whiten=True, random_state=0).fit(X)
    theirs = decomposition.PCA(2, whiten=True).fit(X)
    for name in ("singular_values_", "noise_variance_", "n_components_", "mean_", "n_samples_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-4)
    np.testing.assert_allclose(ours.transform(X), theirs.transform(X), atol=1e-3)
    # Whitening changes scores, not the model; scikit-learn's get_covariance takes it in.
    model = decomposition.PCA(2).fit(X)
    np.testing.assert_allclose(ours.get_covariance(), model.get_covariance(), atol=1e-3)
    np.testing.assert_allclose(ours.score_samples(X), model.score_samples(X), rtol=1e-3)
    back = ours.inverse_transform(ours.transform(X))
    np.testing.assert_allclose(back, theirs.inverse_transform(theirs.transform(X)), atol=1e-3)


def test_pca_in_64_bits_is_scikit_learns():
    rows = X.astype(np.float64) + 1e4
    with jax.enable_x64(True):
        ours = xlvlm_jax.PCA(2).fit(rows)
        scores = ours.transform(rows)
    theirs = decomposition.PCA(2, svd_solver="full").fit(rows)
    turned = np.sign(np.sum(ours.components_ * theirs.components_, axis=1))
    np.testing.assert_allclose(scores, turned * theirs.transform(rows), atol=1e-9)
    np.testing.assert_allclose(ours.explained_variance_, theirs.explained_variance_, rtol=1e-9)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999, None])
def test_pca_keeps_a_share_of_the_variance(share):
    ours, theirs = xlvlm_jax.PCA(share).fit(X), decomposition.PCA(share).fit(X)
    assert ours.n_components_ == theirs.n_components_
    assert ours.noise_variance_ == pytest.approx(theirs.noise_variance_, rel=1e-4)
    assert ours.transform(X).shape == (60, theirs.n_components_)


@pytest.mark.parametrize(
    "init",
    ["k-means++", "random", X[:3], lambda X, K, random_state: X[random_state.permutation(9)[:K]]],
    ids=["k-means++", "random", "array", "function"],
)
def test_kmeans_starts(init):
    ours = KMeans(3, init=init, random_state=0).fit(X)
    best = cluster.KMeans(3, n_init=5, random_state=0).fit(X).inertia_
    assert ours.converged_
    assert ours.inertia_ == pytest.approx(best, rel=1e-4)
    assert ours.score(X) == pytest.approx(-best, rel=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weighted_kmeans_is_scikit_learns(dtype):
    weights = np.random.default_rng(0).exponential(size=60)
    weights[:9] = 0
    rows = X.astype(dtype)
    rows[:9] += 1e4  # where no row has a weight, nothing is drawn to it
    ours = KMeans(3, init=rows[9:12], tol=0).fit(rows, sample_weight=weights)
    theirs = cluster.KMeans(3, init=rows[9:12], n_init=1, tol=0)
    theirs.fit(rows[9:], sample_weight=weights[9:])
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, atol=1e-4)
    np.testing.assert_array_equal(ours.labels_, theirs.predict(rows))
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-4)
    np.testing.assert_allclose(ours.counts_.sum(), weights.sum())
    for some in (weights, None):
        assert ours.score(rows, sample_weight=some) == pytest.approx(
            theirs.score(rows, sample_weight=some), rel=1e-4
        )
    for init in ("k-means++", "random"):
        again = KMeans(3, init=init, n_init=5, random_state=0)
        labels = again.fit_predict(rows, sample_weight=weights)
        assert again.inertia_ == pytest.approx(theirs.inertia_, rel=1e-4)
        np.testing.assert_array_equal(labels, again.labels_)


def test_batches_of_kmeans_are_scikit_learns():
    rng = np.random.default_rng(1)
    ours = KMeans(3, init=X[:3])
    theirs = cluster.MiniBatchKMeans(3, init=X[:3], n_init=1, reassignment_ratio=0)
    for size in (20, 7, 20, 1):
        batch, weights = X[rng.integers(0, 60, size)], rng.exponential(size=size)
        ours.partial_fit(batch, sample_weight=weights)
        theirs.partial_fit(batch, sample_weight=weights)
        np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, atol=1e-4)
        np.testing.assert_allclose(ours.counts_, theirs._counts, rtol=1e-5)
        np.testing.assert_array_equal(ours.labels_, theirs.labels_)
        assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-3)
    assert ours.score(X) == pytest.approx(theirs.score(X), rel=1e-4)
    # After fit, centres move as the means of all that they have seen.
    fitted = KMeans(3, random_state=0).fit(X)
    whole = np.concatenate([X, X + 0.1])
    expected = KMeans(3, init=fitted.cluster_centers_).fit(whole).cluster_centers_
    np.testing.assert_allclose(fitted.partial_fit(X + 0.1).cluster_centers_, expected, atol=1e-4)


def test_first_batch_of_kmeans():
    ours = KMeans(3, random_state=0).partial_fit(X)
    assert len(set(ours.labels_)) == 3
    with pytest.raises(ValueError, match="n_samples=2 should be >= n_clusters=3"):
        KMeans(3).partial_fit(X[:2])
    with pytest.raises(ValueError, match="X has 4 features, but KMeans is expecting 5"):
        ours.partial_fit(X[:, :4])
    for asked in (2, 4):
        with pytest.raises(ValueError, match=f"n_clusters={asked}, but earlier batches were .* 3"):
            ours.set_params(n_clusters=asked).partial_fit(X)


@pytest.mark.parametrize("whiten", [False, True])
def test_batches_of_pca_are_scikit_learns(whiten):
    rows = np.random.default_rng(2).normal(size=(90, 5)) @ np.diag([5, 3, 2, 1, 0.5]) + 30
    ours, theirs = xlvlm_jax.PCA(2, whiten=whiten), decomposition.IncrementalPCA(2, whiten=whiten)
    for batch in np.split(rows, [40, 50, 51]):
        ours.partial_fit(batch)
        theirs.partial_fit(batch)
        for name in ("mean", "explained_variance", "explained_variance_ratio", "singular_values"):
            np.testing.assert_allclose(
                getattr(ours, f"{name}_"), getattr(theirs, f"{name}_"), rtol=1e-6
            )
        turned = np.sign(np.sum(ours.components_ * theirs.components_, axis=1))
        np.testing.assert_allclose(ours.components_, turned[:, None] * theirs.components_, 1e-6)
    np.testing.assert_allclose(ours.transform(rows), turned * theirs.transform(rows), atol=1e-4)
    # The noise is all variance that the components leave, as fit has it.
    total = ours.explained_variance_.sum() + 3 * ours.noise_variance_
    assert total == pytest.approx(rows.var(axis=0, ddof=1).sum())
    assert np.isfinite(ours.score(rows))


def test_all_components_in_batches_are_those_of_fit():
    ours = xlvlm_jax.PCA().fit(X[:30]).partial_fit(X[30:40]).partial_fit(X[40:])
    whole = xlvlm_jax.PCA().fit(X)
    for name in ("components_", "explained_variance_", "mean_", "n_samples_", "noise_variance_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(whole, name), atol=1e-3)
    np.testing.assert_allclose(ours.get_precision() @ ours.get_covariance(), np.eye(5), atol=1e-3)
    with pytest.raises(ValueError, match=r"n_components=0.9 is a share of the variance, which"):
        xlvlm_jax.PCA(0.9).partial_fit(X)
    with pytest.raises(ValueError, match=r"n_components=4 must be between 1 and min.*=3"):
        xlvlm_jax.PCA(4).partial_fit(X[:3])
    with pytest.raises(ValueError, match="n_components=2, but earlier batches were fitted with 5"):
        ours.set_params(n_components=2).partial_fit(X)


def test_float64_centres_hold_what_float32_does_not():
    far = X.astype(np.float64) + 1e8
    ours, theirs = (kind(3, init=far[:3], n_init=1).fit(far) for kind in (KMeans, cluster.KMeans))
    assert ours.cluster_centers_.dtype == ours.transform(far).dtype == np.float64
    np.testing.assert_allclose(
        ours.cluster_centers_ - 1e8, theirs.cluster_centers_ - 1e8, atol=1e-4
    )
    np.testing.assert_array_equal(ours.predict(far), theirs.labels_)


def test_predictions_are_made_from_what_was_fitted():
    ours = KMeans(3, random_state=0).fit(X)
    ours.cluster_centers_ = X[:3].copy()
    np.testing.assert_array_equal(ours.predict(X[:3]), [0, 1, 2])
    np.testing.assert_array_equal(np.diag(ours.transform(X[:3])), np.zeros(3))
    scores = xlvlm_jax.PCA(1).fit(X)
    before = scores.transform(X)
    scores.mean_ = scores.mean_ + scores.components_[0]
    np.testing.assert_allclose(scores.transform(X), before - 1, atol=1e-4)
    codes = SemiNMF(2, random_state=0).fit(X)
    codes.components_ = np.eye(2, 5, dtype=np.float32)
    np.testing.assert_allclose(codes.transform(X), np.maximum(X[:, :2] - 1, 0), atol=1e-4)


@pytest.mark.parametrize("estimator", [SemiNMF(2), KMeans(2), xlvlm_jax.PCA(2)])
def test_outputs_are_writable_and_pickles_small(estimator):
    rows = np.tile(X, (50, 1))
    fitted = estimator.fit(rows)
    found = fitted.transform(rows)
    found += 1
    for name, value in vars(fitted).items():
        assert not isinstance(value, np.ndarray) or value.flags.writeable, name
    labels = fitted.labels_.nbytes if hasattr(fitted, "labels_") else 0
    assert len(pickle.dumps(fitted)) < labels + 3000
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.transform(rows) + 1, found)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_output_in_a_frame(library):
    frames = pytest.importorskip(library)
    ours = KMeans(3, random_state=0).set_output(transform=library).fit(X)
    found = ours.transform(X)
    assert isinstance(found, frames.DataFrame)
    assert list(found.columns) == ["kmeans0", "kmeans1", "kmeans2"]
    np.testing.assert_array_equal(ours.predict(X), ours.labels_)
    np.testing.assert_array_equal(found.to_numpy().argmin(axis=1), ours.labels_)


def test_grid_search_needs_no_scoring():
    semi_nmf = SemiNMF(alpha=0.01, n_init=1, random_state=0)
    options = {"cv": 2, "error_score": "raise", "refit": False}
    search = GridSearchCV(semi_nmf, {"n_components": [1, 3]}, **options).fit(X)
    assert search.best_params_ == {"n_components": 3}
    ours, theirs = (
        GridSearchCV(pca, {"n_components": [1, 2, 3]}, **options).fit(X)
        for pca in (xlvlm_jax.PCA(), decomposition.PCA())
    )
    scores = [search.cv_results_["mean_test_score"] for search in (ours, theirs)]
    np.testing.assert_allclose(*scores, rtol=1e-3)
    assert ours.best_params_ == theirs.best_params_


def test_warnings():
    with pytest.warns(ConvergenceWarning, match="KMeans did not converge in max_iter=1 "):
        assert not KMeans(3, max_iter=1, init="random", n_init=1, random_state=0).fit(X).converged_
    with pytest.warns(ConvergenceWarning, match=r"distinct clusters \(2\) found smaller than"):
        KMeans(3, random_state=0).fit(np.repeat(X[:2], 4, axis=0))
    with pytest.warns(RuntimeWarning, match="performing only one init instead of n_init=4"):
        KMeans(3, init=X[:3], n_init=4).fit(X)


def test_distances_of_few_rows_are_in_memory(monkeypatch):
    ours = KMeans(3, random_state=0).fit(X)
    score, labels = ours.score(X), ours.predict(X)
    monkeypatch.setattr(estimators, "DISTANCE_BYTES", 8 * 3 * 7)
    sizes, whole = [], KMeans._labels_and_distances

    def counted(self, rows):
        sizes.append(len(rows))
        return whole(self, rows)

    monkeypatch.setattr(KMeans, "_labels_and_distances", counted)
    assert ours.score(X) == pytest.approx(score, rel=1e-6)
    np.testing.assert_array_equal(ours.predict(X), labels)
    ours.partial_fit(X)
    assert max(sizes) == 7 and sum(sizes) == 4 * len(X)


def test_codes_are_those_of_the_fit_whatever_is_set_later():
    ours = SemiNMF(3, random_state=0).fit(X)
    codes = ours.transform(X)
    np.testing.assert_array_equal(ours.set_params(nonnegative=False).transform(X), codes)


@pytest.mark.parametrize(
    ("estimator", "options", "message"),
    [
        (SemiNMF, {"n_components": 70}, "n_components=70 must be at most n_samples=60"),
        (SemiNMF, {"nonnegative": "False"}, "'nonnegative' parameter of SemiNMF"),
        (SemiNMF, {"max_iter": 0}, "'max_iter' parameter of SemiNMF"),
        (KMeans, {"n_clusters": "3"}, "'n_clusters' parameter of KMeans"),
        (KMeans, {"n_clusters": 61}, "n_samples=60 should be >= n_clusters=61"),
        (
            KMeans,
            {"n_clusters": 3, "init": X[:2]},
            r"centers \(2, 5\) does not match the number of clusters 3",
        ),
        (
            KMeans,
            {"n_clusters": 3, "init": X[:3, :2]},
            "does not match the number of features of the data 5; init mu",
        ),
        (xlvlm_jax.PCA, {"n_components": 0}, "'n_components' parameter of PCA"),
        (xlvlm_jax.PCA, {"n_components": 6}, "n_components=6 must be between 1 and min.*=5"),
    ],
)
@pytest.mark.wrong_types
def test_messages(estimator, options, message):
    with pytest.raises(ValueError, match=message):
        estimator(**options).fit(X)


def test_messages_of_weights():
    with pytest.raises(ValueError, match="Negative values in data passed to `sample_weight`"):
        KMeans(3).fit(X, sample_weight=-np.ones(60))
    with pytest.raises(ValueError, match=r"n_samples=2 should be >= n_clusters=3; .* zero weight"):
        KMeans(3).fit(X, sample_weight=np.arange(60) < 2)


@pytest.mark.wrong_types
@pytest.mark.parametrize("given", ["a", ["a"] * 60, {"a": 1}, [None] * 60])
def test_weights_that_are_not_numbers(given):
    expected = r"sample_weight must have shape \(60,\), one number per row; got "
    with pytest.raises(ValueError, match=expected + re.escape(repr(given)[:20])):
        KMeans(3).fit(X, sample_weight=given)
    with pytest.raises(ValueError, match=expected + re.escape(repr(given)[:20])):
        xlvlm_jax.decompose(X, 3, "kmeans", key=jax.random.key(0), sample_weight=given)


def test_weights_may_be_torchs_or_one_number():
    torch = pytest.importorskip("torch")
    weights = 1 + np.arange(60, dtype=np.float32) % 4
    ours = KMeans(3, random_state=0).fit(X, sample_weight=torch.tensor(weights).bfloat16())
    np.testing.assert_array_equal(
        ours.counts_, KMeans(3, random_state=0).fit(X, sample_weight=weights).counts_
    )
    assert KMeans(3, random_state=0).fit(X, sample_weight=2.0).counts_.sum() == 120


@pytest.mark.parametrize(
    "estimator", [SemiNMF(2, n_init=1, tol=1e-3), KMeans(3), xlvlm_jax.PCA(2)], ids=repr
)
def test_rows_of_torch_and_jax_keep_their_dtype(estimator):
    """scikit-learn's checks convert torch tensors to float64, and do not support bfloat16."""
    torch = pytest.importorskip("torch")
    estimator.set_params(random_state=0)
    expected = estimator.fit(X).transform(X)
    for rows in (torch.tensor(X, requires_grad=True), jnp.asarray(X)):
        found = estimator.fit(rows).transform(rows)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
    half = np.asarray(torch.tensor(X).bfloat16().float())
    expected = estimator.fit(half).transform(half)
    for rows in (torch.tensor(X).bfloat16(), jnp.asarray(half, jnp.bfloat16)):
        found = estimator.fit(rows).transform(rows)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
    assert estimator.fit(X.astype(np.float16)).transform(X.astype(np.float16)).dtype == np.float32
    wide = torch.tensor(X).double()
    assert estimator.fit(wide).transform(wide).dtype == np.float64


def test_messages_after_fit():
    ours = xlvlm_jax.PCA(2).fit(X)
    with pytest.raises(ValueError, match="X has 3 columns, but PCA has 2 components"):
        ours.inverse_transform(X[:, :3])
    with pytest.raises(ValueError, match="a direction without variance has no likelihood"):
        xlvlm_jax.PCA(2).fit(X * [1, 1, 0, 0, 0]).score(X)
