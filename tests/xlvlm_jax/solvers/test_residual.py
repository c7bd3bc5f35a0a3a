"""Squared residuals by tiles: by hand, and against the whole matrix at once."""

import jax.numpy as jnp
import numpy as np
import pytest

from xlvlm_jax.solvers import residual


def test_by_hand():
    Z = jnp.array([[1.0, 2.0], [3.0, 5.0]])
    np.testing.assert_allclose(
        residual.of_products(Z, jnp.array([[1.0], [2.0]]), jnp.array([[1.0, 2.0]])), [0, 2]
    )
    np.testing.assert_allclose(
        residual.of_labels(Z, jnp.array([1, 0]), jnp.array([[3.0, 3.0], [1.0, 1.0]])), [1, 4]
    )


@pytest.mark.parametrize("numbers", [1, 7 * 16, 20 * 16, 1000 * 16])
def test_tiles_of_every_size(numbers, monkeypatch):
    """One row per tile, a remainder, whole tiles, all rows in one tile."""
    monkeypatch.setattr(residual, "TILE", numbers)
    rng = np.random.default_rng(0)
    Z, codes = rng.normal(size=(40, 16)), rng.normal(size=(40, 3))
    atoms, labels = rng.normal(size=(3, 16)), rng.integers(0, 3, 40)
    np.testing.assert_allclose(
        residual.of_products(*map(jnp.asarray, (Z, codes, atoms))),
        np.sum((Z - codes @ atoms) ** 2, axis=1),
        rtol=1e-4,
    )
    np.testing.assert_allclose(
        residual.of_labels(*map(jnp.asarray, (Z, labels, atoms))),
        np.sum((Z - atoms[labels]) ** 2, axis=1),
        rtol=1e-4,
    )
