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


def nearly_parallel():
    """Atoms with cosines around .9, as states far from the origin have, and long codes."""
    rng = np.random.default_rng(5)
    atoms = rng.normal(size=(K, D)) + 3
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    Z = 1000 * (rng.uniform(0.5, 1, size=(64, K)) @ atoms) + rng.normal(size=(64, D))
    return jnp.asarray(atoms @ Z.T, jnp.float32), jnp.asarray(atoms @ atoms.T, jnp.float32)


def test_codes_measured_from_a_base_come_to_rest():
    # From zeros, the rounding of long codes moves ill-conditioned ones for ever.
    products, gram = nearly_parallel()
    base = semi_nmf_codes.improve(jnp.zeros_like(products), products, gram, 1.0, 500)
    left = products - gram @ base

    def largest_step(start, goal, of):
        before = semi_nmf_codes.improve(start, goal, gram, 1.0, 500, base=of)
        after = semi_nmf_codes.improve(before, goal, gram, 1.0, 1, base=of)
        return float(jnp.max(jnp.abs(after - before)) / jnp.max(base))

    assert largest_step(base, products, None) > semi_nmf_codes.STILL
    assert largest_step(jnp.zeros_like(base), left, base) < semi_nmf_codes.STILL / 10


def test_long_codes_of_nearly_parallel_atoms_reach_the_least_objective():
    products, gram = nearly_parallel()
    u = np.asarray(semi_nmf_codes.encode(products, gram, 1.0), np.float64)
    P, G = np.asarray(products, np.float64), np.asarray(gram, np.float64)

    def objective(u):
        return np.sum(0.5 * u * (G @ u) - u * (P - 1))

    factor = np.linalg.cholesky(G)
    goal = np.linalg.solve(factor, P - 1)
    exact = np.stack([nnls(factor.T, column, maxiter=1000)[0] for column in goal.T], axis=1)
    assert np.all(u >= 0)
    assert objective(u) <= objective(exact) + 1e-10 * abs(objective(exact))


def test_many_samples_have_the_codes_that_each_would_have_alone(monkeypatch):
    _, _, products, gram = problem(6)
    alone = semi_nmf_codes.encode(products, gram, 0.5)
    monkeypatch.setattr(semi_nmf_codes, "TOGETHER", 16)  # of 40: the last block reaches back
    np.testing.assert_allclose(semi_nmf_codes.encode(products, gram, 0.5), alone, atol=2e-5)
