"""PCA and k-means by the kind of matrix they are given, against scikit-learn given the same.

    python -m benchmarks.solvers.given
    python -m benchmarks.solvers.given --sizes 3000x4096x20 --repeats 9

Both at their default tolerance, k-means from the same centroids; both sides alternate. CPU seconds
are of all threads.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import save, seconds
from benchmarks.solvers import matrices, peers
from benchmarks.solvers.__main__ import KEY, from_one_start, size_of
from xlvlm_jax.concepts.decomposition import decompose

SIZES = [(3000, 4096, 20), (20000, 512, 20), (20000, 512, 256), (10000, 4096, 256)]


def kinds(Z: np.ndarray, directory: Path) -> Iterator[tuple[str, Any]]:
    """Yields the same rows in memory of several kinds."""
    yield "JAX", jnp.asarray(Z)
    yield "numpy", Z
    np.save(directory / "Z.npy", Z)
    yield "memory-mapped", np.load(directory / "Z.npy", mmap_mode="r")
    yield "float64", Z.astype(np.float64)
    yield "int16", (100 * Z).astype(np.int16)


def calls(method: str, Z: Any, K: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns ours and scikit-learn's, which takes no JAX arrays."""
    theirs = np.asarray(Z)
    if method == "pca":
        return partial(decompose, Z, K, "pca", key=KEY), peers.pca(theirs, K)["PCA"]
    ours, start = from_one_start(Z, theirs, K)
    return ours, peers.kmeans(theirs, K, start)["KMeans"]


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Returns wall and CPU seconds of a call."""
    began = time.process_time()
    wall, _ = seconds(call)
    return wall, time.process_time() - began


def measure(method: str, shape: tuple[int, int, int], repeats: int) -> Iterator[dict[str, Any]]:
    """Yields a row of the table per kind of matrix."""
    N, D, K = shape
    with tempfile.TemporaryDirectory() as directory:
        for kind, Z in kinds(matrices.states(N, D, min(K, 64)), Path(directory)):
            ours, theirs = calls(method, Z, K)
            ours()
            pairs = np.array([(timed(ours), timed(theirs)) for _ in range(repeats)])
            (wall, cpu), (peer, peer_cpu) = np.median(pairs, axis=0)
            yield {
                "method": method,
                "shape": shape,
                "given": kind,
                "seconds": wall,
                "peer_seconds": peer,
                "times_faster": float(np.median(pairs[:, 1, 0] / pairs[:, 0, 0])),
                "cpu": cpu,
                "peer_cpu": peer_cpu,
            }


def main() -> None:
    """Parse, measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", type=size_of, default=SIZES, help="NxDxK")
    parser.add_argument("--methods", nargs="+", choices=("pca", "kmeans"), default=["pca"])
    parser.add_argument("--repeats", type=int, default=7, help="paired runs of each case")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/given.json"))
    arguments = parser.parse_args()
    rows = [
        row
        for method in arguments.methods
        for shape in arguments.sizes
        for row in measure(method, shape, arguments.repeats)
    ]
    table = Table(title="By the kind of matrix, medians", box=None)
    for heading in ("method", "Z, K", "given", "s", "scikit-learn s", "times faster"):
        table.add_column(heading)
    table.add_column("CPU s")
    table.add_column("scikit-learn CPU s")
    for row in rows:
        (N, D, K), *figures = (
            row["shape"],
            f"{row['seconds']:.3f}",
            f"{row['peer_seconds']:.3f}",
            f"{row['times_faster']:.1f}",
            f"{row['cpu']:.3f}",
            f"{row['peer_cpu']:.3f}",
        )
        table.add_row(row["method"], f"\\[{N}, {D}], {K}", row["given"], *figures)
    Console(width=120).print(table)
    save(arguments.output, rows, "scikit-learn")


if __name__ == "__main__":
    main()
