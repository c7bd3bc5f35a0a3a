"""The page of results: tables, plots and what they say, from the files that the benchmarks wrote.

    python -m benchmarks.solvers.page          # benchmarks/results/*.json -> benchmarks/README.md

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

Two cores of a shared x86 machine, float32; both sides in turn in one process, medians. Made by

    python -m benchmarks.solvers           # solvers against other libraries
    python -m benchmarks.solvers.growth    # seconds of an update against N and D
    python -m benchmarks.solvers.parts     # where the time of an update goes
    python -m benchmarks.solvers.page      # this page

What rounding makes of their sums over 10,000 to 20 million rows: [sums.md](sums.md).

{machine}

## Which method, which size

- **k-means** is the cheapest and has the best CLIPScore on the embedded model; each row belongs to
  one concept. Take it first, and for K of hundreds and thousands.
- **semi-NMF** gives several concepts a row and a lower reconstruction error for the same K; it
  costs two products with Z an update, and K^2 N operations for the codes, which is where its cost
  grows with hundreds of concepts.
- **PCA** is the fastest to its optimum and the least readable: components share words and have two
  signs. Use it as the bound that no other factorisation of K concepts undercuts.
- Where K is much smaller than D, semi-NMF and k-means work in K + some tens of columns and read Z
  itself in the last few updates alone: width is then nearly free, rows are not.
- Memory beyond Z is that of the activations (N K numbers: K / D of Z), once as the result and once
  or twice while an update runs. Where K is not far below D that is as much as Z; `xlvlm decompose
  --stream` keeps neither in memory.

## Against other libraries

![Times faster than each library, by case](solvers.svg)

"To its objective" is the time to within 1.0001 of the objective that the peer ends with, from the
same matrix and without compilation (all of ours where it never comes there); "times faster" the
median of the pairs' ratios. "The end" is where our own rule stops; an objective below 1 means that
ours is lower there. The limit of an update is the longer of reading Z once and doing its products
with Z at the rate of a large product, both measured in the same run.

{table}

DictionaryLearning is left out beyond 3,000 rows and on states: it takes minutes there, and tens of
minutes. "States" are random, with the decay and the common direction of hidden states; "features"
are real ones, of the embedded model's final norm. faiss makes as many updates as scikit-learn
needed; MiniBatchKMeans and MiniBatchDictionaryLearning stop elsewhere than the others, which the
objective shows.

What bounds an update at K = 20: XLA's products with 20 or 32 columns run at 25 to 60 % of the rate
of a large one, in whichever form is fastest, and k-means adds up the rows in another pass over Z
(the parts below). k-means makes few such updates: it looks again only at rows whose nearest
centroid can have changed. With K of hundreds it computes no distances to centroids that rest.

What bounds k-means at [3000, 4096], K = 20: about a third goes into the few columns that it works
in, a fifth into updates on Z itself, most of the rest into single passes over Z.

What bounds PCA: at 4096 columns three passes over Z (the first axes, their images, one update) and
the sums beside them. With 512 columns scikit-learn takes the axes from the covariance: one
symmetric product, half of the operations of the product that XLA has, and no scores, which we
return. At [20000, 512], K = 20, five times its speed would be 13 ms, less than one update takes.

What bounds memory: with K of hundreds the result itself, K / D of Z; with few concepts and Z of
16 MB, as in the growth below, k-means' two tiles of 2 MB.

k-means of the [100000, 512] states and of the features ends higher than its peers by more than
1.0001, and elsewhere lower: its first updates see few columns, and may lead to another local
optimum than scikit-learn's from the same centroids.

semi-NMF of 256 concepts (one run) goes on for hundreds of updates beyond the objectives of its
peers; with 4096 columns, a minute a run, it was left out.

LAPACK is given one thread while a solver runs: OpenBLAS's threads spin for some 20 ms after a
call, and XLA's products would wait for the cores.

## Where the time of an update goes

Each part by itself; "rate" is that of its products with Z over that of a large product. k-means: an
update that looks at all rows, as the first one does.

{parts}

## Growth

Seconds of an update = a + b x, K = 20; N grows at D = 1024, D at N = 8000.

{growth}

## What an update costs on an accelerator (computed, not measured)

Z [100000, 4096] in float32, 1.6 GB. "bound" says what takes the time.

{computed}
"""


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def comparison(rows: list[dict[str, Any]]) -> str:
    """The table of `benchmarks.solvers`."""
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
    """The table of `benchmarks.solvers.growth`."""
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
    """Milliseconds of an update by the formula of the limit."""
    rows = []
    for method, products in COLUMNS.items():
        for K in (20, 256, 1024):
            cells = []
            for bandwidth, rate in DEVICES.values():
                read = 4 * N * D / bandwidth
                width = pca.width(K) if method == "pca" else K
                multiply = 2 * N * D * products * width / rate
                bound = "reading" if read > multiply else "products"
                cells.append(f"{1e3 * max(read, multiply):.1f} ({bound})")
            rows.append([method, str(K), *cells])
    return markdown(["method", "K", *(f"{name} ms" for name in DEVICES)], rows)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Times faster to the peer's objective, a panel a method, a mark a peer."""
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
    # The same page twice is the same bytes.
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
    (arguments.output / "README.md").write_text(page)
    print(f"wrote {arguments.output / 'README.md'}")


if __name__ == "__main__":
    main()
