"""Writes the page of results: tables, plots and text, from the files that the benchmarks wrote.

    python -m benchmarks.solvers.page          # benchmarks/results/*.json -> benchmarks/solvers.md

Figures of a TPU v5e and an H100 are computed, not measured: an update takes the longer of reading Z
once and doing its products with Z, at the rates that the makers give.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.solvers import parts
from xlvlm_jax.solvers import pca

HERE = Path(__file__).resolve().parents[1]
# Bytes a second, and float32 operations a second at matmul precision "highest": six bfloat16
# products on the TPU, the float32 units of the H100 (SXM).
DEVICES = {"TPU v5e": (819e9, 197e12 / 6), "H100": (3.35e12, 67e12)}
COLUMNS = {"snmf": 2, "kmeans": 1, "pca": 2}  # products of Z with K columns in an update
READING = """# The solvers, measured

Measured on two cores of a shared x86 machine in float32; medians, with both sides alternating in
one process. Reproduce with

    python -m benchmarks.solvers           # solvers and other libraries
    python -m benchmarks.solvers.growth    # time per update as N and D grow
    python -m benchmarks.solvers.parts     # time of each part of an update
    python -m benchmarks.solvers.page      # this page

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
below 1 means that ours is lower. The limit of an update is the longer of reading Z once and
computing its products with Z at the rate of a large product, both measured in the same run.

{table}

DictionaryLearning is omitted for more than 3,000 rows and for states, where it takes minutes to
tens of minutes. "States" are random, with the decay and the common direction of hidden states;
"features" are real, from the embedded model's final norm. faiss makes as many updates as
scikit-learn needed; MiniBatchKMeans and MiniBatchDictionaryLearning stop at different objectives
than the others, as the table shows.

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

k-means on the [100000, 512] states and on the features ends more than 1.0001 above the other
libraries, elsewhere below: its first updates see few columns, and may lead to another local optimum
than scikit-learn's from the same centroids.

semi-NMF with 256 concepts (one run) continues for hundreds of updates after reaching the objectives
of the other libraries; with 4096 columns, at a minute per run, it was omitted.

LAPACK uses one thread while a solver runs: OpenBLAS's threads spin for about 20 ms after a call,
and XLA's products would have to wait for the cores.

## Time of each part of an update

Each part is measured on its own; "rate" is the rate of its products with Z relative to that of a
large product. k-means: an update that visits all rows, like the first one.

{parts}

## Growth

Fit of the time per update = a + b x, K = 20; N grows with D = 1024, D with N = 8000.

{growth}

## Time of an update on an accelerator (computed, not measured)

Z [100000, 4096] in float32, 1.6 GB, with the limit in parentheses: reading Z, or products.

{computed}
"""


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def comparison(rows: list[dict[str, Any]]) -> str:
    """Returns the table of `benchmarks.solvers`."""
    headings = ["method", "Z, K", "data", "peer", "peer s", "ours s to its objective"]
    headings += ["times faster", "ours s to the end", "objective ours / peer", "update ms"]
    headings += ["share of limit", "beyond Z"]
    return markdown(
        headings,
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
        ["method", "grows", "ms", "r²", "exponent", "beyond Z"],
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
            for bandwidth, rate in DEVICES.values():
                read = 4 * N * D / bandwidth
                width = pca.num_axes(K) if method == "pca" else K
                multiply = 2 * N * D * products * width / rate
                bound = "reading" if read > multiply else "products"
                cells.append(f"{1e3 * max(read, multiply):.1f} ({bound})")
            rows.append([method, str(K), *cells])
    return markdown(["method", "K", *(f"{name} ms" for name in DEVICES)], rows)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots times faster to the peer's objective: one panel per method, one mark per peer."""
    methods = [m for m in ("snmf", "kmeans", "pca") if any(_method(r) == m for r in rows)]
    figure, axes = plt.subplots(1, len(methods), figsize=(4.4 * len(methods), 3.6))
    for axis, method in zip(axes if len(methods) > 1 else [axes], methods, strict=True):
        own = [row for row in rows if _method(row) == method]
        cases = list(dict.fromkeys((row["N"], row["D"], row["K"]) for row in own))
        for peer in dict.fromkeys(row["peer"] for row in own):
            for data, filled in (("planted", True), ("states", False), ("features", False)):
                chosen = [r for r in own if r["peer"] == peer and r["data"] == data]
                places = [cases.index((r["N"], r["D"], r["K"])) for r in chosen]
                color = f"C{list(dict.fromkeys(r['peer'] for r in own)).index(peer)}"
                axis.scatter(
                    places,
                    [r["times_faster_to_peer"] for r in chosen],
                    facecolors=color if filled else "none",
                    edgecolors=color,
                    label=peer if filled else None,
                )
        axis.axhline(1, color="0.6", linewidth=1)
        axis.set_yscale("log")
        axis.set_xticks(range(len(cases)), [f"{N:,}x{D}\nK {K}" for N, D, K in cases], fontsize=6)
        axis.set_title(method)
        axis.legend(fontsize=6)
    figure.supylabel("times faster (filled: planted, open: states and features)", fontsize=8)
    figure.tight_layout()
    # Make the output reproducible.
    plt.rcParams["svg.hashsalt"] = "solvers"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _method(row: dict[str, Any]) -> str:
    return row["method"].split(",")[0]


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--output", type=Path, default=HERE)
    arguments = parser.parse_args()
    solvers, growth, of_parts = (
        json.loads((arguments.results / f"{name}.json").read_text())
        for name in ("solvers", "growth", "parts")
    )
    versions = (f"{k} {v}" for k, v in solvers["machine"].items() if k not in ("cores", "devices"))
    page = READING.format(
        machine=", ".join(versions),
        table=comparison(solvers["rows"]),
        parts=markdown(list(parts.HEADINGS), [parts.cells(row) for row in of_parts["rows"]]),
        growth=growth_table(growth["rows"]),
        computed=computed_table(),
    )
    draw(solvers["rows"], arguments.output / "solvers.svg")
    (arguments.output / "solvers.md").write_text(page)
    print(f"wrote {arguments.output / 'solvers.md'}")


if __name__ == "__main__":
    main()
