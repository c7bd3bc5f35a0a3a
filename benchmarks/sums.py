"""Rounding errors of the solvers' sums by number of rows, compared with sequential summation.

    python -m benchmarks.sums

Rows are [N, 2], normal around an offset; the second column has three clusters 3 deviations apart.
An error is the difference from numpy's float64 on the same float32 rows, in deviations of the
column for means and centroids, otherwise relative. "One after another" is the product with a row of
ones. Prints a table, writes JSON, a page and a plot.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import save
from xlvlm_jax.concepts.decomposition import decompose
from xlvlm_jax.solvers import blas_threads, pca, sums

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROWS = (10_000, 100_000, 1_000_000, 4_000_000, 20_000_000)
OFFSETS = (0, 100, 10_000)
CLUSTERS = 3
# Between the first centroids: an odd number of last digits of a float32 around each offset, so that
# no row is as near to two of them.
APART = 3073 / 2**10 + 1 / 2**17
KINDS = {
    "plain": "mean, one after another",
    "mean": "mean",
    "centroid": "centroids",
    "gram": "covariance",
    "variance": "PCA's variances",
    "inertia": "inertia",
    "history": "end of history",
}
PAGE = """Made by `python -m benchmarks.sums`. Rows [N, 2] in float32 are normal around an offset,
their second column in three clusters. An error is the difference from float64 on the same rows: of
means and centroids in deviations of the column (of centroids what is beyond the last digit of a
float32), of the others relative. "One after another" is a product with ones, for comparison.
A row that is equally near to
two centroids, up to the rounding of a float32 product, may count for either: one such row among
100,000 moves a centroid by 4e-5 at an offset of 100.

![Errors against the number of rows](sums.svg)"""


def matrix(N: int, offset: float) -> np.ndarray:
    """Makes rows in clusters, float32[N, 2]."""
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((N, 2), np.float32)
    Z[:, 1] += 3 * rng.integers(0, CLUSTERS, N)
    return (Z + np.float32(offset)).astype(np.float32)


@blas_threads.one_thread()
def errors(N: int, offset: float) -> dict[str, float]:
    """Returns the error of each kind."""
    Z = matrix(N, offset)
    rows, truth = jnp.asarray(Z), Z.astype(np.float64)
    mean, deviation = truth.mean(axis=0), truth.std(axis=0)
    found = jax.jit(sums.column_means)(rows)
    plain = jax.jit(lambda Z: jnp.ones(len(Z)) @ Z / len(Z))(rows)
    truth -= mean
    of_rows = jax.jit(lambda Z: pca.covariance(Z, jnp.ones(N), sums.column_means(Z)))(rows)
    of_truth = truth.T @ truth
    scores = decompose(rows, 2, "pca", key=jax.random.key(0)).activations
    variances = np.var(np.asarray(scores, np.float64), axis=0)
    # One update: labels from these centroids, then means of their rows.
    start = np.array([[0, APART * k] for k in range(CLUSTERS)]) + offset
    clusters = decompose(
        rows, CLUSTERS, "kmeans", key=jax.random.key(0), init=start, max_iter=1, tol=0.0
    )
    start = start.astype(np.float32).astype(np.float64) - mean
    labels = np.digitize(truth[:, 1], (start[:-1, 1] + start[1:, 1]) / 2)
    centroids = np.stack([truth[labels == k].mean(axis=0) for k in range(CLUSTERS)])
    # What float32 has of them: beyond its last digit no error could be told from rounding.
    ours = np.asarray(clusters.components, np.float64) - mean
    beyond = np.spacing(np.abs(np.asarray(clusters.components))) / 2
    inertia = least(truth, ours)
    return {
        "plain": float(np.max(np.abs(np.asarray(plain, np.float64) - mean) / deviation)),
        "mean": float(
            np.max(np.abs(np.float64(found.high) + np.float64(found.low) - mean) / deviation)
        ),
        "centroid": float(np.max(np.maximum(np.abs(ours - centroids) - beyond, 0) / deviation)),
        "gram": float(np.max(np.abs(of_rows - of_truth)) / np.max(of_truth)),
        "variance": float(np.max(np.abs(variances / np.linalg.eigvalsh(of_truth / N)[::-1] - 1))),
        "inertia": abs(clusters.objective / inertia - 1),
        "history": abs(float(clusters.history[-1]) / inertia - 1),
    }


def least(rows: np.ndarray, centroids: np.ndarray) -> float:
    """Computes the inertia in float64, some rows at a time."""
    total = 0.0
    for start in range(0, len(rows), 10**6):
        some = rows[start : start + 10**6]
        total += ((some[:, None] - centroids) ** 2).sum(axis=2).min(axis=1).sum()
    return total


def table(measured: list[dict]) -> Table:
    """Returns the rows as a printable table."""
    shown = Table(title="Errors against float64", box=None)
    for heading in ("N", "offset", *KINDS.values()):
        shown.add_column(heading)
    for row in measured:
        found = (f"{row[kind]:.1e}" for kind in KINDS)
        shown.add_row(f"{row['N']:,}", f"{row['offset']:,}", *found)
    return shown


def page(measured: list[dict]) -> str:
    """Returns the page in Markdown: the description, the plot, the table."""
    head = ["N", "offset", *KINDS.values()]
    lines = [head, ["---"] * len(head)]
    for row in measured:
        found = [f"{row[kind]:.1e}" for kind in KINDS]
        lines.append([f"{row['N']:,}", f"{row['offset']:,}", *found])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# Sums over many rows\n\n{PAGE}\n\n{rows}\n"


def plot(measured: list[dict], path: Path) -> None:
    """Plots the largest error over offsets, by kind, against N."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for kind, name in KINDS.items():
        worst = [max(row[kind] for row in measured if row["N"] == N) for N in ROWS]
        axes.loglog(ROWS, np.maximum(worst, 1e-12), "o-", label=name)
    axes.axhline(1e-6, color="grey", linewidth=0.5)
    axes.set(xlabel="rows", ylabel="largest error over offsets")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Measure, print, save, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sums.json"))
    parser.add_argument("--page", type=Path, default=Path("benchmarks/sums.md"))
    parser.add_argument("--plot", type=Path, default=Path("benchmarks/sums.svg"))
    arguments = parser.parse_args()
    measured = [{"N": N, "offset": offset, **errors(N, offset)} for N in ROWS for offset in OFFSETS]
    Console(width=140).print(table(measured))
    save(arguments.output, measured)
    arguments.page.write_text(page(measured))
    plot(measured, arguments.plot)


if __name__ == "__main__":
    main()
