"""Factors a matrix on disk that is larger than the memory limit.

    python -m benchmarks.streamed --gigabytes 2

Writes a planted matrix (or uses an existing one), factors it tile by tile in its own process, and
prints peak memory, the objective compared with the one in memory, and the speed of a pass compared
with that of reading the same files. Before each read, the files are dropped from the page cache, in
which a matrix larger than memory would not stay. Prints a table and writes JSON.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import save

D, K = 4096, 20


def write(path: Path, rows: int) -> None:
    """Writes a planted matrix, piece by piece."""
    from xlvlm_jax.storage.zarr_rows import create_array, wait

    array = create_array(path, "float32", (rows, D))
    atoms = np.random.default_rng(0).normal(size=(K, D)).astype(np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    for start in range(0, rows, 4096):
        rng = np.random.default_rng(start + 1)
        count = min(4096, rows - start)
        codes = 10 * rng.exponential(size=(count, K)) * (rng.random((count, K)) < 0.3)
        noise = 0.1 * rng.standard_normal((count, D), dtype=np.float32)
        wait(array[start : start + count].write(codes.astype(np.float32) @ atoms + noise))


def forget(path: Path) -> float:
    """Drops the matrix's files from the page cache; returns the seconds it took."""
    began = time.perf_counter()
    for file in path.rglob("c/*/*"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # pages not written to disk yet would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return time.perf_counter() - began


def streamed(path: Path, rows: int, method: str, queue: Any) -> None:
    """Runs in its own process, whose memory is then that of the solver."""
    from xlvlm_jax.concepts.decomposition import decompose_stored
    from xlvlm_jax.solvers.streamed import tiles
    from xlvlm_jax.storage.zarr_rows import StoredRows

    source = StoredRows(path, rows)
    readings = []
    for _ in range(3):
        forget(path)
        began = time.perf_counter()
        for _, values in source.tiles(tiles.TILE_BYTES // (4 * D)):
            values[:: 4096 // values.itemsize].sum()
        readings.append(time.perf_counter() - began)
    reading = statistics.median(readings)
    passes = {"count": 0, "forgetting": 0.0}
    original = source.tiles

    def counted(count: int) -> Any:
        passes["count"] += 1
        passes["forgetting"] += forget(path)
        return original(count)

    source.tiles = counted
    began = time.perf_counter()
    found = decompose_stored(source, K, method, key=jax.random.key(0), write=lambda *_: None)
    spent = time.perf_counter() - began - passes["forgetting"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Run again, without compilation.
    passes |= {"count": 0, "forgetting": 0.0}
    began = time.perf_counter()
    found = decompose_stored(source, K, method, key=jax.random.key(0), write=lambda *_: None)
    again = time.perf_counter() - began - passes["forgetting"]
    queue.put(
        {
            "objective": found.objective,
            "iterations": found.iterations,
            "seconds": again,
            "first_seconds": spent,
            "passes": passes["count"],
            "read_seconds": reading,
            "share_of_reading": reading * passes["count"] / again,
            "peak_gigabytes": peak * 1024 / 1e9,
        }
    )


def in_memory(path: Path, rows: int, method: str, queue: Any) -> None:
    """Factors the same matrix in memory."""
    from xlvlm_jax.concepts.decomposition import decompose
    from xlvlm_jax.storage.zarr_rows import StoredRows

    Z = next(StoredRows(path, rows).tiles(rows))[1]
    began = time.perf_counter()
    found = decompose(Z, K, method, key=jax.random.key(0))
    queue.put({"objective": found.objective, "seconds": time.perf_counter() - began})


def alone(function: Any, *arguments: Any) -> dict:
    """Returns the function's result from a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=function, args=(*arguments, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def main() -> None:
    """Parse, write, measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--matrix", type=Path, default=Path("benchmarks/results/large"))
    parser.add_argument("--methods", nargs="+", default=["snmf", "kmeans", "pca"])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/streamed.json"))
    arguments = parser.parse_args()
    rows = int(arguments.gigabytes * 2**30 / (4 * D))
    if not arguments.matrix.exists():
        arguments.matrix.parent.mkdir(parents=True, exist_ok=True)
        write(arguments.matrix, rows)
    measured = []
    for method in arguments.methods:
        row = {"method": method, "rows": rows, "width": D, "K": K}
        row |= alone(streamed, arguments.matrix, rows, method)
        other = alone(in_memory, arguments.matrix, rows, method)
        row["objective_ratio"] = row["objective"] / other["objective"]
        measured.append(row)
        print(json.dumps(row))
    table = Table("method", "peak GB", "objective / in memory", "passes", "s", "share of reading")
    for row in measured:
        table.add_row(
            row["method"],
            f"{row['peak_gigabytes']:.2f}",
            f"{row['objective_ratio']:.7f}",
            str(row["passes"]),
            f"{row['seconds']:.1f}",
            f"{100 * row['share_of_reading']:.0f} %",
        )
    Console().print(table)
    save(arguments.output, measured, "tensorstore")


if __name__ == "__main__":
    main()
