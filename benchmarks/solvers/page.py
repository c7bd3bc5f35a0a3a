"""Writes the page of results: tables, plots and text, from the files that the benchmarks wrote.

    python -m benchmarks.solvers.page          # benchmarks/results/*.json -> benchmarks/solvers.md
    python -m benchmarks.solvers.page --results kmeans.json snmf.json pca.json

Several files of `benchmarks.solvers` make one table; a case in two of them is that of the last, and
a case in none that of the page. Another table or plot whose results are not there stays as it is.
Figures of a TPU v5e and an H100 are computed, not measured: an update takes the longer of reading Z
once (PCA: once for each of its blocks) and doing its products with Z, at the rates that the makers
give.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.solvers import drawing, parts, resources
from benchmarks.solvers.__main__ import SAME
from xlvlm_jax.solvers import pca

HERE = Path(__file__).resolve().parents[1]
# Bytes a second, and float32 operations a second at matmul precision "highest": six bfloat16
# products on the TPU, the float32 units of the H100 (SXM).
DEVICES = {"TPU v5e": ("tpu", 819e9, 197e12 / 6), "H100": ("gpu", 3.35e12, 67e12)}
COLUMNS = {"snmf": 2, "kmeans": 1, "pca": 2}  # products of Z with K columns in an update
COMPARED = ["method", "Z, K", "data", "peer", "peer s", "ours s to its objective", "times faster"]
COMPARED += [
    "ours s to the end",
    "objective ours / peer",
    "update ms",
    "share of limit",
    "beyond Z",
]
CASE = ("method", "data", "N", "D", "K", "peer")
GROWN = ["method", "grows", "ms", "r²", "exponent", "beyond Z"]
READING = """# The solvers, measured

Measured on two cores of a shared x86 machine in float32; medians, with both sides alternating in
one process. Reproduce with

    python -m benchmarks.solvers           # solvers and other libraries
    python -m benchmarks.solvers.growth    # time per update as N and D grow
    python -m benchmarks.solvers.resources # time, memory, bytes exchanged; rows on disk
    python -m benchmarks.solvers.parts     # time of each part of an update
    python -m benchmarks.solvers.page      # this page

K-means with hundreds of clusters and more is compared with further libraries in
[many clusters](../docs/measurements-solvers.md#many-clusters).

`python -m benchmarks.sums` measures the effect of rounding on their sums over 10,000 to 20 million
rows: [sums.md](sums.md).

{machine}

## Choosing a method

- **k-means** is the cheapest and has the best CLIPScore on the embedded model; each row belongs to
  one concept. Try it first, and use it for hundreds or thousands of concepts.
- **semi-NMF** uses several concepts per row and has a lower reconstruction error for the same K. An
  update takes two products with Z, and K^2 N operations for the codes, which dominate for hundreds
  of concepts.
- **PCA** reaches its optimum fastest but is the hardest to interpret: components share words and
  have two signs. Use it as a lower bound on the reconstruction error with K concepts.
- If K is much smaller than D, semi-NMF and k-means work in K plus a few tens of columns and read Z
  itself only in the last few updates: a large width is then almost free, but not many rows.
- The memory in addition to Z is that of the activations (N K numbers, K / D of Z), once for the
  result and once or twice during an update. If K is close to D, this is as much as Z; `xlvlm
  decompose --stream` keeps neither in memory.

## Against other libraries

![Times faster than each library, by case](solvers.svg)

"To its objective" is our time to within 1.0001 of the other library's final objective, from the
same matrix and without compilation (our total time if we never reach it); "times faster" is the
median ratio of the paired runs. "The end" is where our own stopping rule applies; an objective
below 1 means that ours is lower (for PCA, that ours explains less). The limit of an update is the
longer of reading Z once (PCA: once for each of its blocks) and computing its products with Z at the
rate of a large product, both measured in the same run.

{table}

Each library runs with one thread or with all, whichever is faster; sklearnex always with all. "pca"
starts from a JAX array, with `tol=1e-4`; "pca, from numpy" from a numpy matrix, at our default
tolerance. DictionaryLearning is omitted for more than 3,000 rows and for states, where it takes
minutes to tens of minutes. K-means starts from the same centroids on both sides: rows, or, where it
works in a few columns (K up to a quarter of the width), those of its own k-means++, whose time is
then in ours alone; its rows of [100000, 4096] are older and from rows. "States" are random, with
the decay and the common direction of hidden states; "features" are real, from the embedded model's
final norm. faiss makes as many updates as scikit-learn needed; MiniBatchKMeans and
MiniBatchDictionaryLearning stop at different objectives than the others, as the table shows. The
wheel of faiss multiplies at 50 GFLOP/s on one thread here, and two may be slower than one. Rows of
PCA, and the times under "Growth", were measured while other programs ran: there, compare numbers of
one row.

{worse}

Limits of an update at K = 20: XLA's products with 20 or 32 columns run at 25 to 60 % of the rate
of a large product, in whichever form is fastest, and k-means sums the rows in another pass over Z
(see the parts below). k-means makes few such updates: it revisits only rows whose nearest
centroid may have changed. With hundreds of concepts, it computes no distances to centroids that
did not move.

Limits of k-means at [3000, 4096], K = 20: about a third of the time goes into the few columns
that it works in, a fifth into updates on Z itself, and most of the rest into single passes over
Z.

Limits of PCA: with 4096 columns, three passes over Z (the first axes, their images, one update)
and the sums. With 512 columns, scikit-learn computes the axes from the covariance: one symmetric
product, with half the operations of XLA's product, and without scores, which we return. At
[20000, 512], K = 20, five times its speed would be 13 ms, less than one update takes.

Limits of memory: with hundreds of concepts, the result itself, K / D of Z; with few concepts and
Z of 16 MB, as in the growth below, two tiles of 2 MB in k-means.

semi-NMF with 256 concepts continues for hundreds of updates after reaching the objectives
of the other libraries; only some of its cases were run.

LAPACK uses one thread while a solver runs: OpenBLAS's threads spin for about 20 ms after a call,
and XLA's products would have to wait for the cores.

## Time of each part of an update

Each part is measured on its own; "rate" is the rate of its products with Z relative to that of a
large product. k-means: an update that visits all rows, like the first one.

{parts}

## Growth

Fit of the time per update = a + b x, K = 20; N grows with D = 1024, D with N = 8000.

{growth}

Each line below is a process of its own, on a planted Z in float32. Time is that of an update once
compiled; "in columns" of one in the few columns that k-means first works in, after which its
updates of Z revisit only rows whose nearest centroid may have changed. "One step" is PCA from the
covariance, which makes no updates. Devices are parts of one CPU and share its cores: their time
says nothing about that of real ones. "Exchanged" are the bytes of the arrays that collectives sum
or gather, on each device and update, read from the compiled program: they depend on K and D, but
not on the rows. "Beyond Z" is the peak of a whole solve beyond Z and what the process took before,
without activations for k-means (4 N K bytes). The lines of a million rows with 256 concepts and
more are newer than the others and not in the plot; semi-NMF ran beside other programs.

![Time, memory and bytes exchanged](resources.svg)

{resources}

From disk, in files that are dropped from the cache before every pass; memory is that of the whole
process, Python and the compiler included. "Anonymous" was allocated; "mapped files" are pages of
libraries. Each is at its own peak. Most updates are made in a few columns, which are in memory, and
the others in one pass each; seconds are those of a second, compiled solve.

{on_disk}

## Time of an update on an accelerator (computed, not measured)

Z [100000, 4096] in float32, 1.6 GB, with the limit in parentheses: reading Z (PCA: for
each of its blocks), or products.

{computed}
"""


def markdown(headings: Sequence[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown, or nothing if there are no rows."""
    if not rows:
        return ""
    lines = [[*headings], ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def comparison(rows: list[dict[str, Any]]) -> str:
    """Returns the table of `benchmarks.solvers`."""
    return markdown(
        COMPARED,
        [
            [
                row["method"],
                f"[{row['N']}, {row['D']}], {row['K']}",
                row["data"],
                row["peer"],
                f"{row['peer_seconds']:.2f}",
                f"{row['seconds_to_peer']:.2f}",
                f"{row['times_faster_to_peer']:.1f}",
                f"{row['seconds']:.2f}",
                f"{row['objective_ratio']:.5f}",
                f"{1e3 * row['update_seconds']:.1f}",
                f"{100 * row['share_of_limit']:.0f} %",
                f"{100 * row['beyond_Z']:.0f} %",
            ]
            for row in rows
        ],
    )


def growth_table(rows: list[dict[str, Any]]) -> str:
    """Returns the table of `benchmarks.solvers.growth`."""
    return markdown(
        GROWN,
        [
            [
                row["method"],
                row["of"],
                ", ".join(f"{1e3 * x:.1f}" for x in row["seconds"]),
                f"{row['r2']:.4f}",
                f"{row['exponent']:.2f}",
                f"{100 * max(row['beyond_Z']):.0f} %",
            ]
            for row in rows
        ],
    )


def computed_table(N: int = 100_000, D: int = 4096) -> str:
    """Returns a table of milliseconds per update, from the formula of the limit."""
    rows = []
    for method, products in COLUMNS.items():
        for K in (20, 256, 1024):
            cells = []
            for backend, bandwidth, rate in DEVICES.values():
                read, width = 4 * N * D / bandwidth, K
                if method == "pca":
                    blocks = pca.blocks_for(K, N, D, backend)
                    read, width = blocks.more * read, blocks.more * blocks.width
                multiply = 2 * N * D * products * width / rate
                bound = "reading" if read > multiply else "products"
                cells.append(f"{1e3 * max(read, multiply):.1f} ({bound})")
            rows.append([method, str(K), *cells])
    return markdown(["method", "K", *(f"{name} ms" for name in DEVICES)], rows)


def worse(table: str) -> str:
    """Returns a sentence on the cases of a table of `comparison` that end at a worse objective."""
    found = []
    lines = table.splitlines()[2:]
    for line in lines:
        row = dict(zip(COMPARED, line.strip("| ").split(" | "), strict=True))
        ratio = float(row["objective ours / peer"])
        # PCA's objective is minus what is explained.
        if (1 / ratio if row["method"].startswith("pca") else ratio) > SAME:
            found.append(f"{row['method']} {row['Z, K']}, {row['data']} ({row['peer']})")
    if not found:
        return f"In no case does ours end more than {SAME} above the other library's objective."
    return (
        f"Ours ends more than {SAME} above the other library's objective, at another local optimum "
        f"or by its own stopping rule, in {len(found)} of {len(lines)} cases: {'; '.join(found)}."
    )


# Results.


def merged(files: list[Path], page: str = "") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the machine of several runs of `benchmarks.solvers`, and the last row of each case.

    Args:
        files: that `benchmarks.solvers` wrote.
        page: whose rows are kept of cases that are in none of the files.

    Raises:
        SystemExit: a file is not there, or has no such results.
    """
    machine: dict[str, Any] = {}
    rows = {tuple(row[name] for name in CASE): row for row in compared(page) if files}
    for file in files:
        try:
            found = json.loads(file.read_text())
            machine |= {name: value for name, value in found["machine"].items() if value}
            for row in found["rows"]:
                rows[tuple(row[name] for name in CASE)] = row
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"{file}: no results of benchmarks.solvers ({type(error).__name__}: {error}); give "
                "files that its --output wrote"
            ) from None
    # By method, in the order in which they were measured.
    ordered = sorted(rows.values(), key=lambda row: drawing.METHODS.index(drawing.method_of(row)))
    return machine, ordered


def compared(page: str) -> list[dict[str, Any]]:
    """Returns the rows of the table of `comparison` on a page, as rounded there; [] without one."""
    heading = "| " + " | ".join(COMPARED) + " |"
    if heading not in page:
        return []
    rows = []
    for line in standing(page, COMPARED).splitlines()[2:]:
        cells = dict(zip(COMPARED, line.strip("| ").split(" | "), strict=True))
        N, D, K = (int(part.strip("[] ")) for part in cells["Z, K"].split(","))
        rows.append(
            {name: cells[name] for name in ("method", "data", "peer")}
            | {"N": N, "D": D, "K": K, "peer_seconds": float(cells["peer s"])}
            | {"seconds_to_peer": float(cells["ours s to its objective"])}
            | {"times_faster_to_peer": float(cells["times faster"])}
            | {"seconds": float(cells["ours s to the end"])}
            | {"objective_ratio": float(cells["objective ours / peer"])}
            | {"update_seconds": float(cells["update ms"]) / 1e3}
            | {"share_of_limit": float(cells["share of limit"].rstrip(" %")) / 100}
            | {"beyond_Z": float(cells["beyond Z"].rstrip(" %")) / 100}
        )
    return rows


def _rows_of(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["rows"] if file.exists() else []


def standing(page: str, headings: Sequence[str]) -> str:
    """Returns the table with these headings from a page.

    Raises:
        SystemExit: it is not there.
    """
    first, lines = _line(page, "| " + " | ".join(headings) + " |"), page.splitlines()
    start = end = lines.index(first)
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    return "\n".join(lines[start:end])


def _line(page: str, beginning: str) -> str:
    """Returns the first line of a page that begins so."""
    found = next((line for line in page.splitlines() if line.startswith(beginning)), None)
    if found is None:
        raise SystemExit(
            f"no results for {beginning!r}, and the page has no such line to keep; run the "
            "benchmark that measures it first"
        )
    return found


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    results = HERE / "results"
    parser.add_argument(
        "--results", type=Path, nargs="+", help="of benchmarks.solvers; default solvers*.json"
    )
    for name in ("growth", "resources", "parts"):
        parser.add_argument(f"--{name}", type=Path, default=results / f"{name}.json")
    parser.add_argument("--output", type=Path, default=HERE)
    arguments = parser.parse_args()
    path = arguments.output / "solvers.md"
    old = path.read_text() if path.exists() else ""
    machine, rows = merged(arguments.results or sorted(results.glob("solvers*.json")), old)
    measured = {
        name: _rows_of(getattr(arguments, name)) for name in ("growth", "resources", "parts")
    }
    in_memory, on_disk = resources.separated(measured["resources"])
    made = {
        "table": comparison(rows) or standing(old, COMPARED),
        "growth": growth_table(measured["growth"]) or standing(old, GROWN),
    }
    for name, headings, texts, own in (
        ("parts", parts.HEADINGS, parts.cells, measured["parts"]),
        ("resources", resources.HEADINGS, resources.cells, in_memory),
        ("on_disk", resources.ON_DISK, resources.cells_on_disk, on_disk),
    ):
        made[name] = markdown(headings, [texts(row) for row in own]) or standing(old, headings)
    versions = [f"{k} {v}" for k, v in machine.items() if k not in ("cores", "devices")]
    page = READING.format(
        machine=", ".join(versions) if rows else _line(old, "system "),
        worse=worse(made["table"]),
        computed=computed_table(),
        **made,
    )
    if rows:
        drawing.draw_comparison(rows, arguments.output / "solvers.svg")
    if in_memory:
        drawing.draw_resources(in_memory, arguments.output / "resources.svg")
    path.write_text(page)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
