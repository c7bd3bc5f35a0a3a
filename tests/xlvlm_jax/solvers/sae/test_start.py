"""Where training starts: the geometric median and the scale of the rows."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from xlvlm_jax.solvers.sae.start import geometric_median, start, unit_length

RNG = np.random.default_rng(0)


def test_the_median_of_points_on_a_line_is_the_middle_one():
    found = geometric_median(jnp.float32([[0, 0], [1, 1], [100, 100]]))
    np.testing.assert_allclose(found, [1, 1], atol=1e-2)


def test_the_median_is_the_point_of_least_distance():
    rows = RNG.normal(5, 2, (30, 3))
    best = minimize(lambda p: np.linalg.norm(rows - p, axis=1).sum(), rows.mean(axis=0), tol=1e-9).x
    np.testing.assert_allclose(geometric_median(jnp.float32(rows)), best, atol=1e-3)


def test_rows_are_scaled_to_the_root_of_their_width():
    rows = (1e20 * RNG.normal(size=(50, 4))).astype(np.float32)  # squares exceed float32
    begun = start(rows, None)
    norms = np.linalg.norm(rows.astype(np.float64) * begun.scale, axis=1)
    assert norms.mean() == pytest.approx(2)
    np.testing.assert_allclose(begun.rows, rows * np.float64(begun.scale), rtol=1e-6)
    assert start(rows, 3.0).scale == 3.0
    assert start(np.zeros((3, 2), np.float32), None).scale == 1.0


def test_lengths():
    found = unit_length(jnp.float32([[3, 4], [0, 0]]))
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0]], rtol=1e-6)
