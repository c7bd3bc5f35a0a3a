"""A pytest plugin that runs scikit-learn's own tests with our KMeans and PCA.

Options that ours lack are accepted and ignored; their tests are skipped, with the reason.
"""

import re

import pytest
import sklearn.cluster
import sklearn.decomposition
from sklearn.base import clone

import xlvlm_jax

# What the names of tests left out have in common (of the module; with parameters): why.
LEFT_OUT = {
    "test_k_means": {
        r"sparse_(matrix|array)|csr": "sparse rows are not taken",
        r"MiniBatchKMeans|minibatch": "another estimator, which does not stand in place",
        r"\[.*elkan|test_warning_elkan|test_kmeans_elkan_results": "there is one algorithm",
        r"test_kmeans_verbose": "fit writes nothing",
        r"test_(relocate_empty_clusters|euclidean_distance|inertia|is_same_clustering)\b"
        r"|test_k(means_plusplus|_means_function)": "a function of scikit-learn, not the estimator",
    },
    "test_pca": {
        r"sparse": "sparse rows are not taken",
        r"^(?!test_pca_solver_equivalence).*\[.*(covariance_eigh|arpack|randomized|auto)"
        r"|test_pca_solver_equivalence.*(arpack|randomized)": "there is one solver: once is enough",
        r"test_pca_svd_solver_auto": "a private attribute: the solver that was chosen",
        r"test_pca_validation": "messages that name the solver",
        r"mle|test_pca_dim": "n_components='mle' is not taken",
        r"test_pca_score3": "n_components=0 is not taken",
        r"test_assess_dimension": "a function of scikit-learn, not the estimator",
        r"array_api": "arrays of other libraries become numpy's",
        r"test_pca_score\[": "whitening does not change the likelihood of ours",
        r"test_pca_zero_noise": "a direction without variance has no likelihood: ours says so",
    },
}


class KMeans(xlvlm_jax.KMeans):
    """Our KMeans with scikit-learn's options, and the private parts that its tests read."""

    def __init__(
        self,
        n_clusters=8,
        *,
        init="k-means++",
        n_init="auto",
        max_iter=300,
        tol=1e-4,
        verbose=0,
        random_state=None,
        copy_x=True,
        algorithm="lloyd",
    ):
        super().__init__(
            n_clusters,
            init=init,
            n_init=n_init,
            max_iter=max_iter,
            tol=tol,
            random_state=random_state,
        )
        self.verbose, self.copy_x, self.algorithm = verbose, copy_x, algorithm

    @property
    def _n_init(self):
        return self._count_starts()

    def _init_centroids(self, X, x_squared_norms, init, random_state, sample_weight, n_centroids):
        one = clone(self).set_params(init=init, n_clusters=n_centroids, random_state=random_state)
        concepts, origin = one._found(X, sample_weight, 1, max_iter=0)
        return origin + concepts.components


class PCA(xlvlm_jax.PCA):
    """Our PCA with scikit-learn's options."""

    def __init__(
        self,
        n_components=None,
        *,
        copy=True,
        whiten=False,
        svd_solver="auto",
        tol=0.0,
        iterated_power="auto",
        n_oversamples=10,
        power_iteration_normalizer="auto",
        random_state=None,
    ):
        super().__init__(n_components, whiten=whiten, random_state=random_state)
        self.tol, self.copy, self.svd_solver = tol, copy, svd_solver
        self.iterated_power, self.n_oversamples = iterated_power, n_oversamples
        self.power_iteration_normalizer = power_iteration_normalizer

    def _solve(self, *arguments, **options):
        # scikit-learn's tol is that of a solver which ours has not.
        return super()._solve(*arguments, **options, tol=xlvlm_jax.PCA().tol)


# Before the modules of tests import them.
sklearn.cluster.KMeans, sklearn.decomposition.PCA = KMeans, PCA


def pytest_collection_modifyitems(config, items):
    """Skips the tests in the table."""
    kept, left_out = [], []
    for item in items:
        table = LEFT_OUT[item.path.stem]
        gone = any(re.search(pattern, item.name) for pattern in table)
        (left_out if gone else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture(autouse=True)
def in_place(request):
    """Replaces the estimators in each test module with ours."""
    for estimator in (KMeans, PCA):
        theirs = getattr(request.module, estimator.__name__, estimator)
        assert theirs is estimator
