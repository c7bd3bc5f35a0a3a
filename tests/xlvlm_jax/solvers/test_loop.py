"""The shared loop: when it stops, what it records, how it continues."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlvlm_jax.solvers.linalg import FEW, inner_products, matmul, weighted_sums
from xlvlm_jax.solvers.loop import begin, largest_of_runs, run


class Halving(NamedTuple):
    objective: jax.Array
    error: jax.Array


def halve(state):
    return Halving(state.objective / 2, state.objective / 2)


START = Halving(jnp.float32(8), jnp.float32(jnp.inf))


def test_stops_at_the_tolerance_and_keeps_the_history():
    progress = jax.jit(lambda: run(halve, begin(START, 6), tol=1.0, max_iter=6))()
    assert progress.iteration == 3
    np.testing.assert_array_equal(progress.history, [8, 4, 2, 1, np.nan, np.nan, np.nan])


def test_stops_at_max_iter_and_continues():
    progress = run(halve, begin(START, 6), tol=0.0, max_iter=2)
    assert (progress.iteration, progress.state.objective) == (2, 2)
    progress = run(halve, progress, tol=0.0, max_iter=6)
    np.testing.assert_array_equal(progress.history, [8, 4, 2, 1, 0.5, 0.25, 0.125])


def test_no_updates_are_allowed():
    assert run(halve, begin(START, 0), tol=0.0, max_iter=0).iteration == 0


def test_runs_side_by_side_decide_together():
    def tenfold_from_two(value):
        return jax.lax.cond(largest_of_runs(value >= 2), lambda: 10 * value, lambda: value)

    assert tenfold_from_two(jnp.float32(1)) == 1
    side_by_side = jax.vmap(tenfold_from_two)
    np.testing.assert_array_equal(side_by_side(jnp.arange(2.0)), [0, 1])
    np.testing.assert_array_equal(side_by_side(jnp.arange(3.0)), [0, 10, 20])
    table = jnp.arange(4.0).reshape(2, 2)
    np.testing.assert_array_equal(jax.vmap(side_by_side)(table), 10 * table)
    # One branch is computed, and not both to select from.
    assert "cond[" in str(jax.make_jaxpr(jax.vmap(side_by_side))(table))


def test_products_of_narrow_inputs_are_summed_in_float32():
    a = jnp.full((1, 4096), 0.1, jnp.bfloat16)
    product = matmul(a, jnp.ones((4096, 1), jnp.bfloat16))
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product[0, 0], 4096 * float(a[0, 0]), rtol=1e-6)


@pytest.mark.parametrize("K", [1, FEW, FEW + 1])
def test_products_of_thin_matrices_are_products(K):
    rng = np.random.default_rng(K)
    Z, atoms, codes = (
        rng.normal(size=shape).astype("float32") for shape in ((50, 9), (K, 9), (K, 50))
    )
    crossed = jax.jit(inner_products)(atoms, Z)
    summed = jax.jit(weighted_sums)(codes, Z)
    np.testing.assert_allclose(crossed, atoms @ Z.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(summed, codes @ Z, rtol=1e-5, atol=1e-5)


def test_products_by_hand():
    Z = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    np.testing.assert_array_equal(inner_products(jnp.array([[1.0, -1.0]]), Z), [[-1, -1, -1]])
    np.testing.assert_array_equal(weighted_sums(jnp.array([[1.0, 0.0, 2.0]]), Z), [[11, 14]])
