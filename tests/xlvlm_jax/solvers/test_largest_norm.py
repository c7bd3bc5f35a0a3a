"""The rows of largest norm."""

import jax
import jax.numpy as jnp
import numpy as np

from xlvlm_jax.solvers import largest_norm

from .helpers import alone

KEY = jax.random.key(0)


def test_rows_of_largest_norm_by_hand():
    Z = jnp.array([[1.0, 0.0], [0.0, -3.0], [0.0, 2.0], [-3.0, 0.0]])
    result = alone(largest_norm)(Z, KEY, num_samples=4, num_concepts=2)
    np.testing.assert_array_equal(result.components, [[0, -3], [-3, 0]])
    np.testing.assert_allclose(result.activations[1], [1, 1 / (1 + 18**0.5)], rtol=1e-6)
    # Rows 0 and 2 are left over, nearest to (0, -3) and (-3, 0).
    np.testing.assert_allclose(result.objective, 10 + 13, rtol=1e-6)
    assert (result.iterations, result.converged) == (0, True)


def test_padding_rows_are_never_picked():
    Z = jnp.pad(jnp.ones((2, 3)), ((0, 2), (0, 0)))
    result = alone(largest_norm)(Z, KEY, num_samples=2, num_concepts=2)
    np.testing.assert_array_equal(result.components, np.ones((2, 3)))
    np.testing.assert_allclose(result.activations[:2], 1)
