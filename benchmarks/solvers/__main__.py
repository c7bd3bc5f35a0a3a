"""Solvers against scikit-learn: seconds to the same objective, and share of the machine's limit.

    python -m benchmarks.solvers --quick     # planted matrix [600, 256], under a minute
    python -m benchmarks.solvers             # planted matrix and states, [600, 256], some minutes
    python -m benchmarks.solvers --full      # [3000, 4096] too: scikit-learn needs most of the time
    python -m benchmarks.solvers --rows 5000 --width 512 --concepts 64

Every case runs both sides in turn, `--repeats` times or until scikit-learn has used `--budget`
seconds, and gives medians. The first run of ours is counted apart: it compiles. Objectives are
computed by us in float64, for both sides in the same way. Peers run to convergence:

    snmf      DictionaryLearning(positive_code, fit_algorithm="cd", transform_algorithm="lasso_cd")
    kmeans    KMeans(algorithm="lloyd", n_init=1) from the same centroids
    pca       PCA with the solver that it picks; the objective is minus the explained variance

"limit" is what an update cannot beat on this machine, measured in the same process: the longer of
reading Z once and doing the update's two products with Z at the rate of a large matrix product.
Measure with numpy's default BLAS kernel selection: unset OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA, DictionaryLearning

from benchmarks.measure import save, seconds
from xlvlm_jax.concepts import Concepts, decompose
from xlvlm_jax.solvers import kmeans, pca, semi_nmf
from xlvlm_jax.solvers.loop import begin, run

KEY = jax.random.key(0)
SMALL, LARGE = (600, 256, 12), (3000, 4096, 20)


def planted(N: int, D: int, K: int, seed: int = 0) -> np.ndarray:
    """K unit atoms with sparse non-negative codes, and noise."""
    rng = np.random.default_rng(seed)
    codes = 10 * rng.exponential(size=(N, K)) * (rng.random((N, K)) < 0.3)
    atoms = rng.normal(size=(K, D))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    return (codes @ atoms + 0.1 * rng.normal(size=(N, D))).astype(np.float32)


def states(N: int, D: int, K: int, seed: int = 0) -> np.ndarray:
    """Like a model's states: one large common direction, K clusters, heavy tails, slow decay."""
    rng = np.random.default_rng(seed)
    common = rng.standard_t(3, size=D)
    common *= 40 / np.linalg.norm(common)
    width = min(D, 200)
    basis = np.linalg.qr(rng.normal(size=(D, width)))[0].T
    spread = 30 * np.arange(1, width + 1) ** -0.7
    centres = 0.7 * rng.normal(size=(K, width)) * spread
    within = 0.5 * rng.standard_t(4, size=(N, width)) * spread
    rows = common + (centres[rng.integers(0, K, N)] + within) @ basis
    return (rows + 0.2 * rng.standard_t(4, size=(N, D))).astype(np.float32)


# What each method minimises, from the arrays, in float64.


def snmf_objective(Z: np.ndarray, codes: Any, atoms: Any) -> float:
    """1/2 |Z - U V|^2 + sum(U)."""
    codes, atoms = np.asarray(codes, np.float64), np.asarray(atoms, np.float64)
    return float(0.5 * np.sum((Z - codes @ atoms) ** 2) + codes.sum())


def inertia(Z: np.ndarray, centroids: Any) -> float:
    """Sum of squared distances to the nearest centroid."""
    centroids = np.asarray(centroids, np.float64)
    squared = np.sum(centroids**2, axis=1) - 2 * Z.astype(np.float64) @ centroids.T
    nearest = centroids[squared.argmin(axis=1)]
    return float(np.sum((Z - nearest) ** 2))


def minus_explained(Z: np.ndarray, components: Any) -> float:
    """Minus the sum of squares that the orthonormal components explain."""
    return -float(np.sum(((Z - Z.mean(axis=0, dtype=np.float64)) @ np.asarray(components).T) ** 2))


# One method: ours, the peer, the objective, and ten updates on the whole of Z.


def snmf_case(Z: np.ndarray, on_device: jax.Array, K: int) -> tuple:
    """Semi-NMF and DictionaryLearning, alpha = 1."""
    peer = DictionaryLearning(
        K,
        alpha=1.0,
        transform_alpha=1.0,
        fit_algorithm="cd",
        transform_algorithm="lasso_cd",
        positive_code=True,
        max_iter=1000,
        random_state=0,
    )

    def theirs() -> tuple:
        codes = peer.fit_transform(Z)
        return codes, peer.components_

    def objective(result: Any) -> float:
        if isinstance(result, Concepts):
            result = result.activations, result.components
        return snmf_objective(Z, *result)

    energy = 0.5 * jnp.sum(on_device**2, axis=1)
    problem = semi_nmf.Problem(on_device, energy, jnp.float32(1))
    atoms = on_device[:K] / jnp.linalg.norm(on_device[:K], axis=1, keepdims=True)
    state = semi_nmf.init(problem, jnp.zeros((K, len(Z))), atoms)
    ours = partial(decompose, on_device, K, "snmf", key=KEY)
    return ours, theirs, objective, (semi_nmf.update, problem, state), K


def kmeans_case(Z: np.ndarray, on_device: jax.Array, K: int) -> tuple:
    """K-means from the same rows."""
    start = Z[np.random.default_rng(0).choice(len(Z), K, replace=False)]
    peer = KMeans(K, init=start, n_init=1, algorithm="lloyd")

    def objective(result: Any) -> float:
        centroids = result.components if isinstance(result, Concepts) else result.cluster_centers_
        return inertia(Z, centroids)

    problem = kmeans.prepare(on_device, len(Z))
    state = kmeans.init(problem, jnp.asarray(start))
    ours = partial(decompose, on_device, K, "kmeans", key=KEY, init=start)
    return ours, partial(peer.fit, Z), objective, (kmeans.update, problem, state), K


def pca_case(Z: np.ndarray, on_device: jax.Array, K: int) -> tuple:
    """Principal components and the scores of the rows."""
    peer = PCA(K, random_state=0)

    def theirs() -> PCA:
        peer.fit_transform(Z)
        return peer

    def objective(result: Any) -> float:
        components = result.components if isinstance(result, Concepts) else result.components_
        return minus_explained(Z, components)

    width = min(K + pca.OVERSAMPLE, *Z.shape)
    problem = pca.prepare(on_device, len(Z))
    state = pca.init(problem, jax.random.normal(KEY, (Z.shape[1], width)), K)
    ours = partial(decompose, on_device, K, "pca", key=KEY)
    return ours, theirs, objective, (partial(pca.update, num_concepts=K), problem, state), width


CASES = {"snmf": snmf_case, "kmeans": kmeans_case, "pca": pca_case}


def pace(updating: tuple, Z: jax.Array, width: int, repeats: int) -> dict[str, float]:
    """Seconds of an update on the whole of Z, beside reading Z and a large matrix product."""
    update, problem, state = updating

    @jax.jit
    def ten(problem: Any, state: Any) -> Any:
        # error > -inf always holds, so that all ten are done.
        return run(partial(update, problem), begin(state, 10), tol=-jnp.inf, max_iter=10)

    square = jnp.ones((2048, 2048))
    calls = {
        "update": partial(ten, problem, state),
        "read": partial(jax.jit(jnp.sum), Z),
        "product": partial(jax.jit(jnp.matmul), square, square),
    }
    for call in calls.values():
        jax.block_until_ready(call())
    # In turn, so that a busy moment of the machine meets all three.
    times = [{name: seconds(call)[0] for name, call in calls.items()} for _ in range(repeats)]
    update, read, product = (np.array([each[name] for each in times]) for name in calls)
    update, rate = update / 10, 2 * 2048**3 / product
    limit = np.maximum(read, 4 * Z.size * width / rate)
    return {
        "update_seconds": float(np.median(update)),
        "read_seconds": float(np.median(read)),
        "gflops": float(np.median(rate) / 1e9),
        "limit_seconds": float(np.median(limit)),
        "share_of_limit": float(np.median(limit / update)),
    }


def measure(method: str, make: Callable, shape: tuple, repeats: int, budget: float) -> dict:
    """One row of the table."""
    N, D, K = shape
    Z = make(N, D, K)
    on_device = jnp.asarray(Z)
    ours, theirs, objective, updating, width = CASES[method](Z, on_device, K)
    first, result = seconds(ours)
    times, peer_times = [], []
    while len(times) < repeats and sum(peer_times) < budget:
        spent, result = seconds(ours)
        times.append(spent)
        spent, peer = seconds(theirs)
        peer_times.append(spent)
    ours_seconds, peer_seconds = float(np.median(times)), float(np.median(peer_times))
    return {
        "method": method,
        "data": make.__name__,
        "N": N,
        "D": D,
        "K": K,
        "seconds": ours_seconds,
        "compile_seconds": max(0.0, first - ours_seconds),
        "peer_seconds": peer_seconds,
        "times_faster": float(np.median(np.array(peer_times) / np.array(times))),
        "objective": objective(result),
        "peer_objective": objective(peer),
        "objective_ratio": objective(result) / objective(peer),
        "iterations": result.iterations,
        "runs": len(times),
        **pace(updating, on_device, width, repeats),
    }


def table(rows: list[dict]) -> Table:
    """The rows for a reader."""
    shown = Table(title="Solvers against scikit-learn, medians")
    for heading in (
        "method",
        "data",
        "Z, K",
        "ours",
        "compile",
        "scikit-learn",
        "times faster",
        "objective ours / theirs",
        "update",
        "limit",
        "share",
    ):
        shown.add_column(heading, justify="left" if heading in ("method", "data") else "right")
    for row in rows:
        shown.add_row(
            row["method"],
            row["data"],
            f"[{row['N']}, {row['D']}], {row['K']}".replace("[", r"\["),
            f"{row['seconds']:.3f} s",
            f"{row['compile_seconds']:.1f} s",
            f"{row['peer_seconds']:.3f} s",
            f"{row['times_faster']:.1f}",
            f"{row['objective_ratio']:.6f}",
            f"{1e3 * row['update_seconds']:.2f} ms",
            f"{1e3 * row['limit_seconds']:.2f} ms",
            f"{100 * row['share_of_limit']:.0f} %",
        )
    return shown


def main() -> None:
    """Parse, measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the planted matrix [600, 256] alone")
    parser.add_argument("--full", action="store_true", help="[3000, 4096] as well")
    parser.add_argument("--rows", type=int, help="N of one size of your own")
    parser.add_argument("--width", type=int, default=512, help="its D")
    parser.add_argument("--concepts", type=int, default=20, help="its K")
    parser.add_argument("--methods", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--data", nargs="+", choices=("planted", "states"))
    parser.add_argument("--repeats", type=int, default=5, help="paired runs of each case")
    parser.add_argument("--budget", type=float, default=20, help="seconds of scikit-learn a case")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/solvers.json"))
    arguments = parser.parse_args()

    sizes = [SMALL, LARGE] if arguments.full else [SMALL]
    if arguments.rows:
        sizes = [(arguments.rows, arguments.width, arguments.concepts)]
    names = arguments.data or (["planted"] if arguments.quick else ["planted", "states"])
    console = Console()
    # A table in a log file is as wide as it needs to be.
    console.width = max(console.width, 150)
    rows = []
    # scikit-learn's lasso reports every row that misses its own, tighter tolerance.
    warnings.filterwarnings("ignore", module="sklearn")
    for shape in sizes:
        for name in names:
            for method in arguments.methods:
                console.print(f"{method}, {name} {list(shape[:2])}, K = {shape[2]} ...")
                make = {"planted": planted, "states": states}[name]
                rows.append(measure(method, make, shape, arguments.repeats, arguments.budget))
    console.print(table(rows))
    save(arguments.output, rows, "scikit-learn")
    console.print(f"saved to {arguments.output}")


if __name__ == "__main__":
    main()
