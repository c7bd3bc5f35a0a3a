"""Measures time, memory and bytes exchanged as rows, concepts and devices grow.

    python -m benchmarks.solvers.resources            # about 15 minutes on two idle cores, 10 GB
    python -m benchmarks.solvers.resources --quick    # small matrices, under a minute
    python -m benchmarks.solvers.resources --methods pca --output benchmarks/results/pca.json

A planted Z[N, 512] in float32, one process per case, on the devices that XLA makes of one CPU. The
programs are those of a solve that reports progress (`solvers.phases`), from K of the rows, or for
k-means in a few columns from a start of its own:

    ms per update     mean of `UPDATES` updates once compiled. With few clusters, k-means first
                      works in a few columns, and then revisits only rows whose nearest centroid
                      may have changed: the figures are separate. "One step": PCA from the
                      covariance, which makes no updates
    exchanged         bytes of the arrays that collectives sum or gather in an update, on each
                      device, from the compiled program; p devices that add up in a ring send and
                      receive 2 (p - 1) / p of that each
    beyond Z          peak resident size during a solve, less that before it: the interpreter, the
                      compiled programs and Z. K-means leaves out activations, 4 N K bytes

Several devices share the same cores: their time says nothing about real ones. Then Z[1e6, 512] is
factored from disk (see `benchmarks.streamed`), with 20 concepts. Prints tables, writes JSON and
draws a plot.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from benchmarks import memory, streamed
from benchmarks.measure import save
from benchmarks.solvers import matrices
from benchmarks.tpu.hlo import Program
from benchmarks.tpu.measured import collectives
from xlvlm_jax.solvers import blas_threads, kmeans, pca, phases, semi_nmf

METHODS: dict[str, Any] = {"snmf": semi_nmf, "kmeans": kmeans, "pca": pca}
D, ROWS, DEVICES = 512, (10_000, 100_000, 1_000_000), (2, 4, 8)
# PCA has at most D / 2; the codes of semi-NMF take K^2 operations a row.
COUNTS = {"snmf": (20, 256), "kmeans": (20, 256, 4096), "pca": (20, 256)}
SHARED = 100_000  # rows at which the number of devices grows
UPDATES = 4  # in each of the parts of a solve that repeat
BRIEF = 4.0  # seconds: a solve on one device that takes less is repeated
HEADINGS = ("method", "Z, K", "devices", "ms per update", "exchanged", "beyond Z", "of Z")
ON_DISK = ("method", "Z, K", "peak GB", "anonymous", "mapped files", "updates", "passes", "s")


class Case(NamedTuple):
    """What a process measures."""

    method: str
    N: int
    D: int
    K: int
    devices: int = 1


def cases(methods: list[str]) -> Iterator[Case]:
    """Yields the cases of a whole run."""
    for method in methods:
        for K in COUNTS[method]:
            yield from (Case(method, N, D, K) for N in ROWS)
            yield from (Case(method, SHARED, D, K, devices) for devices in DEVICES)
        # What is exchanged does not grow with the rows.
        yield from (Case(method, N, D, COUNTS[method][0], DEVICES[-1]) for N in ROWS[::2])


def quick_cases(methods: list[str]) -> Iterator[Case]:
    """Yields a few small cases."""
    for method in methods:
        yield from (Case(method, 2048, D, 20, devices) for devices in (1, DEVICES[-1]))


# One case, in its own process.


class Part(NamedTuple):
    """A compiled phase of a solve."""

    run: Callable[..., Any]
    repeats: bool
    sent: dict[bool, int]  # bytes of its collectives, in each step of its loop (True) and in all


def planned(case: Case, start: np.ndarray) -> tuple[phases.Plan, Any]:
    """Returns a plan that goes on for as many updates as it is given, and its inputs."""
    options: dict[str, Any] = {"tol": -np.inf, "max_iter": 2 * UPDATES}
    sizes = {"width": case.D, "num_samples": case.N, "num_concepts": (case.K,)}
    plan = functools.partial(METHODS[case.method].plan, jax.random.key(0), **sizes)
    if case.method == "snmf":
        options |= {"init_atoms": start}
    elif case.method == "kmeans":
        options |= {"activations": False}
        # Only without given centroids does it work in a few columns; otherwise choosing many would
        # take longer than the updates.
        if not plan(**options)[0].compressed:
            options |= {"init_centroids": start}
    return plan(**options)


def compiled(plan: phases.Plan, given: Any, Z: jax.Array, mesh: Any) -> list[Part]:
    """Compiles the phases of a plan one by one, as `phases.watched` runs them."""
    carry, limit, parts = given, np.int32(0), []
    for index, phase in enumerate(plan.phases):
        run = functools.partial(phases.run_phase, plan, index, mesh)
        if phase.repeats:

            def updates(
                Z: Any, tol: Any, fixed: Any, progress: Any, limit: Any, run: Any = run
            ) -> Any:
                return run(Z, phases.Carry(tol, fixed, progress), limit).progress

            lowered = jax.jit(updates, donate_argnums=3).lower(Z, *carry, limit)
        else:
            lowered = jax.jit(run).lower(Z, carry, limit)
        program = lowered.compile()
        sent = {True: 0, False: 0}
        for found in collectives(Program(program.as_text())):
            sent[found["in loop"]] += found["bytes"]
        parts.append(Part(program, phase.repeats, sent))
        if not phase.repeats:
            carry = jax.tree.map(
                lambda array, sharding: jax.ShapeDtypeStruct(
                    array.shape, array.dtype, sharding=sharding
                ),
                lowered.out_info,
                program.output_shardings,
            )
    return parts


def solved(parts: list[Part], Z: jax.Array, given: Any) -> list[float]:
    """Runs all parts; returns the seconds of each."""
    carry, done, times = given, 0, []
    for part in parts:
        began = time.perf_counter()
        if part.repeats:
            done += UPDATES
            carry = carry._replace(progress=part.run(Z, *carry, np.int32(done)))
        else:
            carry = part.run(Z, carry, np.int32(2 * UPDATES))
        jax.block_until_ready(carry)
        times.append(time.perf_counter() - began)
    return times


@blas_threads.one_thread()
def measure(case: Case) -> dict[str, Any]:
    """Returns the row of a case, for which this process must have as many devices."""
    values = np.empty((case.N, case.D), np.float32)
    for first, rows in matrices.planted_blocks(case.N, case.D, min(case.K, 64)):
        values[first : first + len(rows)] = rows
    start = values[np.random.default_rng(0).choice(case.N, case.K, replace=False)]
    mesh = place = None
    if case.devices > 1:
        mesh = jax.make_mesh((case.devices,), ("data",), axis_types=(AxisType.Auto,))
        place = NamedSharding(mesh, PartitionSpec("data"))
    Z = jax.block_until_ready(jax.device_put(values, place))
    del values
    plan, given = planned(case, start)
    parts = compiled(plan, given, Z, mesh)
    memory.forget_peak()
    before = memory.resident().now
    times = [solved(parts, Z, given)]
    # Several devices are not timed for their speed.
    if case.devices == 1 and sum(times[0]) < BRIEF:
        times = [solved(parts, Z, given) for _ in range(3)]
    peak = memory.resident().peak
    medians = np.median(times, axis=0)
    repeated = [index for index, part in enumerate(parts) if part.repeats]
    row: dict[str, Any] = case._asdict() | {"one_step": not repeated, "Z": Z.nbytes}
    # PCA from the covariance has no updates: its first part finds the components.
    last = repeated[-1] if repeated else 0
    row["update_seconds"] = float(medians[last]) / (UPDATES if repeated else 1)
    row["update_bytes"] = parts[last].sent[bool(repeated)]
    if len(repeated) > 1:
        row["column_seconds"] = float(medians[repeated[0]]) / UPDATES
        row["column_bytes"] = parts[repeated[0]].sent[True]
    row["other_bytes"] = sum(part.sent[False] for part in parts[bool(not repeated) :])
    return row | {
        "part_seconds": medians.tolist(),
        "before": before - Z.nbytes,
        "beyond": peak - before,
    }


def process(case: Case) -> dict[str, Any]:
    """Returns the row of a case from a process with as many devices.

    Raises:
        RuntimeError: the process failed.
    """
    # Devices wait for each other at every collective, on a busy machine for long.
    flags = (
        f"{os.environ.get('XLA_FLAGS', '')} "
        f"--xla_force_host_platform_device_count={case.devices} "
        "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    )
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, "--child", json.dumps(case)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"{case} ended with {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def from_disk(path: Path, N: int, width: int, method: str) -> dict[str, Any]:
    """Returns the row of a matrix that stays on disk, from a process of its own."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        streamed.write(path, N, width)
    row = {"method": method, "N": N, "D": width, "K": streamed.K, "on_disk": True}
    return row | streamed.alone(streamed.streamed, path, N, method)


# Tables.


def separated(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the rows of matrices in memory, and of those on disk."""
    stored = [row for row in rows if row.get("on_disk")]
    return [row for row in rows if not row.get("on_disk")], stored


def cells(row: dict[str, Any]) -> list[str]:
    """Returns the texts of a row, below `HEADINGS`."""
    spent, sent = f"{1e3 * row['update_seconds']:.1f}", size(row["update_bytes"])
    if row["one_step"]:
        spent += " (one step)"
    if "column_seconds" in row:
        spent += f"; in columns {1e3 * row['column_seconds']:.1f}"
        sent += f"; in columns {size(row['column_bytes'])}" if row["devices"] > 1 else ""
    return [
        row["method"],
        f"[{row['N']}, {row['D']}], {row['K']}",
        str(row["devices"]),
        spent,
        sent if row["devices"] > 1 else "",
        size(row["beyond"]),
        f"{100 * row['beyond'] / row['Z']:.0f} %",
    ]


def cells_on_disk(row: dict[str, Any]) -> list[str]:
    """Returns the texts of a row, below `ON_DISK`."""
    kinds = (f"{row[f'{kind}_gigabytes']:.2f}" for kind in ("peak", "anonymous", "file"))
    shape = f"[{row['N']}, {row['D']}], {row['K']}"
    return [
        row["method"],
        shape,
        *kinds,
        str(row["iterations"]),
        str(row["passes"]),
        f"{row['seconds']:.1f}",
    ]


def size(count: float) -> str:
    """Returns a number of bytes with a unit."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(count) >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


def tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    """Yields the printable tables: of matrices in memory, and on disk."""
    held, stored = separated(rows)
    for title, headings, texts in (
        ("Growth; several devices share the cores", HEADINGS, map(cells, held)),
        ("From disk", ON_DISK, map(cells_on_disk, stored)),
    ):
        table = Table(title=title, box=None)
        for heading in headings:
            table.add_column(heading)
        for line in texts:
            table.add_row(*(text.replace("[", "\\[") for text in line))
        if table.row_count:
            yield table


def main() -> None:
    """Parse, measure, print, save, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small matrices alone")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--scratch", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/resources.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(Case(*json.loads(arguments.child)))))
        return
    # Not in the processes that are measured.
    from benchmarks.solvers import drawing

    console, rows = Console(), []
    console.width = max(console.width, 120)

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        texts = cells_on_disk(row) if row.get("on_disk") else cells(row)
        console.print("  ".join(texts), highlight=False, markup=False)
        # A run that is interrupted has saved what it measured.
        save(arguments.output, rows)

    for case in (quick_cases if arguments.quick else cases)(arguments.methods):
        add(process(case))
    N, stored = (20_000, arguments.methods[-1:]) if arguments.quick else (10**6, arguments.methods)
    for method in stored:
        add(from_disk(arguments.scratch / f"planted-{N}x{D}", N, D, method))
    for table in tables(rows):
        console.print(table)
    drawing.draw_resources(separated(rows)[0], arguments.output.with_suffix(".svg"))
    console.print(f"saved to {arguments.output} and {arguments.output.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
