"""The solvers as scikit-learn estimators: `SemiNMF`, `KMeans`, `PCA`.

They take and return numpy arrays, follow scikit-learn's conventions (fitted attributes end in an
underscore, `fit` returns self, `set_output` chooses pandas or polars) and pass its
`check_estimator`. Predictions depend only on the fitted attributes. `xlvlm_jax.decompose` offers
the same solvers without these conventions, with JAX arrays, meshes and keys.

Not supported, unlike scikit-learn's estimators, and why:
    sparse X: it would be computed dense; call its `toarray()`.
    KMeans(algorithm=), PCA(svd_solver=, ...): the solvers choose by the shape of X.
    copy, copy_x: X is never written to. verbose: see `decompose(verbose=)`.
    PCA(n_components="mle"), PCA(n_components=0): of no use for concepts.
    sample_weight of SemiNMF and PCA: scikit-learn's NMF and PCA have none either.
    SemiNMF.partial_fit: see `decompose_stored` for rows on disk.

X may be a torch tensor or a JAX array too. Results have the dtype of X, float32 or float64, and
float32 for 16-bit floats. Computation is in float32, for float64 rows of k-means and PCA after
subtracting their mean; in JAX's 64-bit mode (JAX_ENABLE_X64=1) it is in float64 throughout.

N samples, D features, K components.
"""

import warnings
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from xlvlm_jax.concepts.decomposition import decompose, distances, project
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.solvers import pca
from xlvlm_jax.solvers.validation import as_array, as_weights, centred

AUTO_COMPONENTS = 20  # of semi-NMF, if there are as many rows
BLOCK_ROWS = 2**14  # rows that are reconstructed together
DISTANCE_BYTES = 2**28  # of a block of rows whose labels are wanted
RANDOM_STARTS = 10  # of k-means with init="random", as in scikit-learn

_FLOATS: Any = [np.float64, np.float32]  # dtypes of X that are kept
COUNT = Interval(Integral, 1, None, closed="left")
NOT_NEGATIVE = Interval(Real, 0, None, closed="left")
STOPPING = {"tol": [NOT_NEGATIVE], "max_iter": [COUNT], "random_state": ["random_state"]}


def _rows(X: Any) -> Any:
    """Returns what scikit-learn's checks would widen or refuse as an array of numpy's own dtypes.

    Torch tensors (which they make float64) and JAX arrays become numpy arrays, 16-bit floats (of
    which they know no bfloat16) float32. Everything else is unchanged, such as frames with names.
    """
    if isinstance(X, jax.Array) or type(X).__module__.split(".")[0] == "torch":
        X = np.asarray(as_array(X, "X", row="sample"))
    is_short = isinstance(X, np.ndarray) and X.dtype.itemsize == 2
    return X.astype(np.float32) if is_short and jnp.issubdtype(X.dtype, jnp.floating) else X


class _Solver(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """What all three estimators share: checking X, solving, and reporting on the solution."""

    tol: float
    max_iter: int
    random_state: Any
    n_features_in_: int

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _begin(self, X: Any, least: int = 1, reset: bool = True) -> np.ndarray:
        """Checks the parameters and X, which needs `least` rows."""
        self._validate_params()
        X = validate_data(self, _rows(X), dtype=_FLOATS, ensure_min_samples=least, reset=reset)
        return np.asarray(X)

    def _solve(self, X: np.ndarray, count: int, method: str, **options: Any) -> Concepts:
        """Solves with the seed from the random state."""
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        options = {"tol": self.tol, "max_iter": self.max_iter} | options
        return decompose(X, count, method, key=jax.random.key(seed), **options)

    def _end(self, concepts: Concepts) -> None:
        """Stores how the solver ended, and warns if it did not converge."""
        self.n_iter_ = max(1, concepts.iterations)
        self.converged_ = concepts.converged
        if not self.converged_:
            warnings.warn(
                f"{type(self).__name__} did not converge in max_iter={self.max_iter} iterations; "
                "increase max_iter or tol",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _checked(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return np.asarray(validate_data(self, _rows(X), dtype=_FLOATS, reset=False))


class _Linear(_Solver):
    """What the two estimators share whose rows are sums of components."""

    components_: np.ndarray

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)

    def _checked_codes(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = check_array(_rows(X), dtype=_FLOATS)
        if X.shape[1] != self._n_features_out:
            raise ValueError(
                f"X has {X.shape[1]} columns, but {type(self).__name__} has "
                f"{self._n_features_out} components: pass the output of transform"
            )
        return X


class SemiNMF(_Linear):
    """Semi-NMF: min 1/2 |X - U V|^2 + alpha sum(U) over U >= 0 and |V_k|_2 <= 1.

    Parameters:
        n_components: K; "auto" is 20, or the number of samples if that is less.
        alpha: weight of the l1 norm of the codes.
        relative_alpha: whether alpha is in units of the rows' root mean square norm.
        nonnegative: whether codes must be >= 0; False gives sparse dictionary learning.
        n_init: number of starts, of which the best is kept; "auto" is 8 up to 64 components and 2
            above.
        tol, max_iter: when to stop.
        random_state: an int, a numpy RandomState or None, as in scikit-learn.

    Attributes:
        components_: float[K, D], the atoms V.
        n_components_: K.
        alpha_: the weight in the units of X, which `transform` uses.
        nonnegative_: whether the codes of the fit, and so of `transform`, are >= 0.
        objective_: final value of the objective.
        reconstruction_err_: |X - U V|, the Frobenius norm.
        stability_: float[K], how reliably the other starts find each atom again; see `Concepts`.
            None with a single start.
        n_iter_, converged_: number of updates, and whether they were enough.
        n_features_in_: D.

    Examples:
        >>> import numpy as np, xlvlm_jax
        >>> X = np.float32([[0, 3], [0, 5], [4, 0]])
        >>> model = xlvlm_jax.SemiNMF(n_components=2, alpha=0.0, random_state=0).fit(X)
        >>> model.transform(X).shape, bool(model.reconstruction_err_ < 1e-3)
        ((3, 2), True)
    """

    _parameter_constraints: ClassVar[dict] = {
        "n_components": [COUNT, StrOptions({"auto"})],
        "alpha": [NOT_NEGATIVE],
        "relative_alpha": ["boolean"],
        "nonnegative": ["boolean"],
        "n_init": [COUNT, StrOptions({"auto"})],
        **STOPPING,
    }

    def __init__(
        self,
        n_components: int | str = "auto",
        *,
        alpha: float = 1.0,
        relative_alpha: bool = False,
        nonnegative: bool = True,
        n_init: int | str = "auto",
        tol: float = 1e-6,
        max_iter: int = 1000,
        random_state: Any = None,
    ):
        self.n_components, self.alpha, self.relative_alpha = n_components, alpha, relative_alpha
        self.nonnegative, self.n_init = nonnegative, n_init
        self.tol, self.max_iter, self.random_state = tol, max_iter, random_state

    def fit(self, X: Any, y: Any = None) -> "SemiNMF":
        """Learns the atoms of X.

        Args:
            X: float[N, D], the samples.
            y: ignored.

        Raises:
            ValueError: a parameter is invalid, or there are fewer samples than components.
        """
        X = self._begin(X)
        asked = self.n_components
        count = min(AUTO_COMPONENTS, len(X)) if isinstance(asked, str) else asked
        if count > len(X):
            raise ValueError(
                f"n_components={count} must be at most n_samples={len(X)}; use fewer components "
                "or more samples"
            )
        concepts = self._solve(
            X,
            count,
            "snmf",
            alpha=self.alpha,
            relative_alpha=bool(self.relative_alpha),
            nonnegative=bool(self.nonnegative),
            n_init=None if self.n_init == "auto" else self.n_init,
        )
        self.components_ = np.array(concepts.components, X.dtype)
        self.n_components_ = len(self.components_)
        self.alpha_ = concepts.options["alpha"]
        self.nonnegative_ = concepts.options["nonnegative"]
        self.objective_ = concepts.objective
        self.reconstruction_err_ = self._error(X, concepts.activations)
        self.stability_ = None if concepts.stability is None else np.array(concepts.stability)
        self._end(concepts)
        return self

    def _codes(self, X: np.ndarray) -> Float[jax.Array, "N K"]:
        options = {"alpha": self.alpha_, "nonnegative": self.nonnegative_}
        return project(X, Concepts(self.components_, options=options))

    def _error(self, X: np.ndarray, codes: Any) -> float:
        codes, atoms = np.asarray(codes), self.components_.astype(codes.dtype)
        blocks = range(0, len(X), BLOCK_ROWS)
        parts = ((slice(start, start + BLOCK_ROWS)) for start in blocks)
        # Sums in float64; products in the codes' dtype, as in JAX.
        return sum(_energy(X[part] - codes[part] @ atoms) for part in parts) ** 0.5

    def transform(self, X: Any) -> np.ndarray:
        """Returns the codes[N, K] of the rows of X[N, D]."""
        X = self._checked(X)
        return np.array(self._codes(X), X.dtype)

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Returns the reconstruction [N, D] of codes[N, K]."""
        return self._checked_codes(X) @ self.components_

    def score(self, X: Any, y: Any = None) -> float:
        """Returns the share of the squared norm of X that the codes explain.

        Args:
            X: float[N, D], the samples.
            y: ignored.
        """
        X = self._checked(X)
        energy = _energy(X)
        return 1 - self._error(X, self._codes(X)) ** 2 / energy if energy else 1.0


def _energy(rows: Float[np.ndarray, "N D"]) -> float:
    return float(np.einsum("nd,nd->", rows, rows, dtype=np.float64))


class KMeans(ClusterMixin, _Solver):
    """K-means by Lloyd's algorithm.

    Parameters:
        n_clusters: K.
        init: "k-means++"; "random" for random rows; centres [K, D]; or a function of X, n_clusters
            and random_state that returns them.
        n_init: number of starts, of which the best is kept; "auto" is 10 for "random" and for a
            function, 1 otherwise. Starts of "k-means++" are compared on a sample of the rows.
        tol, max_iter: when to stop; tol as in scikit-learn.
        random_state: an int, a numpy RandomState or None.

    Attributes:
        cluster_centers_: float[K, D].
        labels_: int32[N], the nearest centre of each row.
        inertia_: the (weighted) sum of squared distances to the nearest centres.
        counts_: float64[K], the number, or total weight, of the samples of each centre.
        n_iter_, converged_: number of updates, and whether they were enough.
        n_features_in_: D.

    Examples:
        >>> import numpy as np, xlvlm_jax
        >>> X = np.float32([[0, 1], [0, 2], [3, 0], [5, 0]])
        >>> model = xlvlm_jax.KMeans(n_clusters=2, random_state=0).fit(X)
        >>> sorted(model.cluster_centers_.tolist()), model.inertia_
        ([[0.0, 1.5], [4.0, 0.0]], 2.5)
    """

    _parameter_constraints: ClassVar[dict] = {
        "n_clusters": [COUNT],
        "init": [StrOptions({"k-means++", "random"}), callable, "array-like"],
        "n_init": [COUNT, StrOptions({"auto"})],
        **STOPPING,
    }

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: str | np.ndarray | Callable[..., np.ndarray] = "k-means++",
        n_init: int | str = "auto",
        tol: float = 1e-4,
        max_iter: int = 300,
        random_state: Any = None,
    ):
        self.n_clusters, self.init, self.n_init = n_clusters, init, n_init
        self.tol, self.max_iter, self.random_state = tol, max_iter, random_state

    @property
    def _n_features_out(self) -> int:
        return len(self.cluster_centers_)

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "KMeans":
        """Learns the centres of X[N, D]; y is ignored.

        Args:
            X: float[N, D], the samples.
            y: ignored.
            sample_weight: float[N], weight of each sample: an integer weight equals that many
                copies; None for equal weights.

        Raises:
            ValueError: a parameter is invalid, a weight is negative, or there are fewer samples (of
                positive weight) than clusters.
        """
        X = self._begin(X)
        weights = self._checked_weights(X, sample_weight)
        concepts, origin = self._found(X, weights, self._count_starts())
        self.cluster_centers_ = origin + np.array(concepts.components, X.dtype)
        self.inertia_ = concepts.objective
        self.labels_ = self._nearest(X)[0]
        self.counts_ = np.bincount(self.labels_, weights, self.n_clusters).astype(np.float64)
        self._end(concepts)
        distinct = len(np.unique(self.labels_))
        if distinct < self.n_clusters:
            warnings.warn(
                f"Number of distinct clusters ({distinct}) found smaller than n_clusters "
                f"({self.n_clusters}). Possibly due to duplicate points in X; otherwise use fewer "
                "clusters",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "KMeans":
        """Continues with one batch of samples, like scikit-learn's `MiniBatchKMeans`.

        Each centre moves to the mean of all samples that were nearest to it when they arrived. The
        first batch gives the initial centres, from one start, unless `fit` was called before; it
        needs at least as many samples as clusters. A centre far from all samples stays in place and
        is not reassigned. Sets `cluster_centers_` and `counts_`, and `labels_` and `inertia_` of
        this batch.

        Args:
            X: float[N, D], the samples of the batch.
            y: ignored.
            sample_weight: float[N], as for `fit`.

        Raises:
            ValueError: as for `fit`, or n_clusters has changed.

        Source: Sculley, "Web-scale k-means clustering", 2010.
        """
        first = not hasattr(self, "cluster_centers_")
        X = self._begin(X, reset=first)
        weights = self._checked_weights(X, sample_weight)
        if first:
            concepts, origin = self._found(X, weights, 1, max_iter=0)
            self.cluster_centers_ = origin + np.array(concepts.components, X.dtype)
            self.counts_ = np.zeros(self.n_clusters)
        else:
            _require_unchanged("n_clusters", self.n_clusters, len(self.cluster_centers_))
        labels, N = self._nearest(X)[0], len(X)
        weights = np.ones(N) if weights is None else weights
        counts = self.counts_ + np.bincount(labels, weights, self.n_clusters)
        members = csr_array((weights, (labels, np.arange(N))), (self.n_clusters, N))
        apart = X.astype(np.float64) - self.cluster_centers_[labels]
        moved = (members @ apart) / np.where(counts > 0, counts, 1)[:, None]
        self.cluster_centers_ = (self.cluster_centers_ + moved).astype(self.cluster_centers_.dtype)
        self.counts_ = counts
        self.labels_, apart = self._nearest(X)
        self.inertia_ = _inertia(apart, weights)
        return self

    def _checked_weights(self, X: np.ndarray, given: Any) -> Float[np.ndarray, " N"] | None:
        if given is None:
            return None
        given = given if isinstance(given, Real) else as_weights(given, len(X))
        return _check_sample_weight(given, X, dtype=np.float64, ensure_non_negative=True)

    def _found(
        self, X: np.ndarray, weights: Float[np.ndarray, " N"] | None, starts: int, **options: Any
    ) -> tuple[Concepts, Float[np.ndarray, " D"]]:
        """Returns the best of several starts, and the origin that its centres are relative to."""
        if weights is not None:
            X, weights = X[weights > 0], weights[weights > 0]
            options["sample_weight"] = weights
        if self.n_clusters > len(X):
            raise ValueError(
                f"n_samples={len(X)} should be >= n_clusters={self.n_clusters}; use fewer "
                "clusters or more samples (samples of zero weight do not count)"
            )
        # For rows far from zero, float32 holds only their differences from the mean, and so the
        # centres'.
        wide = X.dtype == np.float64 and not jax.config.values["jax_enable_x64"]
        origin = X.mean(axis=0) if wide else np.zeros(X.shape[1], X.dtype)
        near = centred(X, origin) if wide else X
        if isinstance(self.init, str) and self.init == "k-means++":
            firsts = [{"n_init": starts}]
        else:
            random = check_random_state(self.random_state)
            firsts = [
                {"init": self._first_centers(X, weights, random) - origin} for _ in range(starts)
            ]
        options["activations"] = False  # labels are enough, and computed later
        found = [
            self._solve(near, self.n_clusters, "kmeans", **options, **first) for first in firsts
        ]
        return min(found, key=lambda concepts: concepts.objective or 0.0), origin

    def _count_starts(self) -> int:
        """Returns the number of starts that `n_init` means for this kind of `init`."""
        drawn = isinstance(self.init, str) or callable(self.init)
        if isinstance(self.n_init, str):  # "auto"
            seeded = isinstance(self.init, str) and self.init == "k-means++"
            return RANDOM_STARTS if drawn and not seeded else 1
        if drawn or self.n_init == 1:
            return self.n_init
        warnings.warn(
            "Explicit initial center position passed: performing only one init instead of "
            f"n_init={self.n_init}; set n_init to 1",
            RuntimeWarning,
            stacklevel=3,
        )
        return 1

    def _first_centers(
        self,
        X: np.ndarray,
        weights: Float[np.ndarray, " N"] | None,
        random: np.random.RandomState,
    ) -> Float[np.ndarray, "K D"]:
        K, D = self.n_clusters, X.shape[1]
        if isinstance(self.init, str):
            shares = None if weights is None else weights / weights.sum()
            return X[random.choice(len(X), K, replace=False, p=shares)]
        given = self.init(X, K, random_state=random) if callable(self.init) else self.init
        dtype: Any = X.dtype
        centers = check_array(_rows(given), dtype=dtype, input_name="init")
        for axis, (wanted, what) in enumerate([(K, "clusters"), (D, "features of the data")]):
            if centers.shape[axis] != wanted:
                raise ValueError(
                    f"The shape of the initial centers {centers.shape} does not match the number "
                    f"of {what} {wanted}; init must have shape ({K}, {D})"
                )
        return centers

    def _labels_and_distances(
        self, X: np.ndarray
    ) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, "N K"]]:
        labels, apart = distances(X, Concepts(self.cluster_centers_, method="kmeans"))
        return np.array(labels, np.int32), np.array(apart, X.dtype)

    def _nearest(self, X: np.ndarray) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
        """Returns the nearest centre of each row, and its distance."""
        labels, apart = np.empty(len(X), np.int32), np.empty(len(X), X.dtype)
        # Distances of a block of rows at a time, as of all they may be far larger than the rows.
        size = max(DISTANCE_BYTES // (8 * self.n_clusters), 1)
        for start in range(0, len(X), size):
            part = slice(start, start + size)
            labels[part], of_all = self._labels_and_distances(X[part])
            apart[part] = of_all.min(axis=1)
        return labels, apart

    def transform(self, X: Any) -> np.ndarray:
        """Returns the distances[N, K] of the rows of X[N, D] from the centres, like scikit-learn.

        `xlvlm_jax.project` returns 1 / (1 + distance) instead.
        """
        return self._labels_and_distances(self._checked(X))[1]

    def predict(self, X: Any) -> np.ndarray:
        """Returns the nearest centre, int32[N], of each row of X[N, D]."""
        return self._nearest(self._checked(X))[0]

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Returns minus the sum of squared distances to the nearest centres.

        Args:
            X: float[N, D], the samples.
            y: ignored.
            sample_weight: float[N], as for `fit`.
        """
        X = self._checked(X)
        weights = self._checked_weights(X, sample_weight)
        return -_inertia(self._nearest(X)[1], 1 if weights is None else weights)


def _require_unchanged(name: str, asked: int, fitted: int) -> None:
    """Raises ValueError if a number of components is not that of earlier batches."""
    if asked != fitted:
        raise ValueError(
            f"{name}={asked}, but earlier batches were fitted with {fitted}; call fit to start "
            f"again, or set {name}={fitted}"
        )


def _inertia(apart: Float[np.ndarray, " N"], weights: Any) -> float:
    return float(np.sum(weights * apart.astype(np.float64) ** 2))


class PCA(_Linear):
    """Principal components by block Lanczos iteration, or from the covariance of few columns.

    Parameters:
        n_components: K; None for min(N, D), the maximum; between 0 and 1 for as many as explain
            more than that share of the variance.
        whiten: whether scores are divided by their standard deviation.
        tol, max_iter: when to stop.
        random_state: an int, a numpy RandomState or None.

    Attributes:
        components_: float[K, D], orthonormal.
        n_components_: K.
        mean_: float[D], subtracted from every row.
        explained_variance_: float[K], variance of the scores, normalised by N - 1.
        explained_variance_ratio_: its share of the variance of X.
        singular_values_: float[K], of the centred rows.
        noise_variance_: the mean variance of the other min(N, D) - K directions.
        n_iter_, converged_: number of updates, and whether they were enough.
        n_samples_, n_features_in_: N and D.

    Examples:
        >>> import numpy as np, xlvlm_jax
        >>> X = np.float32([[1, 0], [2, 0], [3, 0.1], [4, 0]])
        >>> model = xlvlm_jax.PCA(n_components=1, random_state=0).fit(X)
        >>> model.explained_variance_ratio_.round(2).tolist(), model.transform(X).shape
        ([1.0], (4, 1))
    """

    _parameter_constraints: ClassVar[dict] = {
        "n_components": [COUNT, Interval(Real, 0, 1, closed="neither"), None],
        "whiten": ["boolean"],
        **STOPPING,
    }

    def __init__(
        self,
        n_components: int | float | None = None,
        *,
        whiten: bool = False,
        tol: float = 1e-5,
        max_iter: int = 100,
        random_state: Any = None,
    ):
        self.n_components, self.whiten = n_components, whiten
        self.tol, self.max_iter, self.random_state = tol, max_iter, random_state

    def fit(self, X: Any, y: Any = None) -> "PCA":
        """Learns the components of X.

        Args:
            X: float[N, D], the samples.
            y: ignored.

        Raises:
            ValueError: a parameter is invalid, or n_components > min(N, D).
        """
        X = self._begin(X, least=2)
        N, most = len(X), min(X.shape)
        asked = self.n_components
        share = None if asked is None or isinstance(asked, Integral) else float(asked)
        count = most if share is not None else self._count_components(X)
        concepts = self._solve(X, count, "pca")
        scores = np.asarray(concepts.activations)
        variance = np.einsum("nk,nk->k", scores, scores, dtype=np.float64) / (N - 1)
        left = 2 * (concepts.objective or 0.0) / (N - 1)
        total = variance.sum() + left
        ratio = variance / (total if total > 0 else 1)
        if share is not None:
            enough = np.searchsorted(np.cumsum(ratio), share, side="right") + 1
            count = min(int(enough), most)
        kept = slice(count)
        self.n_samples_, self.n_components_ = N, count
        self.components_ = np.array(concepts.components[kept], X.dtype)
        self.mean_ = np.array(concepts.mean, X.dtype)
        self._keep_variances(variance[kept], variance[count:].sum() + left)
        self._end(concepts)
        return self

    def partial_fit(self, X: Any, y: Any = None) -> "PCA":
        """Continues with one batch of samples, like scikit-learn's `IncrementalPCA`.

        The components are those of the batch together with the part of earlier batches that the
        earlier components explain. Variance that shows only over many batches is therefore lost;
        mean and total variance are exact. Continues from `fit` too.

        Args:
            X: float[N, D], the samples of the batch.
            y: ignored.

        Raises:
            ValueError: a parameter is invalid, the first batch has fewer samples than components,
                n_components is a share of the variance, which a first batch cannot determine, or
                it has changed.

        Source: Ross, Lim, Lin and Yang, "Incremental learning for robust visual tracking", 2008.
        """
        first = not hasattr(self, "components_")
        X = self._begin(X, least=2 if first else 1, reset=first)
        if not first and isinstance(self.n_components, Integral):
            _require_unchanged("n_components", int(self.n_components), self.n_components_)
        rows, N = X.astype(np.float64), len(X)
        mean = rows.mean(axis=0)
        rows -= mean
        energy = np.sum(rows**2)  # of all rows about their mean
        count, seen = self._count_components(X) if first else self.n_components_, 0
        if not first:
            seen, before = self.n_samples_, self.mean_.astype(np.float64)
            apart = np.sqrt(seen * N / (seen + N)) * (before - mean)
            energy += (seen - 1) * self._total_variance + np.sum(apart**2)
            explained = self.singular_values_[:, None] * self.components_
            rows = np.vstack([explained, rows, apart])
            mean = before + (mean - before) * N / (seen + N)
        _, lengths, axes = np.linalg.svd(rows, full_matrices=False)
        self.n_samples_, self.n_components_ = seen + N, count
        self.components_ = np.array(pca.with_signs(jnp.asarray(axes[:count])), X.dtype)
        self.mean_ = mean.astype(X.dtype)
        variance = lengths[:count] ** 2 / (self.n_samples_ - 1)
        self._keep_variances(variance, energy / (self.n_samples_ - 1) - variance.sum())
        return self

    def _count_components(self, X: np.ndarray) -> int:
        """Returns the number of components, which must not be given as a share of the variance."""
        most, count = min(X.shape), self.n_components
        if count is None:
            return most
        if not isinstance(count, Integral):
            raise ValueError(
                f"n_components={count} is a share of the variance, which needs all samples; give "
                "a number of components, or call fit"
            )
        if count > most:
            raise ValueError(
                f"n_components={count} must be between 1 and min(n_samples, n_features)={most}"
            )
        return int(count)

    def _keep_variances(self, variance: Float[np.ndarray, " K"], beyond: float) -> None:
        """Stores the components' variances, and the noise variance of what they leave."""
        dtype, N = self.components_.dtype, self.n_samples_
        total = variance.sum() + beyond
        self.explained_variance_ = variance.astype(dtype)
        self.explained_variance_ratio_ = (variance / (total if total > 0 else 1)).astype(dtype)
        self.singular_values_ = np.sqrt(variance * (N - 1)).astype(dtype)
        self.noise_variance_ = max(float(beyond), 0.0) / self._left if self._left else 0.0

    @property
    def _left(self) -> int:
        """Number of directions with variance beyond the components."""
        return min(self.n_samples_, self.n_features_in_) - self.n_components_

    @property
    def _total_variance(self) -> float:
        return self.explained_variance_.sum(dtype=np.float64) + self._left * self.noise_variance_

    def _scores(self, X: np.ndarray) -> Float[np.ndarray, "N K"]:
        return np.array(
            project(X, Concepts(self.components_, method="pca", mean=self.mean_)), X.dtype
        )

    @property
    def _scale(self) -> Float[np.ndarray, " K"]:
        """Divisor of whitened scores, bounded away from zero."""
        deviation = np.sqrt(self.explained_variance_)
        return np.maximum(deviation, np.finfo(deviation.dtype).eps)

    def transform(self, X: Any) -> np.ndarray:
        """Returns the scores[N, K] of the rows of X[N, D]."""
        X = self._checked(X)
        scores = self._scores(X)
        return (scores / self._scale).astype(X.dtype) if self.whiten else scores

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Returns the reconstruction [N, D] of scores[N, K]."""
        X = self._checked_codes(X)
        return (X * self._scale if self.whiten else X) @ self.components_ + self.mean_

    def get_covariance(self) -> Float[np.ndarray, "D D"]:
        """Returns the model's covariance: the components' variances, and noise elsewhere."""
        check_is_fitted(self)
        # If N < D, more directions are left out than the noise is averaged over.
        beyond = np.maximum(self.explained_variance_ - self.noise_variance_, 0)
        covariance = (self.components_.T * beyond) @ self.components_
        return covariance + self.noise_variance_ * np.eye(self.n_features_in_)

    def get_precision(self) -> Float[np.ndarray, "D D"]:
        """Returns the inverse of `get_covariance`."""
        return np.linalg.inv(self.get_covariance())

    def score_samples(self, X: Any) -> Float[np.ndarray, " N"]:
        """Returns the log-likelihood of each row of X[N, D] under the probabilistic model.

        The model is a normal distribution with the covariance of `get_covariance`.

        Raises:
            ValueError: a direction has no variance, so there is no density.

        Source: Tipping and Bishop, "Probabilistic principal component analysis", 1999.
        """
        X = self._checked(X)
        variance = self.explained_variance_.astype(np.float64)
        D, left = self.n_features_in_, self.n_features_in_ - self.n_components_
        # A variance at rounding level counts as zero.
        least = np.finfo(np.float32).eps * variance[0]
        if not variance[-1] > least or (left and not self.noise_variance_ > least):
            raise ValueError("a direction without variance has no likelihood; use fewer components")
        scores = self._scores(X).astype(np.float64)
        apart = (X - self.mean_).astype(np.float64)
        inside = np.sum(scores**2 / variance, axis=1) + np.log(variance).sum()
        if not left:
            return -0.5 * (inside + D * np.log(2 * np.pi))
        beyond = np.maximum(np.sum(apart**2, axis=1) - np.sum(scores**2, axis=1), 0)
        noise = beyond / self.noise_variance_ + left * np.log(self.noise_variance_)
        return -0.5 * (inside + noise + D * np.log(2 * np.pi))

    def score(self, X: Any, y: Any = None) -> float:
        """Returns the mean log-likelihood of the rows, see `score_samples`.

        Args:
            X: float[N, D], the samples.
            y: ignored.
        """
        return float(self.score_samples(X).mean())
