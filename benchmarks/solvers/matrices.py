"""The matrices that are factored, and the objective of each method, in float64."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROWS, SCORES = 2**12, 2**24  # rows, and scores of rows and centroids, that are held at a time


def planted(N: int, D: int, K: int, seed: int = 0) -> np.ndarray:
    """Makes rows from K unit atoms with sparse non-negative codes, plus noise."""
    rng = np.random.default_rng(seed)
    codes = (10 * rng.exponential(size=(N, K)) * (rng.random((N, K)) < 0.3)).astype(np.float32)
    atoms = rng.normal(size=(K, D)).astype(np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    return codes @ atoms + 0.1 * rng.standard_normal(size=(N, D), dtype=np.float32)


def planted_blocks(N: int, D: int, K: int, size: int = ROWS) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, rows) of such a matrix, `size` rows at a time, each from its own seed."""
    atoms = np.random.default_rng(0).normal(size=(K, D)).astype(np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    for start in range(0, N, size):
        rng = np.random.default_rng(start + 1)
        count = min(size, N - start)
        codes = 10 * rng.exponential(size=(count, K)) * (rng.random((count, K)) < 0.3)
        noise = 0.1 * rng.standard_normal((count, D), dtype=np.float32)
        yield start, codes.astype(np.float32) @ atoms + noise


def states(N: int, D: int, K: int, seed: int = 0) -> np.ndarray:
    """Makes rows like a model's states: one large common direction, K clusters, heavy tails, slow
    decay.
    """
    rng = np.random.default_rng(seed)
    common = rng.standard_t(3, size=D)
    common *= 40 / np.linalg.norm(common)
    width = min(D, 200)
    basis = np.linalg.qr(rng.normal(size=(D, width)))[0].T
    spread = 30 * np.arange(1, width + 1) ** -0.7
    centres = 0.7 * rng.normal(size=(K, width)) * spread
    # In place, as these take most of the memory of a benchmark with many rows.
    within = rng.standard_t(4, size=(N, width))
    within *= 0.5 * spread
    within += centres[rng.integers(0, K, N)]
    rows = within @ basis
    del within
    rows += common
    noise = rng.standard_t(4, size=(N, D))
    noise *= 0.2
    rows += noise
    return rows.astype(np.float32)


def of_features(path: Path, site: str | None) -> np.ndarray:
    """Reads real states, from one site of a features directory."""
    from xlvlm_jax import Features
    from xlvlm_jax.features.reader import choose_site

    features = Features.open(path)
    return features.matrix(choose_site(features, site))


def snmf_objective(Z: np.ndarray, codes: Any, atoms: Any, alpha: float = 1.0) -> float:
    """Computes 1/2 |Z - U V|^2 + alpha |U|_1."""
    codes, atoms = np.asarray(codes, np.float64), np.asarray(atoms, np.float64)
    return float(0.5 * np.sum((Z - codes @ atoms) ** 2) + alpha * np.abs(codes).sum())


def inertia(Z: np.ndarray, centroids: Any) -> float:
    """Computes the sum of squared distances to the nearest centroid, in float64.

    Which one is nearest is decided in float32, after a mean is subtracted. Of centroids as near as
    float32's rounding either gives the same sum.
    """
    centroids = np.asarray(centroids, np.float64)
    middle = centroids.mean(axis=0)
    moved = (centroids - middle).astype(np.float32)
    half = 0.5 * np.sum(moved**2, axis=1)
    total, size = 0.0, min(max(SCORES // len(centroids), 1), ROWS)
    for part in (Z[start : start + size] for start in range(0, len(Z), size)):
        scores = (part - middle).astype(np.float32) @ moved.T
        np.subtract(half, scores, out=scores)
        total += np.sum((part - centroids[scores.argmin(axis=1)]) ** 2)
    return float(total)


def minus_explained(Z: np.ndarray, components: Any) -> float:
    """Computes minus the sum of squares that the orthonormal components explain."""
    return -float(np.sum(((Z - Z.mean(axis=0, dtype=np.float64)) @ np.asarray(components).T) ** 2))
