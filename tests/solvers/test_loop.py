"""The shared loop: when it stops, what it records, how it goes on."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xlvlm_jax.solvers.loop import begin, matmul, run


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


def test_stops_at_max_iter_and_goes_on():
    progress = run(halve, begin(START, 6), tol=0.0, max_iter=2)
    assert (progress.iteration, progress.state.objective) == (2, 2)
    progress = run(halve, progress, tol=0.0, max_iter=6)
    np.testing.assert_array_equal(progress.history, [8, 4, 2, 1, 0.5, 0.25, 0.125])


def test_no_updates_are_allowed():
    assert run(halve, begin(START, 0), tol=0.0, max_iter=0).iteration == 0


def test_products_of_narrow_inputs_are_summed_in_float32():
    a = jnp.full((1, 4096), 0.1, jnp.bfloat16)
    product = matmul(a, jnp.ones((4096, 1), jnp.bfloat16))
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product[0, 0], 4096 * float(a[0, 0]), rtol=1e-6)
