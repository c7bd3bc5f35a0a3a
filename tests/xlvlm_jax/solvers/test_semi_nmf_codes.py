"""Codes on fixed atoms: both methods against each other, scikit-learn and the optimality rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import nnls
from sklearn.decomposition import sparse_encode

from xlvlm_jax.solvers import semi_nmf_codes

K, D, N = 12, 30, 40


def problem(seed=0):
    rng = np.random.default_rng(seed)
    atoms = rng.normal(size=(K, D)) + 0.5
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    Z = 3 * rng.normal(size=(N, D))
    return (
        Z,
        atoms,
        jnp.asarray(atoms @ Z.T, jnp.float32),
        jnp.asarray(atoms @ atoms.T, jnp.float32),
    )


def test_one_atom_by_hand():
    # u = max(p - alpha, 0) / g; of any sign: p moved towards zero by alpha.
    products, gram = jnp.array([[3.0, 0.5, -3.0]]), jnp.array([[2.0]])
    np.testing.assert_allclose(semi_nmf_codes.encode(products, gram, 1.0), [[1, 0, 0]])
    free = semi_nmf_codes.encode(products, gram, 1.0, nonnegative=False)
    np.testing.assert_allclose(free, [[1, 0, -1]])


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("descent", [0, 128], ids=["gradient", "descent"])
def test_scikit_learns_codes(monkeypatch, nonnegative, descent):
    monkeypatch.setattr(semi_nmf_codes, "DESCENT", descent)
    Z, atoms, products, gram = problem()
    theirs = sparse_encode(
        Z, atoms, algorithm="lasso_cd", alpha=0.7, positive=nonnegative, max_iter=5000
    )
    ours = semi_nmf_codes.encode(products, gram, 0.7, nonnegative=nonnegative)
    np.testing.assert_allclose(ours.T, theirs, atol=2e-3)


@pytest.mark.parametrize("descent", [0, 128], ids=["gradient", "descent"])
def test_each_improvement_lowers_the_objective(monkeypatch, descent):
    monkeypatch.setattr(semi_nmf_codes, "DESCENT", descent)
    _, _, products, gram = problem(1)
    u, last = jnp.zeros((K, N)), np.inf
    for _ in range(8):
        u = semi_nmf_codes.improve(u, products, gram, 0.3, 1)
        value = float(jnp.sum(0.5 * u * (gram @ u) - u * products + 0.3 * jnp.abs(u)))
        assert value <= last + 1e-5 * abs(value)
        last = value
    assert np.all(np.asarray(u) >= 0)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_many_atoms_reach_the_least_error(alpha):
    # More atoms than descent takes: the rules of optimality (no slope downhill, none at all where
    # a code is positive), and Lawson and Hanson's exact answer where there is no penalty.
    rng = np.random.default_rng(4)
    atoms = rng.normal(size=(160, 64)) + 0.3
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    Z = 3 * rng.normal(size=(25, 64))
    products = jnp.asarray(atoms @ Z.T, jnp.float32)
    gram = jnp.asarray(atoms @ atoms.T, jnp.float32)
    u = np.asarray(semi_nmf_codes.encode(products, gram, alpha), np.float64)
    slope = atoms @ (atoms.T @ u - Z.T) + alpha
    assert np.all(u >= 0)
    assert np.min(slope) > -0.01
    assert np.max(np.abs(slope[u > 0.01])) < 0.01
    if alpha == 0:
        least = sum(nnls(atoms.T, z)[1] ** 2 for z in Z)
        assert np.sum((atoms.T @ u - Z.T) ** 2) <= 1.0001 * least


def test_an_atom_of_zero_length_is_never_used():
    _, _, products, gram = problem(2)
    gram, products = gram.at[3].set(0).at[:, 3].set(0), products.at[3].set(0)
    for steps in (1, 5):
        assert not np.any(semi_nmf_codes.improve(jnp.ones((K, N)), products, gram, 0.1, steps)[3])


def test_the_same_under_jit():
    _, _, products, gram = problem(3)
    eager = semi_nmf_codes.encode(products, gram, 1.0)
    np.testing.assert_allclose(
        jax.jit(semi_nmf_codes.encode)(products, gram, 1.0), eager, atol=1e-5
    )
