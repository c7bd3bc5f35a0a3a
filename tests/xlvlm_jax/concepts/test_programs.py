"""How many programs are compiled, and that rows and concepts added as padding change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.xlvlm_jax.solvers.helpers import Compilations, alone
from xlvlm_jax import decompose, project
from xlvlm_jax.concepts.methods import METHODS

KEY = jax.random.key(0)
D = 40


def rows(N, seed=0):
    random = np.random.default_rng(seed)
    centres = 3 * random.standard_normal((6, D))
    return (centres[random.integers(6, size=N)] + random.standard_normal((N, D))).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
def test_ten_sizes_take_three_programs(method):
    sizes = [
        (90, 3),
        (90, 5),
        (81, 4),
        (96, 6),
        (70, 2),
        (66, 3),
        (88, 7),
        (65, 5),
        (93, 8),
        (77, 4),
    ]
    with Compilations() as compiled:
        for N, K in sizes:
            concepts = decompose(rows(N), K, method, key=KEY)
            assert concepts.components.shape == (K, D)
            assert concepts.activations.shape == (N, K)
    assert len(compiled.names) <= 3, compiled.names
    with Compilations() as compiled:
        for N, K in sizes[:4]:
            some = decompose(rows(N), K, method, key=KEY)
            assert project(rows(N), some).shape == (N, K)
    assert len(compiled.names) <= 2, compiled.names


@pytest.mark.parametrize("method", METHODS)
def test_options_that_are_numbers_compile_nothing(method):
    if method == "simple":
        pytest.skip("has no options")
    Z = rows(90)
    decompose(Z, 4, method, key=KEY, tol=1e-3, max_iter=40)
    with Compilations() as compiled:
        found = decompose(Z, 4, method, key=KEY, tol=0.0, max_iter=33)
        assert found.iterations <= 33
        assert len(found.history) == found.iterations + 1
        jax.block_until_ready(found.history)
    assert compiled.names == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("N", [64, 65, 95])
def test_padded_rows_change_nothing(method, N):
    K, Z = 5, rows(N, seed=N)
    found = decompose(Z, K, method, key=KEY)
    plain = alone(METHODS[method].solver)(jnp.asarray(Z), KEY, num_samples=N, num_concepts=K)
    np.testing.assert_allclose(found.objective, plain.objective, rtol=1e-6)
    # Sums in another order differ in the last digit, which many updates of semi-NMF carry on.
    share = {"kmeans": 1e-6, "simple": 1e-6, "pca": 5e-6, "snmf": 1e-4}[method]
    for name in ("components", "activations"):
        ours, expected = getattr(found, name), getattr(plain, name)
        largest = np.abs(expected).max()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=share * largest)


@pytest.mark.parametrize("method", ["pca", "kmeans"])
@pytest.mark.parametrize("N", [64, 65])
def test_padded_rows_change_nothing_far_from_zero(method, N):
    """Rows of zeros are far from these, and must not count when products choose their digits."""
    Z = rows(N) + np.float32(1e4)
    found = decompose(Z, 5, method, key=KEY)
    wide, components = (np.asarray(each, np.float64) for each in (Z, found.components))
    if method == "pca":
        exact = (wide - np.asarray(found.mean)) @ components.T
    else:
        exact = 1 / (1 + np.linalg.norm(wide[:, None] - components, axis=2))
    np.testing.assert_allclose(project(Z, found), exact, rtol=1e-5, atol=1e-4)
    # The mean of a fit has more digits than float32.
    np.testing.assert_allclose(found.activations, exact, rtol=1e-5, atol=1e-2)


def test_padded_rows_have_no_weight():
    Z = rows(66)
    weights = np.random.default_rng(1).uniform(0.1, 3, 66)
    found = decompose(Z, 4, "kmeans", key=KEY, sample_weight=weights)
    scaled = jnp.asarray(weights / 2, jnp.float32)  # the power of two below the largest
    plain = alone(METHODS["kmeans"].solver)(
        jnp.asarray(Z), KEY, num_samples=66, num_concepts=4, sample_weight=scaled
    )
    np.testing.assert_allclose(found.objective, 2 * plain.objective, rtol=1e-6)
    np.testing.assert_allclose(found.components, plain.components, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_under_jit_rows_are_not_padded(method):
    Z = rows(90)
    traced = jax.jit(lambda Z: decompose(Z, 4, method, key=KEY).objective)(Z)
    np.testing.assert_allclose(decompose(Z, 4, method, key=KEY).objective, traced, rtol=1e-5)
