"""K-means: by hand, against scikit-learn, and what must hold for any matrix."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs
from sklearn.metrics import pairwise_distances

from xlvlm_jax.solvers import kmeans, kmeans_assignment
from xlvlm_jax.solvers.compression import SAMPLE

from .helpers import alone

KEY = jax.random.key(0)
# One shape, so that most tests share a compiled solver.
N, D, K = 200, 16, 8
solve = partial(alone(kmeans), num_samples=N, num_concepts=K)


def blobs(seed, n=N, d=D, k=K):
    return make_blobs(n, d, centers=k, cluster_std=3.0, random_state=seed)[0].astype(np.float32)


def labels(result):
    return np.argmax(np.asarray(result.activations), axis=1)


def test_four_points_by_hand():
    Z = jnp.array([[0.0], [1.0], [10.0], [11.0]])
    init = jnp.array([[0.0], [10.0]])
    result = alone(kmeans)(Z, KEY, num_samples=4, num_concepts=2, init_centroids=init)
    np.testing.assert_allclose(result.components, [[0.5], [10.5]], atol=1e-6)
    np.testing.assert_allclose(result.objective, 1, rtol=1e-6)
    np.testing.assert_allclose(result.activations[0], [1 / 1.5, 1 / 11.5], rtol=1e-6)
    # From inertia 2 to 1; the second update changes nothing, which is how it is known to be over.
    np.testing.assert_allclose(result.history[:3], [2, 1, 1], rtol=1e-6)
    assert (result.iterations, result.converged) == (2, True)


@pytest.mark.parametrize("common", [0.0, 300.0])
@pytest.mark.parametrize("tol", [0.0, 1e-2])
def test_from_scikit_learns_start_to_its_end(common, tol):
    Z = blobs(3) + np.float32(common)
    theirs = KMeans(K, init=Z[:K], n_init=1, algorithm="lloyd", tol=tol).fit(Z)
    ours = solve(jnp.asarray(Z), KEY, tol=tol, init_centroids=jnp.asarray(Z[:K]))
    np.testing.assert_allclose(ours.components, theirs.cluster_centers_, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(labels(ours), theirs.labels_)
    np.testing.assert_allclose(ours.objective, theirs.inertia_, rtol=1e-4)
    assert ours.iterations == theirs.n_iter_


def test_empty_clusters_move_where_scikit_learn_moves_them():
    Z = blobs(4)
    init = Z[:K].copy()
    init[1], init[3] = 1e3, -1e3
    theirs = KMeans(K, init=init, n_init=1, algorithm="lloyd").fit(Z)
    ours = solve(jnp.asarray(Z), KEY, init_centroids=jnp.asarray(init))
    np.testing.assert_array_equal(labels(ours), theirs.labels_)
    np.testing.assert_allclose(ours.components, theirs.cluster_centers_, atol=1e-4)


@pytest.mark.parametrize("shape", [(2500, 80, 6), (3000, 16, 150)], ids=["wide", "in blocks"])
def test_given_centroids_lead_to_scikit_learns_end(shape):
    """Wide rows would be compressed without centroids; many scores are renewed in blocks."""
    n, d, k = shape
    Z = make_blobs(n, d, centers=k, cluster_std=3.0, random_state=5)[0].astype(np.float32)
    start = Z[:k]
    theirs = KMeans(k, init=start, n_init=1, algorithm="lloyd", tol=0).fit(Z)
    given = {"num_samples": n, "num_concepts": k, "init_centroids": start, "tol": 0.0}
    ours = alone(kmeans)(jnp.asarray(Z), KEY, **given)
    assert np.mean(labels(ours) == theirs.labels_) > 0.999
    np.testing.assert_allclose(ours.objective, theirs.inertia_, rtol=1e-4)
    assert ours.converged
    # Both ways of renewing were taken: all centroids move at first, and few in the end.
    assert ours.iterations == theirs.n_iter_ > 2 + 8 * (k > kmeans_assignment.LARGE)


def test_given_centroids_are_kept_whole(monkeypatch):
    """White noise: few columns would hold little of a centroid."""
    monkeypatch.setattr(kmeans, "is_small", lambda *_: False)
    rng = np.random.default_rng(9)
    Z = rng.normal(size=(2500, 80)).astype(np.float32)
    start = rng.normal(size=(6, 80)).astype(np.float32)
    sizes = {"num_samples": len(Z), "max_iter": 0}
    planned = partial(kmeans.plan, KEY, width=80, num_concepts=(6,), **sizes)
    assert planned()[0].compressed > planned(init_centroids=start)[0].compressed == 0
    ours = alone(kmeans)(jnp.asarray(Z), KEY, num_concepts=6, init_centroids=start, **sizes)
    np.testing.assert_allclose(ours.components, start, atol=1e-6)
    squared = pairwise_distances(Z, start) ** 2
    np.testing.assert_array_equal(labels(ours), squared.argmin(axis=1))
    np.testing.assert_allclose(ours.objective, squared.min(axis=1).sum(), rtol=1e-5)


def test_rows_compressed_by_a_sample_reach_the_true_clusters(monkeypatch):
    monkeypatch.setattr(kmeans, "is_small", lambda *_: False)
    n, d, k = 2500, 80, 6
    Z, truth = make_blobs(n, d, centers=k, cluster_std=3.0, random_state=5)
    assert n >= kmeans.ENOUGH * SAMPLE * (k + kmeans.BY_SAMPLE)
    theirs = KMeans(k, init=np.array([Z[truth == c].mean(axis=0) for c in range(k)])).fit(Z)
    Z = jnp.asarray(Z, jnp.float32)
    ours = alone(kmeans)(Z, KEY, num_samples=n, num_concepts=k, tol=0.0)
    np.testing.assert_allclose(ours.objective, theirs.inertia_, rtol=1e-4)
    assert len(set(zip(theirs.labels_, labels(ours), strict=True))) == k


def test_seeding_finds_separated_clusters():
    Z, truth = make_blobs(300, 300, centers=10, cluster_std=1.0, random_state=0)
    result = alone(kmeans)(jnp.asarray(Z, jnp.float32), KEY, num_samples=300, num_concepts=10)
    # Every true cluster is one found cluster.
    assert len(set(zip(truth, labels(result), strict=True))) == 10


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_inertia_never_rises_and_is_that_of_the_result(seed):
    Z = blobs(seed)
    result = solve(jnp.asarray(Z), jax.random.key(seed))
    history = np.asarray(result.history)[: int(result.iterations) + 1]
    assert np.all(np.diff(history) <= 1e-5 * history[0])
    distances = np.linalg.norm(Z[:, None] - np.asarray(result.components), axis=2)
    np.testing.assert_allclose(np.sum(distances.min(axis=1) ** 2), result.objective, rtol=1e-4)
    np.testing.assert_allclose(result.activations, 1 / (1 + distances), rtol=1e-3)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_permuting_rows_permutes_activations(seed):
    Z = blobs(seed)
    order = np.random.default_rng(seed).permutation(N)
    plain = solve(jnp.asarray(Z), KEY, init_centroids=jnp.asarray(Z[:K]))
    permuted = solve(jnp.asarray(Z[order]), KEY, init_centroids=jnp.asarray(Z[:K]))
    np.testing.assert_allclose(plain.activations[order], permuted.activations, atol=1e-4)


def test_a_row_on_its_centroid_has_activation_one():
    # Far from the origin, where |z|^2 - 2 z c + |c|^2 would leave a distance by rounding alone.
    Z = jnp.asarray(blobs(1) + np.float32(1e3))
    activations = kmeans.activations(Z, jnp.concatenate([Z[:2], Z[:1]]))
    np.testing.assert_array_equal(activations[0, [0, 2]], [1, 1])
    assert activations[1, 1] == 1


def test_padding_rows_do_not_count():
    Z = blobs(2) + np.float32(50)
    plain = solve(jnp.asarray(Z), KEY, init_centroids=jnp.asarray(Z[:K]))
    padded = solve(jnp.pad(Z, ((0, 8), (0, 0))), KEY, init_centroids=jnp.asarray(Z[:K]))
    np.testing.assert_allclose(padded.components, plain.components, atol=1e-4)
    np.testing.assert_allclose(padded.objective, plain.objective, rtol=1e-5)


@pytest.mark.parametrize("offset", [100, 1e4])
def test_two_million_rows_far_from_zero(offset):
    """Clusters are at the offset, 10 and 20 above; centres and inertia equal those in float64."""
    rng = np.random.default_rng(0)
    steps = np.sort(rng.integers(0, 3, 2_000_000))
    Z = rng.standard_normal((2_000_000, 2), np.float32)
    Z = (Z + (offset + 10 * steps[:, None])).astype(np.float32)
    start = np.float32(offset) + np.array([[0, 1], [9, 10], [20, 19]], np.float32)
    found = alone(kmeans)(
        jnp.asarray(Z), KEY, num_samples=len(Z), num_concepts=3, init_centroids=start
    )
    truth = Z.astype(np.float64)
    centres = np.array([truth[steps == k].mean(axis=0) for k in range(3)])
    last_digit = np.spacing(np.float32(offset)) / 2
    np.testing.assert_allclose(found.components, centres, rtol=0, atol=last_digit + 1e-6 * 8)
    np.testing.assert_array_equal(labels(found), steps)
    inertia = np.sum((truth - centres[steps]) ** 2)
    np.testing.assert_allclose(found.objective, inertia, rtol=1e-6)
    # The last but one comes from the totals: it is the same, not a part in a thousand more.
    assert int(found.iterations) >= 2
    np.testing.assert_allclose(found.history[int(found.iterations) - 1], inertia, rtol=1e-6)


def test_far_from_zero_the_objective_is_that_of_the_centroids_returned():
    """Stops after one update, when moving a centroid by its last digit changes the inertia."""
    rng = np.random.default_rng(1)
    Z = (rng.standard_normal((2000, 2)) + 1e4).astype(np.float32)
    start = np.float32(1e4) + np.array([[-2.0, 0], [0.5, 1], [1, -1]], np.float32)
    options = {"init_centroids": jnp.asarray(start), "max_iter": 1, "tol": 0.0}
    found = alone(kmeans)(jnp.asarray(Z), KEY, num_samples=len(Z), num_concepts=3, **options)
    centroids = np.asarray(found.components, np.float64)
    squared = ((Z.astype(np.float64)[:, None] - centroids) ** 2).sum(axis=2)
    inertia = squared.min(axis=1).sum()
    np.testing.assert_allclose(found.objective, inertia, rtol=1e-7)
    np.testing.assert_allclose(found.history[1], inertia, rtol=1e-7)


def test_half_a_million_wide_rows_trace():
    """N D = 2^31, which overflows if sizes are multiplied in 32 bits."""
    Z = jax.ShapeDtypeStruct((524_288, 4096), jnp.float32)
    found = jax.eval_shape(partial(kmeans.solve, num_samples=524_288, num_concepts=(5,)), Z, KEY)
    assert found.activations.shape == (1, 524_288, 5)


def test_rows_that_are_all_near_each_other_keep_their_labels():
    """The distances are smaller than the last digit of 1 in float32."""
    Z = jnp.array([[1e-9], [1.2e-9], [5e-9], [9e-9]])
    found, squared = kmeans.assign(Z, jnp.array([[1e-9], [5e-9], [9e-9]]))
    np.testing.assert_array_equal(found, [0, 0, 1, 2])
    np.testing.assert_array_equal(squared[jnp.array([0, 2, 3]), found[jnp.array([0, 2, 3])]], 0)


def test_weights_by_hand():
    Z = jnp.array([[0.0], [1.0], [10.0], [11.0]])
    options = {"init_centroids": jnp.array([[0.0], [10.0]]), "num_samples": 4, "num_concepts": 2}
    weights = jnp.array([3.0, 1.0, 0.5, 0.0])
    result = alone(kmeans)(Z, KEY, sample_weight=weights, **options)
    np.testing.assert_allclose(result.components, [[0.25], [10]], atol=1e-6)
    np.testing.assert_allclose(result.objective, 3 * 0.25**2 + 0.75**2, rtol=1e-5)
    np.testing.assert_allclose(result.history[:2], [1, 0.75], rtol=1e-5)
    # The row that counts for nothing has its activations.
    np.testing.assert_allclose(result.activations[3], [1 / 11.75, 1 / 2], rtol=1e-5)


@pytest.mark.parametrize("shape", [(300, 90, 6), (300, 4, 140)], ids=str)
def test_whole_weights_are_as_many_rows(shape):
    """Also with compressed rows and with kept scores; the result is scikit-learn's."""
    n, d, k = shape
    Z, truth = make_blobs(n, d, centers=k, cluster_std=3.0, random_state=5)
    Z, weights = Z.astype(np.float32), np.random.default_rng(0).integers(0, 4, n)
    # A row of each true cluster, as updates on other columns might end in another optimum.
    first = np.unique(truth, return_index=True)[1]
    start, weights[first] = jnp.asarray(Z[first]), 2
    many = np.repeat(Z, weights, axis=0)
    fixed = {"num_concepts": k, "init_centroids": start, "tol": 0.0}
    once = alone(kmeans)(
        jnp.asarray(Z), KEY, sample_weight=weights.astype(np.float32), num_samples=n, **fixed
    )
    repeated = alone(kmeans)(jnp.asarray(many), KEY, num_samples=len(many), **fixed)
    np.testing.assert_allclose(once.objective, repeated.objective, rtol=1e-4)
    np.testing.assert_allclose(once.components, repeated.components, atol=1e-3)
    np.testing.assert_array_equal(np.repeat(labels(once), weights), labels(repeated))
    theirs = KMeans(k, init=start, n_init=1, algorithm="lloyd", tol=0).fit(Z, sample_weight=weights)
    np.testing.assert_allclose(once.objective, theirs.inertia_, rtol=1e-4)


def test_rows_without_weight_are_not_seeds():
    Z = jnp.asarray(blobs(6))
    real = np.arange(N) % 4 == 1
    active = jnp.ones(K, bool)
    problem = kmeans.prepare(Z, N, active, weights=jnp.asarray(real, jnp.float32))
    for number in range(5):
        seeds = kmeans.seed(problem, jax.random.key(number)) + problem.mean
        apart = np.linalg.norm(np.asarray(Z)[:, None] - seeds, axis=2).min(axis=0)
        of = np.linalg.norm(np.asarray(Z)[:, None] - seeds, axis=2).argmin(axis=0)
        assert np.all(apart < 1e-4) and np.all(real[of])
    # Equal weights are none: the same draws.
    plain = kmeans.seed(kmeans.prepare(Z, N, active), KEY)
    equal = kmeans.seed(kmeans.prepare(Z, N, active, weights=jnp.full(N, 0.5)), KEY)
    np.testing.assert_allclose(plain, equal, atol=1e-5)


def test_one_start_finds_all_clusters_where_scikit_learns_misses_some():
    rng = np.random.default_rng(3)
    centres = 3 * rng.standard_normal((20, 10))
    Z = (centres[rng.integers(0, 20, 300)] + rng.standard_normal((300, 10))).astype(np.float32)
    solve = partial(alone(kmeans), jnp.asarray(Z), num_samples=300, num_concepts=20)
    ours = [float(solve(jax.random.key(number)).objective) for number in range(12)]
    theirs = [KMeans(20, n_init=1, random_state=number).fit(Z).inertia_ for number in range(30)]
    assert max(ours) < 1.001 * min(theirs) and np.mean(theirs) > 1.05 * min(theirs)
    # Choosing among many rows takes too long for many centroids of many rows.
    few = kmeans.plan(KEY, width=10, num_samples=300, num_concepts=(20,))[0]
    many = kmeans.plan(KEY, width=512, num_samples=20_000, num_concepts=(1024,))[0]
    assert (few.candidates, many.candidates) == (kmeans.CANDIDATES, None)
