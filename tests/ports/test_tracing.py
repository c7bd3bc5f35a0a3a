"""Tells values from tracers."""

import jax
import jax.numpy as jnp
import numpy as np

from ports.tracing import is_traced


def test_values_are_not_traced():
    assert not is_traced()
    assert not is_traced(1.0, None, "a", np.ones(2), jnp.ones(2))


def test_one_traced_value_is_enough():
    found = []

    def f(x):
        found.extend([is_traced(x), is_traced(1.0, x), is_traced(1.0)])
        return x

    jax.jit(f)(jnp.ones(2))
    assert found == [True, True, False]
    found.clear()
    jax.vmap(f)(jnp.ones(2))
    assert found == [True, True, False]


def test_old_names_stay():
    import xlvlm_jax.metrics.precision
    from ports.intervene import edits

    assert edits.is_traced is xlvlm_jax.metrics.precision.is_traced is is_traced
