"""The threshold that separates the k largest values: by hand, against top_k, and extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlvlm_jax.solvers.sae.selection import cut_above


def test_by_hand():
    values = jnp.float32([[3, -1, 2, 2], [-5, -4, -6, -jnp.inf]])
    cuts = cut_above(values, 3)
    assert (values >= cuts).tolist() == [[1, 0, 1, 1], [1, 1, 1, 0]]
    # Of equal values all are above, or none.
    assert (values >= cut_above(values, 2)).tolist() == [[1, 0, 1, 1], [1, 1, 0, 0]]
    assert (values >= cut_above(values, 5, of_all=True)).tolist() == [[1, 1, 1, 1], [0, 1, 0, 0]]


@pytest.mark.parametrize("width", [40, 128])  # with lanes on a CPU, and without
@pytest.mark.parametrize("k", [1, 7, 40, 100])
def test_it_parts_what_top_k_finds(k, width):
    k = min(k, width)
    values = np.random.default_rng(0).normal(size=(6, width)).astype(np.float32)
    expected = values >= np.asarray(jax.lax.top_k(values, k)[0][:, -1:])
    np.testing.assert_array_equal(values >= cut_above(jnp.asarray(values), k), expected)
    whole = values >= np.sort(values, axis=None)[-k]
    found = cut_above(jnp.asarray(values), k, of_all=True)
    np.testing.assert_array_equal(values >= found, whole)


def test_extremes():
    """Zeros of both signs are equal; the largest and the smallest floats are separated."""
    values = jnp.float32([[0.0, -0.0, jnp.inf, -jnp.inf, 1e-30, -3e38]])
    counts = [int((values >= cut_above(values, k)).sum()) for k in range(1, 7)]
    assert counts == [1, 2, 4, 4, 5, 6]
    few = jnp.full((1, 64), -jnp.inf).at[0, 3].set(2)
    assert int((few >= cut_above(few, 1)).sum()) == 1
