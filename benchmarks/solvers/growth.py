"""Measures how the time of an update grows with N and D, and fits a line.

    python -m benchmarks.solvers.growth

Fits seconds = a + b x by least squares over x = N, then D. Growth is linear if the line explains
the variance (r^2) and the exponent from a fit of log seconds is one.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import save
from benchmarks.solvers import matrices
from benchmarks.solvers.pace import pace

METHODS = ("snmf", "kmeans", "pca")
ROWS, WIDTHS = (4000, 8000, 16000, 32000), (512, 1024, 2048, 4096)
WIDTH, COUNT, K = 1024, 8000, 20  # D while N grows, N while D grows, K


def fit(x: np.ndarray, seconds: np.ndarray) -> dict[str, float]:
    """Fits a line to (x, seconds); returns it, its explained variance, and the exponent."""
    slope, start = np.polyfit(x, seconds, 1)
    left = seconds - (start + slope * x)
    exponent = np.polyfit(np.log(x), np.log(seconds), 1)[0]
    explained = 1 - left.var() / seconds.var()
    return {"start": start, "slope": slope, "r2": float(explained), "exponent": float(exponent)}


def measure(method: str, repeats: int) -> list[dict]:
    """Returns one row for the growth with N, one for the growth with D."""
    rows = []
    for name, shapes in (
        ("N", [(N, WIDTH) for N in ROWS]),
        ("D", [(COUNT, D) for D in WIDTHS]),
    ):
        paces = [pace(method, jnp.asarray(matrices.planted(*s, K)), K, repeats) for s in shapes]
        seconds = np.array([each["update_seconds"] for each in paces])
        sizes = np.array([shape["ND".index(name)] for shape in shapes])
        rows.append(
            {
                "method": method,
                "of": name,
                "shapes": shapes,
                "seconds": seconds.tolist(),
                "beyond_Z": [each["beyond_Z"] for each in paces],
                **fit(sizes, seconds),
            }
        )
    return rows


def table(rows: list[dict]) -> Table:
    """Returns the rows as a printable table."""
    shown = Table(title=f"Seconds of an update against N and D, K = {K}", box=None)
    for heading in ("method", "of", "sizes", "ms", "r²", "exponent", "beyond Z"):
        shown.add_column(heading)
    for row in rows:
        side = "ND".index(row["of"])
        shown.add_row(
            row["method"],
            row["of"],
            ", ".join(str(shape[side]) for shape in row["shapes"]),
            ", ".join(f"{1e3 * x:.1f}" for x in row["seconds"]),
            f"{row['r2']:.4f}",
            f"{row['exponent']:.2f}",
            f"{100 * max(row['beyond_Z']):.0f} %",
        )
    return shown


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="runs of each size")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/growth.json"))
    arguments = parser.parse_args()
    rows = [row for method in METHODS for row in measure(method, arguments.repeats)]
    Console(width=120).print(table(rows))
    save(arguments.output, rows)


if __name__ == "__main__":
    main()
