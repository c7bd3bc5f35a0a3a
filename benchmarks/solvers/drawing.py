"""The plots of the page of results."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

METHODS = ("snmf", "kmeans", "pca")


def write(figure: Figure, path: Path) -> None:
    """Writes a figure as SVG, the same bytes for the same figure."""
    figure.tight_layout()
    plt.rcParams["svg.hashsalt"] = "solvers"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_comparison(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots times faster to the peer's objective: one panel per method, one mark per peer."""
    methods = [m for m in METHODS if any(method_of(r) == m for r in rows)]
    figure, axes = plt.subplots(1, len(methods), figsize=(4.4 * len(methods), 3.6), squeeze=False)
    for axis, method in zip(axes[0], methods, strict=True):
        own = [row for row in rows if method_of(row) == method]
        cases = list(dict.fromkeys((row["N"], row["D"], row["K"]) for row in own))
        for peer in dict.fromkeys(map(_label, own)):
            for data, filled in (("planted", True), ("states", False), ("features", False)):
                chosen = [r for r in own if _label(r) == peer and r["data"] == data]
                places = [cases.index((r["N"], r["D"], r["K"])) for r in chosen]
                color = f"C{list(dict.fromkeys(map(_label, own))).index(peer)}"
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
    write(figure, path)


def method_of(row: dict[str, Any]) -> str:
    """Returns the method of a row, whose name may also say how it was run."""
    return row["method"].split(",")[0]


def _label(row: dict[str, Any]) -> str:
    """Returns the peer of a row, and how both were run."""
    return ", ".join([row["peer"], *row["method"].split(", ")[1:]])


def draw_resources(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots seconds per update and memory against N, and bytes exchanged against devices."""
    figure, axes = plt.subplots(1, 3, figsize=(13.2, 3.6))
    alone, spread = ([r for r in rows if (r["devices"] == 1) == one] for one in (True, False))
    # The number of rows at which most numbers of devices were measured.
    N = max((row["N"] for row in spread), key=[row["N"] for row in spread].count, default=0)
    spread = [row for row in spread if row["N"] == N]
    panels = (
        ("N", "s per update, one device", alone, "update_seconds", 1),
        ("N", "GB beyond Z at the peak, one device", alone, "beyond", 1e9),
        ("devices", f"MB exchanged per update, N = {N:,}", spread, "update_bytes", 1e6),
    )
    for axis, (x, title, chosen, figures, unit) in zip(axes, panels, strict=True):
        for method, K in sorted({(row["method"], row["K"]) for row in chosen}):
            own = [row for row in chosen if (row["method"], row["K"]) == (method, K)]
            own.sort(key=lambda row: row[x])
            axis.plot(
                [row[x] for row in own],
                [row[figures] / unit for row in own],
                color=f"C{METHODS.index(method)}",
                linestyle={20: "-", 256: "--"}.get(K, ":"),
                marker="o",
                markersize=3,
                label=f"{method}, K = {K:,}",
            )
        axis.set_xscale("log", base=2 if x == "devices" else 10)
        axis.set_yscale("log")
        if x == "devices":
            counts = sorted({row[x] for row in chosen})
            axis.set_xticks(counts, map(str, counts))
        axis.set_xlabel(x, fontsize=8)
        axis.set_title(title, fontsize=9)
    if alone:
        axes[0].legend(fontsize=6)
    write(figure, path)
