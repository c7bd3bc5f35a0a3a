"""Compares the solvers with other libraries: seconds to the same objective.

    python -m benchmarks.solvers --quick      # [600, 256], planted and states, a minute or two
    python -m benchmarks.solvers              # the table of benchmarks/solvers.md, about an hour
    python -m benchmarks.solvers --sizes 5000x512x64 --methods kmeans pca
    python -m benchmarks.solvers --features run/features --concepts 20     # real states

Every case runs both sides alternately, `--repeats` times or until the peer has used `--budget`
seconds, and reports medians. Our first run is reported separately, as it includes compilation.
Peers run with one thread or with all, whichever is faster (sklearnex with all). Objectives are
computed in float64, in the same way for both sides; a ratio below 1 means that ours is lower (for
PCA, whose objective is minus the explained variance, that ours explains less). Ours also runs with
only as many updates as it needs to reach the peer's objective. Unset OPENBLAS_CORETYPE and
OPENBLAS_L2_SIZE, so that numpy chooses its own kernels.
"""

import argparse
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import save, seconds
from benchmarks.solvers import matrices, peers
from benchmarks.solvers.pace import pace
from xlvlm_jax.concepts.decomposition import decompose
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.solvers import kmeans

KEY = jax.random.key(0)
QUICK = {"snmf": [(600, 256, 12)], "kmeans": [(600, 256, 12)], "pca": [(600, 256, 12)]}
FULL = {
    "snmf": [
        (3000, 512, 20),
        (3000, 4096, 20),
        (20000, 512, 20),
        (100000, 512, 20),
        (3000, 512, 256),
        (3000, 4096, 256),
    ],
    "kmeans": [
        (3000, 4096, 20),
        (20000, 512, 256),
        (20000, 512, 1024),
        (10000, 4096, 256),
        (100000, 512, 20),
        (100000, 4096, 20),
    ],
    "pca": [
        (3000, 4096, 20),
        (20000, 512, 20),
        (20000, 512, 256),
        (10000, 4096, 256),
        (100000, 512, 20),
        (100000, 4096, 20),
    ],
}
SAME = 1.0001  # objectives within this factor count as the same
SLOW = 3000  # rows above which DictionaryLearning is omitted; on states it takes tens of minutes

Case = tuple[Callable[[], Concepts], dict[str, peers.Peer], Callable[[Any], float]]


def cases(
    method: str, data: str, Z: np.ndarray, on_device: jax.Array, K: int
) -> Iterator[tuple[str, Case]]:
    """Yields (name, (ours, peers, objective)) of a method."""
    if method == "snmf":
        bearable = data == "planted" and len(Z) <= SLOW and K <= 20
        settings = {"snmf": (1.0, peers.snmf(Z, K, bearable or len(Z) < 1000))}
        settings["snmf, alpha 0"] = (0.0, peers.snmf_without_penalty(Z, K))
        for name, (alpha, found) in settings.items():

            def objective(result: Any, alpha: float = alpha) -> float:
                if isinstance(result, Concepts):
                    result = result.activations, result.components
                return matrices.snmf_objective(Z, *result, alpha)

            yield name, (partial(decompose, on_device, K, key=KEY, alpha=alpha), found, objective)
    elif method == "kmeans":
        ours, start = from_one_start(on_device, Z, K)
        yield (
            method,
            (ours, peers.kmeans(Z, K, start), partial(_of_components, matrices.inertia, Z)),
        )
    else:
        explained = partial(_of_components, matrices.minus_explained, Z)
        # tol: the peer's explained variance to 0.9999.
        ours = partial(decompose, on_device, K, "pca", key=KEY, tol=1e-4)
        yield method, (ours, peers.pca(Z, K), explained)
        # What a user of the others calls instead: their matrix, our default tolerance.
        ours = partial(decompose, Z, K, "pca", key=KEY)
        yield "pca, from numpy", (ours, peers.pca(Z, K), explained)


def from_one_start(given: Any, Z: np.ndarray, K: int) -> tuple[Callable[..., Concepts], np.ndarray]:
    """Returns our k-means of the rows as they are given, and where the others start.

    In a few columns, ours chooses its start, which takes time in ours alone; otherwise it is rows.
    """
    ours = partial(decompose, given, K, "kmeans", key=KEY)
    plan, _ = kmeans.plan(KEY, width=Z.shape[1], num_samples=len(Z), num_concepts=(K,))
    if plan.compressed:
        return ours, np.array(ours(max_iter=0).components)
    start = np.array(Z[np.random.default_rng(0).choice(len(Z), K, replace=False)])
    return partial(ours, init=start), start


def _of_components(objective: Callable, Z: np.ndarray, result: Any) -> float:
    return objective(Z, result.components if isinstance(result, Concepts) else result)


def measure(
    method: str, data: str, Z: np.ndarray, K: int, repeats: int, budget: float
) -> Iterator[dict]:
    """Yields the rows of the table for one matrix."""
    on_device = jnp.asarray(Z)
    speed = pace(method, on_device, K, repeats)
    for name, (ours, found, objective) in cases(method, data, Z, on_device, K):
        first, result = seconds(ours)
        reached = objective(result)
        for peer, run in found.items():
            theirs, spent, other = peers.faster(run)
            goal = objective(other)
            updates = updates_to(goal, ours, result, objective)
            shorter = partial(ours, max_iter=updates)
            times, to_goal, peer_times = [], [], []
            while len(times) < repeats and sum(peer_times) < budget:
                times.append(seconds(ours)[0])
                same = updates == result.iterations
                to_goal.append(times[-1] if same else seconds(shorter)[0])
                # The peer's first run counts, as it does not compile.
                peer_times.append(seconds(theirs)[0] if peer_times else spent)
            ours_seconds = float(np.median(times))
            yield {
                "method": name,
                "data": data,
                "N": Z.shape[0],
                "D": Z.shape[1],
                "K": K,
                "peer": peer,
                "seconds": ours_seconds,
                "compile_seconds": max(0.0, first - ours_seconds),
                "peer_seconds": float(np.median(peer_times)),
                "times_faster": float(np.median(np.array(peer_times) / np.array(times))),
                "seconds_to_peer": float(np.median(to_goal)),
                "times_faster_to_peer": float(np.median(np.array(peer_times) / np.array(to_goal))),
                "objective": reached,
                "peer_objective": goal,
                "objective_ratio": reached / goal,
                "iterations": result.iterations,
                "iterations_to_peer": updates,
                "runs": len(times),
                **speed,
            }


def updates_to(
    goal: float, ours: Callable[..., Concepts], result: Concepts, objective: Callable
) -> int:
    """Returns the updates after which ours is within SAME of a peer's objective, or all of them."""
    within = goal + (SAME - 1) * abs(goal)
    if objective(result) > within:
        return result.iterations
    # If Z is compressed, the history does not include what the columns omit: try different counts.
    # All of them for PCA, whose history is what is left and whose goal is minus what is explained.
    updates = 0 if goal < 0 else max(int(np.argmax(result.history <= within)), 1)
    while updates < result.iterations and objective(ours(max_iter=updates)) > within:
        updates = int(1.25 * updates) + 1
    return min(updates, result.iterations)


COLUMNS: dict[str, Callable[[dict], str]] = {
    "method": lambda row: row["method"],
    "data": lambda row: row["data"],
    "Z, K": lambda row: f"\\[{row['N']}, {row['D']}], {row['K']}",
    "peer": lambda row: row["peer"],
    "ours s": lambda row: f"{row['seconds']:.3f}",
    "peer s": lambda row: f"{row['peer_seconds']:.3f}",
    "times faster": lambda row: f"{row['times_faster']:.1f}",
    "objective ours / peer": lambda row: f"{row['objective_ratio']:.6f}",
    "iterations": lambda row: str(row["iterations"]),
    "to peer's s": lambda row: f"{row['seconds_to_peer']:.3f}",
    "times faster to it": lambda row: f"{row['times_faster_to_peer']:.1f}",
    "update ms": lambda row: f"{1e3 * row['update_seconds']:.2f}",
    "limit ms": lambda row: f"{1e3 * row['limit_seconds']:.2f}",
    "share": lambda row: f"{100 * row['share_of_limit']:.0f} %",
    "beyond Z": lambda row: f"{100 * row['beyond_Z']:.0f} %",
    "compile s": lambda row: f"{row['compile_seconds']:.1f}",
}


def table(rows: list[dict]) -> Table:
    """Returns the rows as a printable table."""
    shown = Table(title="Solvers against other libraries, medians", box=None)
    for heading in COLUMNS:
        shown.add_column(heading)
    for row in rows:
        shown.add_row(*(show(row) for show in COLUMNS.values()))
    return shown


def size_of(text: str) -> tuple[int, int, int]:
    """Returns N, D and K of NxDxK."""
    try:
        N, D, K = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NxDxK, such as 5000x512x64") from None
    return N, D, K


def main() -> None:
    """Parse, measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="[600, 256] alone")
    parser.add_argument("--sizes", nargs="+", type=size_of, help="NxDxK, of your own")
    parser.add_argument("--features", type=Path, help="a features directory instead")
    parser.add_argument("--site", help="its site, where it has several")
    parser.add_argument("--concepts", type=int, default=20, help="K for --features")
    parser.add_argument("--methods", nargs="+", choices=FULL, default=list(FULL))
    parser.add_argument(
        "--data", nargs="+", choices=("planted", "states"), default=["planted", "states"]
    )
    parser.add_argument("--repeats", type=int, default=5, help="paired runs of each case")
    parser.add_argument("--budget", type=float, default=20, help="seconds of a peer in a case")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/solvers.json"))
    arguments = parser.parse_args()

    console = Console()
    # A table in a log file is as wide as it needs to be.
    console.width = max(console.width, 190)
    # scikit-learn's lasso reports every row that misses its own, tighter tolerance.
    warnings.filterwarnings("ignore", module="sklearn")
    rows: list[dict] = []

    def add(method: str, data: str, Z: np.ndarray, K: int) -> None:
        for row in measure(method, data, Z, K, arguments.repeats, arguments.budget):
            rows.append(row)
            shown = ", ".join(f"{name} {show(row)}" for name, show in COLUMNS.items())
            console.print(shown.replace("\\", ""), highlight=False, markup=False)
            # A run that is interrupted has saved what it measured.
            save(arguments.output, rows, *peers.PACKAGES)

    for method in arguments.methods:
        if arguments.features is not None:
            Z = matrices.of_features(arguments.features, arguments.site)
            add(method, "features", Z, arguments.concepts)
            continue
        for N, D, K in arguments.sizes or (QUICK if arguments.quick else FULL)[method]:
            for data in arguments.data:
                add(method, data, getattr(matrices, data)(N, D, min(K, 64)), K)
    console.print(table(rows))
    console.print(f"saved to {arguments.output}")


if __name__ == "__main__":
    main()
