"""The other libraries, each with its best settings; a call returns the arguments of the objective.

snmf      codes and atoms       kmeans    centroids       pca       components
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.decomposition import PCA, DictionaryLearning, MiniBatchDictionaryLearning
from threadpoolctl import threadpool_limits

from benchmarks.measure import seconds

Peer = Callable[[], Any]
PACKAGES = ("scikit-learn", "scikit-learn-intelex", "faiss-cpu", "overcomplete")
PATIENCE = 5.0  # seconds: a call that takes longer is not tried with one thread too


def faster(peer: Peer) -> tuple[Peer, float, Any]:
    """Returns the peer with all threads or with one, whichever is faster; its seconds and result.

    Small matrices may take longer with more threads, which wait for each other. Those of sklearnex
    (TBB) are not limited: it always has all.
    """
    spent, result = seconds(peer)
    if spent > PATIENCE:
        return peer, spent, result

    def with_one() -> Any:
        with threadpool_limits(1):
            return peer()

    # Again with all, since the first call also loads libraries and starts threads.
    tried = [(*seconds(call), call) for call in (peer, with_one)]
    spent, result, call = min(tried, key=lambda each: each[0])
    return call, spent, result


def snmf(Z: np.ndarray, K: int, small: bool) -> dict[str, Peer]:
    """Returns the peers for alpha = 1 and non-negative codes; `small` includes DictionaryLearning,
    which then takes minutes.
    """
    shared = {
        "alpha": 1.0,
        "transform_alpha": 1.0,
        "fit_algorithm": "cd",
        "transform_algorithm": "lasso_cd",
        "positive_code": True,
        "random_state": 0,
    }

    def batch() -> tuple:
        model = DictionaryLearning(K, max_iter=1000, **shared)
        codes = model.fit_transform(Z)
        return codes, model.components_

    def minibatch() -> tuple:
        model = MiniBatchDictionaryLearning(K, batch_size=256, max_iter=100, **shared)
        codes = model.fit_transform(Z)
        return codes, model.components_

    found = {"MiniBatchDictionaryLearning": minibatch}
    return {"DictionaryLearning": batch} | found if small else found


def snmf_without_penalty(Z: np.ndarray, K: int) -> dict[str, Peer]:
    """Returns the peer for alpha = 0: the multiplicative SemiNMF of overcomplete (PyTorch)."""
    if "overcomplete" not in sys.modules:
        spec = importlib.util.find_spec("overcomplete")
        if spec is None:
            return {}
        # The package's __init__ imports vision models, which the factorisations do not need.
        package = sys.modules["overcomplete"] = types.ModuleType("overcomplete")
        package.__path__ = list(spec.submodule_search_locations)
    import torch

    SemiNMF = importlib.import_module("overcomplete.optimization.semi_nmf").SemiNMF

    def run() -> tuple:
        model = SemiNMF(nb_concepts=K, device="cpu")
        codes, atoms = model.fit(torch.from_numpy(Z), max_iter=500)
        return codes.numpy(), atoms.numpy()

    return {"overcomplete": run}


def kmeans(Z: np.ndarray, K: int, start: np.ndarray) -> dict[str, Peer]:
    """Returns the peers, from the same centroids; faiss makes as many updates as scikit-learn."""

    def lloyd() -> np.ndarray:
        model = KMeans(K, init=start, n_init=1, algorithm="lloyd").fit(Z)
        updates["count"] = model.n_iter_
        return model.cluster_centers_

    def minibatch() -> np.ndarray:
        return MiniBatchKMeans(K, init=start, n_init=1, batch_size=2048).fit(Z).cluster_centers_

    def faiss_kmeans() -> np.ndarray:
        import faiss

        model = faiss.Kmeans(
            Z.shape[1],
            K,
            niter=updates["count"],
            min_points_per_centroid=1,
            max_points_per_centroid=len(Z),
        )
        model.train(Z, init_centroids=start)
        return model.centroids

    def sklearnex_kmeans() -> np.ndarray:
        from sklearnex.cluster import KMeans

        return KMeans(K, init=start, n_init=1, algorithm="lloyd").fit(Z).cluster_centers_

    updates = {"count": 25}
    found = {"KMeans": lloyd, "MiniBatchKMeans": minibatch}
    found |= {"faiss": faiss_kmeans} if importlib.util.find_spec("faiss") else {}
    return found | (
        {"sklearnex": sklearnex_kmeans} if importlib.util.find_spec("sklearnex") else {}
    )


def pca(Z: np.ndarray, K: int) -> dict[str, Peer]:
    """Returns scikit-learn's PCA and sklearnex's, each with the solver that it chooses."""

    def run(estimator: Callable[..., Any]) -> np.ndarray:
        model = estimator(K, random_state=0)
        model.fit_transform(Z)
        return model.components_

    def of_sklearnex() -> np.ndarray:
        from sklearnex import decomposition

        return run(decomposition.PCA)

    found: dict[str, Peer] = {"PCA": partial(run, PCA)}
    return found | ({"sklearnex": of_sklearnex} if importlib.util.find_spec("sklearnex") else {})
