"""Measures the time of each part of an update, and its rate relative to a large product.

    python -m benchmarks.solvers.parts

Milliseconds are medians; "of the update" is relative to the whole update, measured in the same run,
so the parts need not add up to 100 %; "rate" is the rate of the part's products with Z relative to
that of a large product. Prints a table and writes JSON.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import save, seconds
from benchmarks.solvers import matrices
from benchmarks.solvers.pace import KEY, updating
from xlvlm_jax.solvers import (
    blas_threads,
    kmeans_assignment,
    kmeans_nearest,
    pca,
    semi_nmf,
    semi_nmf_atoms,
    semi_nmf_codes,
)
from xlvlm_jax.solvers.linalg import complement, inner_products, matmul, weighted_sums

HEADINGS = ("method", "Z, K", "part", "ms", "of the update", "rate")
SIZES = [(3000, 4096, 20), (100_000, 512, 20), (3000, 4096, 256)]

Part = tuple[str, Callable[..., Any], tuple, int]  # what, the call, with what, columns of Z


def parts(method: str, problem: Any, state: Any, K: int) -> Iterator[Part]:
    """Yields the parts of one update, in order."""
    Z = problem.Z
    if method == "snmf":
        small = state.small
        products, gram = inner_products(small.atoms, Z), matmul(small.atoms, small.atoms.T)
        U = semi_nmf_codes.improve(state.codes, products, gram, problem.alpha, semi_nmf.SWEEPS)
        _, sums, _ = semi_nmf.collect(Z, problem.energy, U, small.atoms, problem.alpha)
        unused, none = jnp.zeros(K, bool), jnp.zeros_like(small.atoms)
        improve = partial(semi_nmf_codes.improve, sweeps=semi_nmf.SWEEPS)
        yield "V Zᵀ", inner_products, (small.atoms, Z), K
        yield "codes", improve, (state.codes, products, gram, problem.alpha), 0
        yield "Uᵀ Z", weighted_sums, (U, Z), K
        yield "Uᵀ U", lambda U: matmul(U, U.T), (U,), 0
        yield "atoms", semi_nmf_atoms.advance, (small, sums, none, problem.alpha, unused), 0
    elif method == "kmeans":
        scored = Z, state.offsets, problem.mean, problem.far
        scores = kmeans_assignment.score(*scored)
        labels = kmeans_nearest.nearest(scores).labels
        yield "scores", kmeans_assignment.score, scored, len(scores)
        yield "nearest", kmeans_nearest.nearest, (scores,), 0
        yield "sums of rows", kmeans_assignment.sums_of, (problem, labels), 0
    else:
        plan, _ = pca.plan(KEY, width=Z.shape[1], num_samples=len(Z), num_concepts=(K,))
        blocks = plan.blocks
        scores = pca.project(problem, state.new)
        images = pca.covariance_image(problem, scores)
        span = jax.jit(pca.extend, static_argnums=2)(problem, state, blocks.more)
        overlaps = pca.overlaps(span.scores)
        axes = pca.principal(overlaps, K)[1][:, : blocks.kept]
        yield "a block's scores", pca.project, (problem, state.new), blocks.width
        yield "a block's images", pca.covariance_image, (problem, scores), blocks.width
        yield "next block", complement, (span.basis, images), 0
        yield f"all {blocks.more}", partial(pca.extend, count=blocks.more), (problem, state), 0
        yield "overlaps", pca.overlaps, (span.scores,), 0
        yield "axes", partial(pca.principal, num_concepts=K), (overlaps,), 0
        yield "turned", matmul, (span.scores, axes), 0


@blas_threads.one_thread()
def measure(method: str, N: int, D: int, K: int, repeats: int) -> list[dict]:
    """Returns one row per part."""
    Z = jnp.asarray(matrices.planted(N, D, min(K, 64)))
    update, problem, state, *_ = updating(method, Z, K)
    if state is None:
        return []
    found = list(parts(method, problem, state, K))
    square = jnp.ones((2048, 2048))
    calls = {name: partial(jax.jit(call), *given) for name, call, given, _ in found}
    calls["update"] = partial(jax.jit(update), problem, state)
    calls["product"] = partial(jax.jit(jnp.matmul), square, square)
    for call in calls.values():
        jax.block_until_ready(call())
    times = [{name: seconds(call)[0] for name, call in calls.items()} for _ in range(repeats)]
    median = {name: float(np.median([each[name] for each in times])) for name in calls}
    rate = 2 * 2048**3 / median["product"]
    return [
        {
            "method": method,
            "N": N,
            "D": D,
            "K": K,
            "part": name,
            "seconds": median[name],
            "of_update": median[name] / median["update"],
            "of_rate": 2 * N * D * columns / median[name] / rate if columns else None,
        }
        for name, _, _, columns in found
    ]


def table(rows: list[dict]) -> Table:
    """Returns the rows as a printable table."""
    shown = Table(title="Parts of an update, planted matrices", box=None)
    for heading in HEADINGS:
        shown.add_column(heading)
    for row in rows:
        shown.add_row(*(text.replace("[", "\\[") for text in cells(row)))
    return shown


def cells(row: dict) -> list[str]:
    """Returns the texts of a row."""
    rate = "" if row["of_rate"] is None else f"{100 * row['of_rate']:.0f} %"
    size = f"[{row['N']}, {row['D']}], {row['K']}"
    shares = f"{1e3 * row['seconds']:.1f}", f"{100 * row['of_update']:.0f} %", rate
    return [row["method"], size, row["part"], *shares]


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="runs of each part")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/parts.json"))
    arguments = parser.parse_args()
    rows = [
        row
        for size in SIZES
        for method in ("snmf", "kmeans", "pca")
        for row in measure(method, *size, arguments.repeats)
    ]
    Console().print(table(rows))
    save(arguments.output, rows)


if __name__ == "__main__":
    main()
