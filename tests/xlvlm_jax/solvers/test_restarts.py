"""Several starts and several numbers of concepts: the best start, and stability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlvlm_jax.concepts.decomposition import decompose
from xlvlm_jax.solvers.restarts import (
    best_first,
    draw_rows,
    draw_weighted,
    sample,
    stability,
    uniforms,
)

KEY = jax.random.key(0)


def planted(seed=0, n=120, d=16, k=4):
    rng = np.random.default_rng(seed)
    codes = 10 * rng.exponential(size=(n, k)) * (rng.random((n, k)) < 0.4)
    return (codes @ rng.normal(size=(k, d)) + 0.05 * rng.normal(size=(n, d))).astype(np.float32)


def test_the_best_start_comes_first_and_a_tie_goes_to_the_earlier():
    components = jnp.arange(4.0).reshape(4, 1, 1)
    ordered = best_first(jnp.array([5.0, 2.0, 3.0, 2.0]), components)
    np.testing.assert_array_equal(ordered.ravel(), [1, 3, 2, 0])
    near = best_first(jnp.array([2.00001, 2.0]), components[:2])
    np.testing.assert_array_equal(near.ravel(), [0, 1])


def test_stability_by_hand():
    # The second start has the same directions in another order, the third one of them turned 60°.
    a, b = np.eye(2, 3), np.eye(2, 3)[::-1] * 5
    c = np.array([[1, 0, 0], [0, 0.5, 0.75**0.5]])
    np.testing.assert_allclose(stability(np.stack([a, b])), [1, 1])
    np.testing.assert_allclose(stability(np.stack([a, b, c])), [1, 0.75])


def test_the_rows_of_a_sample():
    np.testing.assert_array_equal(sample(KEY, 50, 3), np.arange(50))
    drawn = np.asarray(sample(KEY, 5000, 3))
    assert len(set(drawn.tolist())) == len(drawn) == 1024
    assert len(sample(KEY, 5000, 100)) == 1600


@pytest.mark.parametrize("method", ["snmf", "kmeans", "pca", "simple"])
def test_several_numbers_of_concepts_in_one_program(method):
    Z = planted()
    numbers = [2, 4, 3]
    # Starts from the same rows need not end alike: only the widths of the compressed Z differ.
    found = decompose(Z, numbers, method, key=KEY)
    for K, concepts in zip(numbers, found, strict=True):
        assert concepts.components.shape == (K, 16)
        assert concepts.activations.shape == (120, K)
        alone = decompose(Z, K, method, key=KEY)
        if method in ("pca", "simple"):
            np.testing.assert_allclose(concepts.components, alone.components, atol=1e-4)
        if method == "snmf":
            np.testing.assert_allclose(concepts.objective, alone.objective, rtol=5e-3)
    assert found[1].objective < found[2].objective < found[0].objective


def test_planted_concepts_are_stable_and_more_starts_do_not_hurt():
    Z = planted()
    eight = decompose(Z, 4, key=KEY)
    np.testing.assert_allclose(eight.stability, 1, atol=1e-2)
    assert decompose(Z, 4, key=KEY, n_init=1).stability is None
    one, many = (decompose(Z, 6, "kmeans", key=KEY, n_init=n) for n in (1, 10))
    assert many.stability.shape == (6,)
    assert many.objective <= 1.05 * one.objective


def test_free_signs_fit_better():
    Z = planted()
    free = decompose(Z, 3, key=KEY, nonnegative=False)
    assert np.any(np.asarray(free.activations) < 0)
    assert free.objective < decompose(Z, 3, key=KEY).objective


def test_uniforms_by_number_are_those_of_jax():
    expected = jax.random.uniform(KEY, (1001,))
    np.testing.assert_array_equal(uniforms(KEY, jnp.arange(1001)), expected)
    np.testing.assert_array_equal(uniforms(KEY, jnp.array([700, 3])), expected[jnp.array([700, 3])])
    # A key of the older kind, and numbers beyond the 2^24 that a float32 can count.
    old, far = jax.random.PRNGKey(0), jnp.array([2**31 - 1, 2**24 + 1])
    np.testing.assert_array_equal(uniforms(old, far), uniforms(KEY, far))
    assert np.all((uniforms(KEY, far) >= 0) & (uniforms(KEY, far) < 1))


def test_the_rows_drawn_are_the_largest_uniforms():
    drawn = draw_rows(KEY, 90, 7, 100)
    np.testing.assert_array_equal(drawn, np.argsort(-jax.random.uniform(KEY, (100,))[:90])[:7])
    # Of fewer rows than are wanted all come first, then those that pad Z.
    assert set(np.asarray(draw_rows(KEY, 5, 7, 100))[:5].tolist()) == set(range(5))


def test_rows_drawn_by_weight_represent_all():
    rng = np.random.default_rng(0)
    weights = (rng.exponential(size=300) * 10.0 ** rng.integers(-1, 3, 300)).astype(np.float32)
    weights[::3] = 0
    values = rng.normal(size=300) + 5
    draw = jax.jit(lambda key: draw_weighted(key, jnp.asarray(weights), 60))
    sums, totals = [], []
    for key in jax.random.split(KEY, 200):
        numbers, counted = (np.asarray(part) for part in draw(key))
        assert len(set(numbers)) == 60 and np.all(weights[numbers] > 0)
        sums.append(counted.sum()), totals.append(counted @ values[numbers])
    np.testing.assert_allclose(np.mean(sums), weights.sum(), rtol=0.01)
    np.testing.assert_allclose(np.mean(totals), weights @ values, rtol=0.01)
    # Where there are no more, each is itself.
    numbers, counted = draw_weighted(KEY, jnp.asarray(weights), 300)
    np.testing.assert_array_equal(numbers, np.arange(300))
    np.testing.assert_array_equal(counted, weights)
    # Of fewer rows with a weight than are wanted none gets one.
    numbers, counted = draw_weighted(KEY, jnp.array([0.0, 2.0, 0.0, 3.0]), 3)
    assert np.asarray(counted)[np.argsort(numbers)].sum() == 5
