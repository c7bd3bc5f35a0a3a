"""Sums over rows: by hand, against float64, and at sizes where float32 sums fail."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from xlvlm_jax.solvers import sums
from xlvlm_jax.solvers.sums import Wide


def wide(pair):
    return np.float64(pair.high) + np.float64(pair.low)


def test_a_pair_keeps_what_a_float32_rounds_away():
    pair = Wide(jnp.float32(2**24), jnp.float32(0)) + jnp.float32(1)
    assert (float(pair.high), float(pair.low)) == (2**24, 1)
    assert wide(pair.times(0.5)) == 2**23 + 0.5


def test_a_product_has_twice_the_digits():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 1000)).astype(np.float32) * 1e3
    np.testing.assert_allclose(
        wide(jax.jit(sums.product)(a, b)), a.astype(np.float64) * b.astype(np.float64), 1e-10
    )


@pytest.mark.parametrize("count", [1, 2, 7, 1000, 100_003])
def test_totals_are_those_of_float64(count):
    rng = np.random.default_rng(count)
    a, b = rng.normal(size=(2, count)).astype(np.float32) + np.float32(100)
    np.testing.assert_allclose(wide(jax.jit(sums.total)(a)), np.sum(a, dtype=np.float64), 1e-13)
    expected = a.astype(np.float64) @ b.astype(np.float64)
    found = jax.jit(lambda a, b: sums.total(sums.product(a, b)))(a, b)
    np.testing.assert_allclose(wide(found), expected, 1e-10)


@pytest.mark.parametrize("shape", [(1, 3), (100, 700), (3000, 700), (2_000_000, 2)], ids=str)
@pytest.mark.parametrize("offset", [0, 1e4])
def test_column_means_to_a_millionth_of_a_deviation(shape, offset):
    Z = np.random.default_rng(0).standard_normal(shape, np.float32) + np.float32(offset)
    found = jax.jit(sums.column_means)(Z)
    np.testing.assert_allclose(wide(found), Z.mean(axis=0, dtype=np.float64), rtol=0, atol=1e-6)
    assert np.all(np.abs(found.low) <= np.spacing(np.abs(found.high)) / 2)


def test_weighted_means_are_numpys():
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((30_000, 7), np.float32) + np.float32(1e3)
    weights = rng.exponential(size=len(Z)).astype(np.float32)
    Z[:100], weights[:100] = -1e6, 0  # rows without weight are no origin either
    expected = np.average(Z.astype(np.float64), axis=0, weights=weights)
    found = jax.jit(lambda Z, weights: sums.column_means(Z, weights=weights))(Z, weights)
    np.testing.assert_allclose(wide(found), expected, rtol=0, atol=2e-6)


def test_padding_rows_are_not_in_the_mean():
    Z = jnp.full((3000, 5), 7.0).at[2000:].set(0)
    found = sums.column_means(Z, 2000)
    np.testing.assert_array_equal(found.high, np.full(5, 7))


@pytest.mark.parametrize("size", [(30, 4), (2_000_000, 2)], ids=str)
def test_cluster_means_of_numpy(size):
    """Compares with scikit-learn's centres of rows around 100, 110 and 120."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, size[0]).astype(np.int32)
    Z = rng.standard_normal(size, np.float32) + np.float32(100) + 10 * labels[:, None]
    Z = Z.astype(np.float32)
    counts, means = jax.jit(partial(sums.cluster_means, num_clusters=4))(Z, labels)
    np.testing.assert_array_equal(counts, np.bincount(labels, minlength=4))
    expected = [Z[labels == k].mean(axis=0, dtype=np.float64) for k in range(3)]
    np.testing.assert_allclose(wide(means)[:3], expected, rtol=0, atol=1e-6 * Z.std())
    np.testing.assert_array_equal(means.high[3], 0)
    theirs = KMeans(3, init=np.array(expected), n_init=1, max_iter=1, tol=0).fit(Z)
    np.testing.assert_allclose(means.high[:3], theirs.cluster_centers_, atol=0.02)


def test_weighted_sums_and_overlaps_of_many_rows():
    rng = np.random.default_rng(0)
    codes = rng.exponential(size=(3, 300_001)).astype(np.float32)
    Z = rng.normal(size=(300_001, 5)).astype(np.float32) + np.float32(1000)
    long = codes.astype(np.float64)
    mean = Z.mean(axis=0)
    found = jax.jit(sums.weighted)(codes, Z, mean)
    expected = long @ (Z.astype(np.float64) - mean)
    np.testing.assert_allclose(wide(found), expected, rtol=0, atol=1e-6 * long.sum())
    np.testing.assert_allclose(
        wide(jax.jit(sums.weighted)(codes, Z)), long @ Z.astype(np.float64), rtol=1e-6
    )
    found = jax.jit(sums.overlaps)(codes.T, codes.T)
    np.testing.assert_allclose(wide(found), long @ long.T, rtol=1e-6)


@pytest.mark.parametrize("rows", [300, 5000])
@pytest.mark.parametrize("offset", [5, 1e4])
def test_directions_are_weighted_sums_near_and_far_from_the_origin(rows, offset):
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((rows, 70), np.float32) + np.float32(offset)
    codes = rng.standard_normal((3, rows), np.float32)
    mean = np.full(70, offset, np.float32)
    expected = codes.astype(np.float64) @ (Z.astype(np.float64) - offset)
    far = sums.is_far(jnp.asarray(mean), jnp.float32(1))
    found = jax.jit(sums.weighted_directions)(codes, Z, mean, far)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * rows**0.5)


def test_more_rows_at_once_have_to_be_nearer_to_the_origin():
    mean = jnp.asarray([300.0, 0.0])
    for rows, far in ((1, False), (sums.MOST_ROWS, False), (2 * sums.MOST_ROWS, True)):
        assert bool(sums.is_far(mean, jnp.float32(1), rows)) == far
    Z = jax.random.normal(jax.random.key(0), (20_000, 2))
    codes = jax.random.normal(jax.random.key(1), (3, 20_000))
    expected = np.asarray(codes, np.float64) @ np.asarray(Z, np.float64)
    for far in (False, True):
        found = sums.weighted_directions(codes, Z, jnp.zeros(2), far, most=20_000)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * 20_000**0.5)


@pytest.mark.parametrize("rows", [5, 4096, 3 * 2**10 + 1])
def test_products_with_rows_far_from_the_origin(rows):
    rng = np.random.default_rng(0)
    Z = rng.normal(size=(rows, 300)).astype(np.float32) + np.float32(1e4)
    mean, vectors = np.full(300, 1e4, np.float32), rng.normal(size=(2, 300)).astype(np.float32)
    expected = vectors.astype(np.float64) @ (Z.astype(np.float64) - 1e4).T
    Z, mean, vectors = map(jnp.asarray, (Z, mean, vectors))
    one = jnp.float32(1)
    assert sums.is_far(mean, one) and not sums.is_far(mean / 1e4, one)
    found = jax.jit(sums.centred_products)(vectors, Z, mean, True)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert sums.centred_products(vectors, Z[:0], mean, True).shape == (2, 0)
    near = sums.centred_products(vectors, Z - mean, 0 * mean, False)
    np.testing.assert_allclose(near, expected, atol=1e-4)
    for at, around, far in ((Z, mean, True), (Z - mean, 0 * mean, False)):
        scores = jax.jit(sums.centred_scores)(at, vectors.T, around, far)
        np.testing.assert_allclose(scores, expected.T, atol=1e-4)


def test_sums_trace_at_any_size():
    """There are 2^31 numbers and more, which overflow if sizes are multiplied in 32 bits."""
    Z = jax.ShapeDtypeStruct((2_000_000, 4096), jnp.float32)
    labels = jax.ShapeDtypeStruct((2_000_000,), jnp.int32)
    assert jax.eval_shape(sums.column_means, Z).high.shape == (4096,)
    counts, _ = jax.eval_shape(partial(sums.cluster_means, num_clusters=7), Z, labels)
    assert counts.shape == (7,)
