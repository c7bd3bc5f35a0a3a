"""Factors a matrix on disk that is larger than the memory limit.

    python -m benchmarks.streamed --gigabytes 2

Writes a planted matrix (or uses an existing one), factors it tile by tile in its own process, and
prints peak memory, the objective compared with the one in memory, and the speed of a pass compared
with that of reading the same files. Of the memory, "anonymous" was allocated, and "file" are pages
of mapped files, such as libraries; each at its own peak. Before each read, the files are dropped
from the page cache, in which a matrix larger than memory would not stay. Prints a table and writes
JSON.
"""

import argparse
import json
import multiprocessing
import os
import queue
import statistics
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from benchmarks import memory
from benchmarks.measure import save
from benchmarks.solvers import matrices

D, K = 4096, 20


def write(path: Path, rows: int, width: int = D) -> None:
    """Writes a planted matrix, piece by piece."""
    from xlvlm_jax.storage.zarr_rows import create_array, wait

    array = create_array(path, "float32", (rows, width))
    for start, values in matrices.planted_blocks(rows, width, K):
        wait(array[start : start + len(values)].write(values))


def forget(path: Path) -> float:
    """Drops the matrix's files from the page cache; returns the seconds it took."""
    began = time.perf_counter()
    for file in path.rglob("c/*/*"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # pages not written to disk yet would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return time.perf_counter() - began


def streamed(path: Path, rows: int, method: str, results: Any) -> None:
    """Runs in its own process, whose memory is then that of the solver."""
    from xlvlm_jax.concepts.decomposition import decompose_stored
    from xlvlm_jax.solvers.streamed import tiles
    from xlvlm_jax.storage.zarr_rows import StoredRows

    source = StoredRows(path, rows)
    count, readings = tiles.TILE_BYTES // (4 * source.shape[1]), []
    for _ in range(3):
        forget(path)
        began = time.perf_counter()
        for _, values in source.tiles(count):
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
    with memory.watched() as peaks:
        decompose_stored(source, K, method, key=jax.random.key(0), write=lambda *_: None)
    spent = time.perf_counter() - began - passes["forgetting"]
    # Run again, without compilation.
    passes |= {"count": 0, "forgetting": 0.0}
    began = time.perf_counter()
    found = decompose_stored(source, K, method, key=jax.random.key(0), write=lambda *_: None)
    again = time.perf_counter() - began - passes["forgetting"]
    results.put(
        {
            "objective": found.objective,
            "iterations": found.iterations,
            "seconds": again,
            "first_seconds": spent,
            "passes": passes["count"],
            "read_seconds": reading,
            "share_of_reading": reading * passes["count"] / again,
            **{f"{name}_gigabytes": size / 1e9 for name, size in peaks.items()},
        }
    )


def in_memory(path: Path, rows: int, method: str, results: Any) -> None:
    """Factors the same matrix in memory."""
    from xlvlm_jax.concepts.decomposition import decompose
    from xlvlm_jax.storage.zarr_rows import StoredRows

    Z = next(StoredRows(path, rows).tiles(rows))[1]
    began = time.perf_counter()
    found = decompose(Z, K, method, key=jax.random.key(0))
    results.put({"objective": found.objective, "seconds": time.perf_counter() - began})


def alone(function: Any, *arguments: Any) -> dict[str, Any]:
    """Returns the function's result from a fresh process.

    Raises:
        RuntimeError: the process ended without one.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=function, args=(*arguments, results))
    process.start()
    while True:
        try:
            result = results.get(timeout=1)
            break
        except queue.Empty:
            if process.exitcode:
                raise RuntimeError(f"{function.__name__} ended with {process.exitcode}") from None
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
    headings = ("method", "peak GB", "anonymous", "file", "objective / in memory", "passes", "s")
    table = Table(*headings, "share of reading")
    for row in measured:
        table.add_row(
            row["method"],
            *(f"{row[f'{kind}_gigabytes']:.2f}" for kind in ("peak", "anonymous", "file")),
            f"{row['objective_ratio']:.7f}",
            str(row["passes"]),
            f"{row['seconds']:.1f}",
            f"{100 * row['share_of_reading']:.0f} %",
        )
    Console().print(table)
    save(arguments.output, measured, "tensorstore")


if __name__ == "__main__":
    main()
