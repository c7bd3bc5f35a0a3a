"""An orthonormal basis: by hand, against numpy, for any columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlvlm_jax.solvers.linalg import complement, orthonormal


def test_by_hand():
    columns = jnp.array([[3.0, 3.0], [4.0, 4.0], [0.0, 2.0]])
    np.testing.assert_allclose(
        orthonormal(columns), [[0.6, 0.0], [0.8, 0.0], [0.0, 1.0]], atol=1e-6
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 12))
def test_orthonormal_and_of_the_same_span(seed, decades):
    """Also if lengths differ by many orders of magnitude."""
    rng = np.random.default_rng(seed)
    columns = (rng.normal(size=(40, 6)) * 10 ** np.linspace(0, -decades, 6)).astype(np.float32)
    basis = np.asarray(orthonormal(jnp.asarray(columns)))
    np.testing.assert_allclose(basis.T @ basis, np.eye(6), atol=2e-5)
    theirs = np.linalg.qr(columns.astype(np.float64))[0]
    np.testing.assert_allclose(basis @ basis.T, theirs @ theirs.T, atol=1e-4)


@pytest.mark.parametrize("kind", ["dependent", "zero", "nearly dependent"])
def test_columns_that_span_less(kind):
    """The basis is still orthonormal, like scikit-learn's components of a low-rank matrix."""
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(30, 4)).astype(np.float32)
    columns[:, 3] = {
        "dependent": columns[:, 0] - columns[:, 1],
        "zero": 0 * columns[:, 0],
        "nearly dependent": columns[:, 0] * (1 + 1e-6) + 1e-6 * columns[:, 2],
    }[kind]
    basis = np.asarray(jax.jit(orthonormal)(jnp.asarray(columns)))
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=2e-5)
    rest = columns - basis @ (basis.T @ columns)
    np.testing.assert_allclose(rest, 0, atol=1e-4)


@pytest.mark.parametrize("noise", [1e-2, 1e-4, 1e-6, 0])
def test_a_few_strong_directions_in_many_columns(noise):
    """The input is a range finder's: the image of a matrix with few large singular values."""
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(600, 16)) @ rng.normal(size=(16, 120))
    columns = (columns + noise * rng.normal(size=columns.shape)).astype(np.float32)
    basis = np.asarray(jax.jit(orthonormal)(jnp.asarray(columns)))
    np.testing.assert_allclose(basis.T @ basis, np.eye(120), atol=2e-5)
    rest = columns - basis @ (basis.T @ columns)
    assert np.abs(rest).max() < 1e-4


def test_without_a_fallback_if_none_is_needed(monkeypatch):
    """Matrices with condition numbers up to 10^5 are handled with products."""
    monkeypatch.setattr(jnp.linalg, "qr", None)
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 20)))[0] for n in (300, 20))
    columns = left * np.logspace(0, -4, 20) @ right
    with jax.disable_jit():
        basis = np.asarray(orthonormal(jnp.asarray(columns, jnp.float32)))
    np.testing.assert_allclose(basis.T @ basis, np.eye(20), atol=2e-5)


def test_a_complement_by_hand():
    basis = jnp.array([[1.0], [0.0], [0.0]])
    columns = jnp.array([[5.0], [3.0], [4.0]])
    np.testing.assert_allclose(complement(basis, columns), [[0], [0.6], [0.8]], atol=1e-6)


@pytest.mark.parametrize("share", [1.0, 1e-3, 1e-6, 0.0])
def test_a_complement_to_columns_that_hardly_leave_the_basis(share):
    """At 0, any complement is valid, as for a column of zeros."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(60, 8)))[0].astype(np.float32)
    columns = basis @ rng.normal(size=(8, 6)) + share * rng.normal(size=(60, 6))
    columns[:, 5] *= share > 0
    columns = columns.astype(np.float32)
    new = np.asarray(jax.jit(complement)(jnp.asarray(basis), jnp.asarray(columns)))
    both = np.concatenate([basis, new], axis=1)
    np.testing.assert_allclose(both.T @ both, np.eye(14), atol=3e-5)
    rest = columns - both @ (both.T @ columns)
    np.testing.assert_allclose(rest, 0, atol=1e-5)


def test_a_complement_to_a_basis_with_zeros_keeps_what_columns_add():
    """One column is zero too, which fails with products alone."""
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(40, 6)))[0]
    basis = np.pad(basis, ((0, 0), (0, 5))).astype(np.float32)
    columns = (rng.normal(size=(40, 4)) + 10 * basis[:, :4]) * [1, 0, 1, 1]
    columns = columns.astype(np.float32)
    new = np.asarray(jax.jit(complement)(jnp.asarray(basis), jnp.asarray(columns)))
    np.testing.assert_allclose(new.T @ new, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(basis.T @ new, 0, atol=1e-5)
    both = np.concatenate([basis, new], axis=1).astype(np.float64)
    np.testing.assert_allclose(columns - both @ (both.T @ columns), 0, atol=1e-4)
