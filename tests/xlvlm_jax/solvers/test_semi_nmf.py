"""Semi-NMF: by hand, against scikit-learn, and what must hold for any matrix."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import DictionaryLearning, sparse_encode

from xlvlm_jax.solvers import semi_nmf, sums
from xlvlm_jax.solvers.compression import compress, turn_to_axes

from .helpers import alone

KEY = jax.random.key(0)
# One shape, so that most tests share a compiled solver.
N, D, K = 90, 40, 5
solve = partial(alone(semi_nmf), num_samples=N, num_concepts=K)


def planted(seed, n=N, d=D, k=K, noise=0.1):
    rng = np.random.default_rng(seed)
    codes = 10 * rng.exponential(size=(n, k)) * (rng.random((n, k)) < 0.4)
    atoms = rng.normal(size=(k, d))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    return (codes @ atoms + noise * rng.normal(size=(n, d))).astype(np.float32)


def states(seed, n=N, d=D):
    """Returns rows like real states, with a large common direction and heavy tails."""
    rng = np.random.default_rng(seed)
    spread = 10 * np.arange(1, d + 1) ** -0.7
    common = 3 * rng.standard_t(3, size=d)
    centres = rng.normal(size=(6, d)) * spread
    return (common + centres[rng.integers(0, 6, n)] + rng.standard_t(4, (n, d)) * spread).astype(
        np.float32
    )


def test_two_axes_by_hand():
    # The atoms are the axes and a code is the length less alpha: 3 x 1/2 + (2 + 1 + 2) = 6.5. Both
    # atoms start at the first axis: one takes its rows, the other is unused and must be revived.
    Z = jnp.array([[3.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    init = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    result = alone(semi_nmf)(Z, KEY, num_samples=3, num_concepts=2, init_atoms=init)
    np.testing.assert_allclose(result.components, [[1, 0], [0, 1]], atol=1e-5)
    np.testing.assert_allclose(result.activations, [[2, 0], [0, 1], [2, 0]], atol=1e-4)
    np.testing.assert_allclose(result.objective, 6.5, rtol=1e-5)
    assert result.converged


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("Z", [planted(1), states(2)], ids=["planted", "states"])
def test_objective_is_that_of_scikit_learn_or_lower(Z):
    peer = DictionaryLearning(
        K,
        alpha=1.0,
        transform_alpha=1.0,
        fit_algorithm="cd",
        transform_algorithm="lasso_cd",
        positive_code=True,
        max_iter=150,
        random_state=0,
    )
    codes = peer.fit_transform(Z)
    theirs = semi_nmf.objective(*map(jnp.asarray, (Z, codes.T, peer.components_)), 1.0)
    ours = solve(jnp.asarray(Z), KEY)
    assert ours.objective <= 1.0005 * theirs


def test_codes_of_new_rows_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(K, D)).astype(np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    Z = planted(3)
    wide = Z.astype(np.float64), atoms.astype(np.float64)
    theirs = sparse_encode(*wide, algorithm="lasso_cd", alpha=0.7, positive=True, max_iter=5000)
    ours = semi_nmf.activations(jnp.asarray(Z), jnp.asarray(atoms), 0.7)
    np.testing.assert_allclose(ours, theirs, atol=1e-2)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 1.0, 30.0]), st.sampled_from([0.01, 1.0]))
def test_objective_never_rises_and_the_constraints_hold(seed, alpha, noise):
    Z = jnp.asarray(planted(seed, noise=noise))
    result = solve(Z, jax.random.key(seed), alpha=alpha)
    history = np.asarray(result.history)[: int(result.iterations) + 1]
    energy = float(0.5 * jnp.sum(Z**2))
    # Equal up to float32's rounding of what the objective is computed from.
    assert np.all(np.diff(history) <= 1e-6 * energy)
    np.testing.assert_allclose(history[0], energy, rtol=1e-5)
    np.testing.assert_allclose(history[-1], result.objective, atol=1e-5 * energy)
    np.testing.assert_allclose(np.linalg.norm(result.components, axis=1), 1, atol=1e-5)
    assert np.all(np.asarray(result.activations) >= 0)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_permuting_rows_permutes_activations(seed):
    Z = planted(seed)
    order = np.random.default_rng(seed).permutation(N)
    first = solve(jnp.asarray(Z), KEY, init_atoms=jnp.asarray(Z[:K]))
    second = solve(jnp.asarray(Z[order]), KEY, init_atoms=jnp.asarray(Z[:K]))
    np.testing.assert_allclose(first.objective, second.objective, rtol=1e-3)
    codes = semi_nmf.activations(jnp.asarray(Z), first.components, 1.0)
    again = semi_nmf.activations(jnp.asarray(Z[order]), first.components, 1.0)
    np.testing.assert_allclose(codes[order], again, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.25, 4.0, 64.0]))
def test_scaling_rows_and_alpha_scales_codes(seed, scale):
    # A power of two scales every float exactly, so that both runs take the same path.
    Z = jnp.asarray(planted(seed))
    plain = solve(Z, KEY, alpha=1.0)
    scaled = solve(scale * Z, KEY, alpha=scale)
    np.testing.assert_allclose(scaled.components, plain.components, atol=1e-4)
    np.testing.assert_allclose(scaled.activations, scale * plain.activations, atol=1e-3 * scale)
    np.testing.assert_allclose(scaled.objective, scale**2 * plain.objective, rtol=1e-5)


def test_same_key_same_result():
    Z = jnp.asarray(planted(5))
    np.testing.assert_array_equal(solve(Z, KEY).components, solve(Z, KEY).components)


def test_compression_keeps_a_low_rank_matrix():
    rng = np.random.default_rng(0)
    Z = jnp.asarray(rng.normal(size=(50, 3)) @ rng.normal(size=(3, 80)), jnp.float32)
    basis, compressed = turn_to_axes(compress(Z, KEY, 10))
    np.testing.assert_allclose(basis.T @ basis, np.eye(10), atol=1e-5)
    np.testing.assert_allclose(compressed @ basis.T, Z, atol=1e-4)
    variance = np.sum(np.asarray(compressed) ** 2, axis=0)
    assert np.all(np.diff(variance) <= 1e-3)


@pytest.mark.parametrize("alpha", [1.0, 0.0], ids=["penalty", "cancels"])
def test_an_update_in_blocks_of_rows_is_that_of_all_rows(monkeypatch, alpha):
    rng = np.random.default_rng(4)
    Z = jnp.asarray(planted(4, n=250, noise=1.0 if alpha else 0.0))
    codes = jnp.asarray(rng.exponential(size=(K, 250)), jnp.float32)
    atoms = jnp.asarray(rng.normal(size=(K, D)), jnp.float32)
    given = Z, semi_nmf.energies(Z), codes, atoms, jnp.float32(alpha)
    whole = jax.jit(lambda *arguments: semi_nmf.collect(*arguments))(*given)
    monkeypatch.setattr(sums, "MOST_ROWS", 96)  # two blocks, and a third of 58 rows
    parts = jax.jit(lambda *arguments: semi_nmf.collect(*arguments))(*given)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        scale = np.abs(one).max()
        np.testing.assert_allclose(other / scale, one / scale, atol=2e-6)
