"""Z in few columns: by hand, against numpy's singular vectors, for any matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlvlm_jax.solvers.compression import compress, compress_by_sample, turn_to_axes

KEY = jax.random.key(0)


def by_sample(Z, key, width):
    return compress_by_sample(Z, key, width, len(Z))


def decaying(seed, N=900, D=60):
    """Returns a matrix whose energy falls along the directions, as in hidden states."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(D, D)))[0]
    return (rng.normal(size=(N, D)) * 0.8 ** np.arange(D) @ axes).astype(np.float32)


def test_one_direction_by_hand():
    Z = jnp.array([[3.0, 4.0, 0.0], [6.0, 8.0, 0.0], [0.0, 0.0, 0.0]])
    found = compress(Z, KEY, 1)
    np.testing.assert_allclose(jnp.abs(found.basis[:, 0]), [0.6, 0.8, 0], atol=1e-6)
    np.testing.assert_allclose(jnp.abs(found.X[:, 0]), [5, 10, 0], rtol=1e-6)


@pytest.mark.parametrize("how", [compress, by_sample])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_orthonormal_and_in_axes_by_falling_energy(how, seed):
    Z = decaying(seed)
    plain = how(jnp.asarray(Z), jax.random.key(seed), 8)
    np.testing.assert_allclose(plain.X, Z @ np.asarray(plain.basis), atol=1e-4)
    found = turn_to_axes(plain)
    np.testing.assert_allclose(found.X @ found.basis.T, plain.X @ plain.basis.T, atol=1e-4)
    np.testing.assert_allclose(found.basis.T @ found.basis, np.eye(8), atol=1e-5)
    np.testing.assert_allclose(found.X, Z @ np.asarray(found.basis), atol=1e-4)
    energy = np.sum(np.asarray(found.X) ** 2, axis=0)
    assert np.all(np.diff(energy) <= 1e-4 * energy[0])


@pytest.mark.parametrize("how", [compress, by_sample])
def test_eight_directions_hold_what_the_best_six_hold(how):
    Z = decaying(1)
    energy = np.cumsum(np.linalg.svd(Z, compute_uv=False) ** 2)
    for seed in range(4):
        found = how(jnp.asarray(Z), jax.random.key(seed), 8)
        assert energy[5] <= np.sum(np.asarray(found.X) ** 2) <= 1.0001 * energy[7]


def test_a_narrow_matrix_is_left_as_it_is():
    Z = decaying(2, 50, 6)
    found = compress(jnp.asarray(Z), KEY, 6)
    np.testing.assert_array_equal(found.basis, np.eye(6))
    np.testing.assert_array_equal(found.X, Z)
