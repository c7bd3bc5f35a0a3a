"""The solvers as scikit-learn estimators: `SemiNMF`, `KMeans`, `PCA`.

They take and give numpy arrays, follow scikit-learn's conventions (attributes of the fit end in an
underscore, `fit` returns self) and pass its `check_estimator`. `xlvlm_jax.decompose` is the same
without them: it takes JAX arrays, meshes and keys.

N samples, D features, K components.
"""

from typing import Any, Self

import jax
import numpy as np
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from xlvlm_jax.concepts import Concepts, decompose, distances, project


class _Solver(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """What the three share: checking X, solving, and keeping the concepts."""

    _concepts: Concepts

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # The solvers compute in float32, whatever comes.
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def _solve(self, X: Any, count: int, method: str, **options: Any) -> np.ndarray:
        """Checks X, solves, and returns X as checked."""
        X = validate_data(self, X, dtype=[np.float32, np.float64], ensure_min_samples=2)
        if count > len(X):
            raise ValueError(
                f"{count} components of n_samples={len(X)}; ask for fewer or give more samples"
            )
        if method == "pca" and count > X.shape[1]:
            raise ValueError(f"{count} components of n_features={X.shape[1]}; ask for fewer")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        given = {name: value for name, value in options.items() if value is not None}
        self._concepts = decompose(X, count, method, key=jax.random.key(seed), **given)
        self.n_iter_ = max(1, self._concepts.iterations)
        self._n_features_out = count
        return X

    def _checked(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return validate_data(self, X, dtype=[np.float32, np.float64], reset=False)

    def transform(self, X: Any) -> np.ndarray:
        """Activations float32[N, K] of the rows of X[N, D]."""
        X = self._checked(X)
        return np.asarray(project(X, self._concepts))


class SemiNMF(_Solver):
    """Semi-NMF: min 1/2 |X - U V|^2 + alpha sum(U) over U >= 0 and |V_k|_2 <= 1.

    Parameters:
        n_components: K.
        alpha: weight of the codes' absolute sum.
        nonnegative: whether codes must be; False gives sparse dictionary learning.
        n_init: starts, of which the best is kept; None for the solver's own number.
        tol, max_iter: when to stop; None for the solver's own.
        random_state: an int, a numpy RandomState or None, as in scikit-learn.

    Attributes:
        components_: float32[K, D], the atoms V.
        objective_: what is minimised, at the end.
        stability_: float32[K], how surely each atom is found again by the other starts; see
            `Concepts`. None where there was one start.
        n_iter_: updates done.
        n_features_in_: D.
    """

    def __init__(
        self,
        n_components: int = 20,
        *,
        alpha: float = 1.0,
        nonnegative: bool = True,
        n_init: int | None = None,
        tol: float | None = None,
        max_iter: int | None = None,
        random_state: Any = None,
    ):
        self.n_components, self.alpha, self.nonnegative = n_components, alpha, nonnegative
        self.n_init = n_init
        self.tol, self.max_iter, self.random_state = tol, max_iter, random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learns the atoms of X[N, D]; y is not used. ValueError for fewer samples than K."""
        self._solve(
            X,
            self.n_components,
            "snmf",
            alpha=self.alpha,
            nonnegative=self.nonnegative,
            n_init=self.n_init,
            tol=self.tol,
            max_iter=self.max_iter,
        )
        self.components_ = np.asarray(self._concepts.components)
        self.objective_ = self._concepts.objective
        self.stability_ = self._concepts.stability
        return self

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Codes[N, K] -> their reconstruction [N, D]."""
        check_is_fitted(self)
        return np.asarray(X) @ self.components_


class KMeans(ClusterMixin, _Solver):
    """K-means by Lloyd's algorithm from k-means++.

    Parameters:
        n_clusters: K.
        n_init: starts, of which the best is kept; None for the solver's own number.
        tol, max_iter: when to stop; None for the solver's own.
        random_state: an int, a numpy RandomState or None.

    Attributes:
        cluster_centers_: float32[K, D].
        labels_: int32[N], the nearest centre of each row.
        inertia_: the sum of squared distances to it.
        n_iter_, n_features_in_: updates done, and D.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        n_init: int | None = None,
        tol: float | None = None,
        max_iter: int | None = None,
        random_state: Any = None,
    ):
        self.n_clusters, self.n_init = n_clusters, n_init
        self.tol, self.max_iter, self.random_state = tol, max_iter, random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learns the centres of X[N, D]; y is not used. ValueError for fewer samples than K."""
        X = self._solve(
            X,
            self.n_clusters,
            "kmeans",
            n_init=self.n_init,
            tol=self.tol,
            max_iter=self.max_iter,
        )
        self.cluster_centers_ = np.asarray(self._concepts.components)
        self.inertia_ = self._concepts.objective
        self.labels_ = np.asarray(distances(X, self._concepts)[0])
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Distances float32[N, K] of the rows of X[N, D] from the centres, as scikit-learn has it.

        `xlvlm_jax.project` gives 1 / (1 + distance) instead.
        """
        return np.asarray(distances(self._checked(X), self._concepts)[1])

    def predict(self, X: Any) -> np.ndarray:
        """The nearest centre int32[N] of each row of X[N, D]."""
        return np.asarray(distances(self._checked(X), self._concepts)[0])


class PCA(_Solver):
    """Principal components by randomised subspace iteration.

    Parameters:
        n_components: K.
        tol, max_iter: when to stop; None for the solver's own.
        random_state: an int, a numpy RandomState or None.

    Attributes:
        components_: float32[K, D], orthonormal.
        mean_: float32[D], float64 where X was; subtracted from every row.
        explained_variance_: float32[K], of the scores, with N - 1 below.
        explained_variance_ratio_: its share of the variance of X.
        n_iter_, n_features_in_: updates done, and D.
    """

    def __init__(
        self,
        n_components: int = 2,
        *,
        tol: float | None = None,
        max_iter: int | None = None,
        random_state: Any = None,
    ):
        self.n_components = n_components
        self.tol, self.max_iter, self.random_state = tol, max_iter, random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learns the components of X[N, D]; y is not used. ValueError for K > min(N, D)."""
        X = self._solve(X, self.n_components, "pca", tol=self.tol, max_iter=self.max_iter)
        self.components_ = np.asarray(self._concepts.components)
        self.mean_ = np.asarray(self._concepts.mean)
        scores = np.asarray(self._concepts.activations)
        self.explained_variance_ = scores.var(axis=0, ddof=1, dtype=np.float64).astype(scores.dtype)
        total = X.var(axis=0, ddof=1, dtype=np.float64).sum().astype(scores.dtype)
        self.explained_variance_ratio_ = self.explained_variance_ / (total if total > 0 else 1)
        return self

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Scores[N, K] -> their reconstruction [N, D]."""
        check_is_fitted(self)
        return np.asarray(X) @ self.components_ + self.mean_
