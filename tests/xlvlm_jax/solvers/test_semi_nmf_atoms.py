"""The atoms' step: by hand, against scikit-learn's dictionary update, and its change of f."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition._dict_learning import _update_dict

from xlvlm_jax.solvers import semi_nmf_atoms as dictionary

ALPHA = jnp.float32(0.5)


def given(seed, N=80, K=7, D=12):
    rng = np.random.default_rng(seed)
    codes = rng.exponential(size=(N, K)) * (rng.random((N, K)) < 0.5)
    atoms = rng.normal(size=(K, D))
    atoms *= rng.uniform(0.5, 1, K)[:, None] / np.linalg.norm(atoms, axis=1, keepdims=True)
    Z = codes @ rng.normal(size=(K, D)) * 0.3 + rng.normal(size=(N, D))
    return Z, codes, atoms


def sums_of(Z, codes, atoms):
    parts = codes.T @ Z, codes.T @ codes, codes.sum(axis=0), f(Z, codes, atoms)
    return dictionary.Sums(*(jnp.asarray(part, jnp.float32) for part in parts))


def f(Z, codes, atoms):
    return 0.5 * np.sum((Z - codes @ atoms) ** 2) + float(ALPHA) * codes.sum()


def step(Z, codes, atoms, residuals=None, unused=None):
    K = len(atoms)
    atoms = jnp.asarray(atoms, jnp.float32)
    state = dictionary.begin(atoms, jnp.float32(np.inf))
    residuals = jnp.zeros_like(atoms) if residuals is None else residuals
    unused = jnp.zeros(K, bool) if unused is None else unused
    return dictionary.advance(state, sums_of(Z, codes, atoms), residuals, ALPHA, unused)


def test_one_atom_by_hand():
    # The best atom for rows (0, 2) and (0, 4), coded 2 and 4, is (0, 1), of length one.
    Z, codes = np.array([[0.0, 2.0], [0.0, 4.0]]), np.array([[2.0], [4.0]])
    new, accepted = step(Z, codes, np.array([[1.0, 0.0]]))
    np.testing.assert_allclose(new.atoms, [[0, 1]], atol=1e-6)
    np.testing.assert_allclose(new.objective, 0.5 * 6, rtol=1e-5)
    assert accepted


@pytest.mark.parametrize("K", [7, 2 * dictionary.BLOCK + 3])
def test_the_step_of_scikit_learn(K):
    Z, codes, atoms = given(0, N=300, K=K, D=90)
    expected = atoms.copy()
    _update_dict(expected, Z, codes)
    new, _ = step(Z, codes, atoms)
    np.testing.assert_allclose(new.atoms * new.scale[:, None], expected, atol=1e-5)


def test_more_atoms_are_no_longer_program():
    def lines(K):
        sums = sums_of(*given(0, K=K, D=12))
        return str(jax.make_jaxpr(dictionary._update_atoms)(jnp.ones((K, 12)), *sums[:2])).count(
            "\n"
        )

    assert lines(2 * dictionary.BLOCK) == lines(8 * dictionary.BLOCK)


@pytest.mark.parametrize("seed", range(5))
def test_returns_f_at_the_new_atoms_and_scaled_codes_and_never_raises_it(seed):
    Z, codes, atoms = given(seed)
    new, _ = step(Z, codes, atoms)
    np.testing.assert_allclose(jnp.linalg.norm(new.atoms, axis=1), 1, rtol=1e-6)
    reached = f(Z, codes * np.asarray(new.scale), np.asarray(new.atoms))
    np.testing.assert_allclose(new.objective, reached, rtol=1e-5)
    assert new.objective <= f(Z, codes, atoms)


def test_an_unused_atom_points_at_the_worst_coded_row():
    Z, codes, atoms = given(1)
    codes[:, 2] = 0
    residuals = jnp.zeros_like(jnp.asarray(atoms, jnp.float32)).at[0, 3].set(9.0)
    new, _ = step(Z, codes, atoms, residuals, jnp.arange(len(atoms)) == 2)
    np.testing.assert_array_equal(new.atoms[2], np.eye(12)[3])
    short, _ = step(Z, codes, atoms, residuals / 100, jnp.arange(len(atoms)) == 2)
    np.testing.assert_allclose(short.atoms[2], atoms[2] / np.linalg.norm(atoms[2]), rtol=1e-5)


def test_a_step_that_raises_f_is_undone():
    Z, codes, atoms = given(2)
    state = dictionary.begin(jnp.asarray(atoms, jnp.float32), jnp.float32(0))
    state = state._replace(momentum=jnp.float32(3), before=-state.atoms)
    ahead, _ = dictionary.extrapolate(state)
    sums = sums_of(Z, codes, np.asarray(ahead))
    new, accepted = dictionary.advance(
        state, sums, jnp.zeros_like(ahead), ALPHA, jnp.zeros(len(ahead), bool)
    )
    assert not accepted
    np.testing.assert_array_equal(new.atoms, state.atoms)
    assert (new.momentum, new.objective) == (1, 0)
