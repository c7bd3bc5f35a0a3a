"""K-means with many clusters against SuperKMeans, faiss and sklearnex: seconds to the same inertia.

    python -m benchmarks.solvers.many
    taskset -c 1 python -m benchmarks.solvers.many --sizes 20000x512x1024 --cpu
    python -m benchmarks.solvers.many --sizes 1000000x128x65536 --updates 1 --repeats 1 --labels

faiss and sklearnex start from the same rows as ours and make as many updates. SuperKMeans chooses
its own rows and makes `--updates` updates of all rows; ours then makes as many as it needs to be
within 1.0001 of its inertia; if it never is, because it ends in another optimum, as many updates.
With --updates 1 both make one. Ours ends with the inertia of its final centroids, for which all
rows are assigned once more; with --labels SuperKMeans assigns them too.
SuperKMeans-sq8, -lvq4 and -rabitq are its quantized modes, with final centroids from the rows
themselves; SuperKMeans-hierarchical makes its own number of updates, in three stages. Inertia is
computed in float64. Both sides alternate; medians. The others compute no activations, so ours
leaves them out too; --activations adds those of all rows and concepts.
"""

import argparse
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from benchmarks.measure import alternately, save
from benchmarks.solvers import matrices
from benchmarks.solvers.__main__ import KEY, SAME, size_of
from xlvlm_jax.concepts.decomposition import decompose
from xlvlm_jax.solvers.blas_threads import one_thread

SIZES = [
    (20000, 512, 256),
    (20000, 512, 1024),
    (20000, 512, 4096),
    (10000, 4096, 1024),
    (20000, 128, 1024),
]
HIERARCHICAL = "SuperKMeans-hierarchical"
# Modes of SuperKMeans, with their options.
MODES: dict[str, dict[str, Any]] = {
    "SuperKMeans": {"hierarchical": False},
    **{
        f"SuperKMeans-{quantizer}": {
            "hierarchical": False,
            "quantizer": quantizer,
            "full_precision_final_centroids": True,
        }
        for quantizer in ("sq8", "lvq4", "rabitq")
    },
    HIERARCHICAL: {"hierarchical": True},
}
PEERS = (*MODES, "faiss", "sklearnex")


def super_kmeans(
    Z: np.ndarray, K: int, updates: int, threads: int, mode: str, labels: bool
) -> np.ndarray:
    """Returns SuperKMeans's centroids after so many updates of all rows, which it may assign."""
    import superkmeans

    model = superkmeans.SuperKMeans(
        K,
        Z.shape[1],
        **MODES[mode],
        iters=updates,
        sampling_fraction=1.0,
        max_points_per_cluster=len(Z),
        early_termination=False,
        n_threads=threads,
    )
    centroids = model.train(Z)
    if labels:
        model.assign(Z, centroids)
    return centroids


def faiss_kmeans(Z: np.ndarray, start: np.ndarray, updates: int) -> np.ndarray:
    """Returns faiss's centroids."""
    import faiss

    few = {"min_points_per_centroid": 1, "max_points_per_centroid": len(Z)}
    model = faiss.Kmeans(Z.shape[1], len(start), niter=updates, **few)
    model.train(Z, init_centroids=start)
    return model.centroids


def sklearnex_kmeans(Z: np.ndarray, start: np.ndarray, updates: int) -> np.ndarray:
    """Returns sklearnex's centroids."""
    from sklearnex.cluster import KMeans

    settings = {"n_init": 1, "max_iter": updates, "tol": 0, "algorithm": "lloyd"}
    return KMeans(len(start), init=start, **settings).fit(Z).cluster_centers_


def measure(
    data: str, shape: tuple[int, int, int], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yields the rows of the table for one matrix."""
    N, D, K = shape
    Z = getattr(matrices, data)(N, D, min(K, 64))
    start = Z[np.random.default_rng(0).choice(N, K, replace=False)]
    settings = {"key": KEY, "init": start, "tol": 0.0, "activations": arguments.activations}
    ours = partial(decompose, jnp.asarray(Z), K, "kmeans", **settings)
    clock = time.process_time if arguments.cpu else time.perf_counter
    most = arguments.updates

    @cache
    def history(updates: int) -> np.ndarray:
        return np.asarray(ours(max_iter=updates).history)

    threads = len(os.sched_getaffinity(0))
    peers: dict[str, tuple[str, Callable[[], np.ndarray]]] = {
        mode: ("superkmeans", partial(super_kmeans, Z, K, most, threads, mode, arguments.labels))
        for mode in MODES
    }
    peers["faiss"] = "faiss", partial(faiss_kmeans, Z, start, most)
    peers["sklearnex"] = "sklearnex", partial(sklearnex_kmeans, Z, start, most)
    for name, (module, theirs) in peers.items():
        if name not in arguments.peers or importlib.util.find_spec(module) is None:
            continue
        goal, updates = matrices.inertia(Z, theirs()), most
        if name in MODES and most > 1:
            within = SAME * goal
            reached = history(most) <= within
            reached = reached if reached.any() else history(4 * most) <= within
            updates = max(int(np.argmax(reached)), 1) if reached.any() else most
        mine = partial(ours, max_iter=updates)
        found = matrices.inertia(Z, mine().components)
        times = alternately(mine, theirs, arguments.repeats, clock)
        yield {
            "data": data,
            "shape": shape,
            "peer": name,
            "updates": (updates, None if name == HIERARCHICAL else most),
            "labels": arguments.labels,
            "seconds": times.ours,
            "peer_seconds": times.theirs,
            "times_faster": times.ratio,
            "objective_ratio": found / goal,
        }


@one_thread()
def main() -> None:
    """Parse, measure, print, save."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--sizes", nargs="+", type=size_of, default=SIZES, help="NxDxK")
    parser.add_argument("--data", nargs="+", choices=("planted", "states"), default=["states"])
    usual = ["SuperKMeans", "faiss", "sklearnex"]
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=usual)
    parser.add_argument("--updates", type=int, default=25, help="updates of the others")
    parser.add_argument("--labels", action="store_true", help="SuperKMeans assigns its rows too")
    parser.add_argument("--repeats", type=int, default=5, help="paired runs of each case")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds; one thread if pinned")
    parser.add_argument("--activations", action="store_true", help="ours computes these too")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/many.json"))
    arguments = parser.parse_args()
    console, rows = Console(width=160), []
    for shape in arguments.sizes:
        for data in arguments.data:
            for row in measure(data, shape, arguments):
                rows.append(row)
                console.print(
                    f"{data} {list(shape[:2])}, {shape[2]}  {row['peer']}: "
                    f"ours {row['seconds']:.3f} s, {row['updates'][0]} updates; "
                    f"{row['peer_seconds']:.3f} s, {row['updates'][1] or 'its own'}; "
                    f"{row['times_faster']:.2f} times faster, "
                    f"inertia {row['objective_ratio']:.6f}",
                    highlight=False,
                    markup=False,
                )
                save(arguments.output, rows, "superkmeans", "faiss-cpu", "scikit-learn-intelex")


if __name__ == "__main__":
    main()
