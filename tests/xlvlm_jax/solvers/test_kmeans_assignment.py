"""The nearest centroids: values kept between updates never change the result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import pairwise_distances

from xlvlm_jax.solvers import kmeans, kmeans_assignment, kmeans_nearest
from xlvlm_jax.solvers.kmeans_assignment import Bounds, Scores, Sums

K, N, D = 6, 400, 20
MANY = kmeans_assignment.LARGE + 40


def problem_of(Z, K=K):
    return kmeans.prepare(jnp.asarray(Z), len(Z), jnp.ones(K, bool))


def unknown(problem, K=K):
    return kmeans_assignment.nothing(problem), jnp.full(K, jnp.inf)


def test_three_rows_by_hand():
    problem = problem_of(np.array([[0.0], [2.0], [7.0]], np.float32), 2)  # the mean is 3
    offsets = jnp.array([[-3.0], [4.0]])  # centroids 0 and 7
    kept, shifts = unknown(problem, 2)
    kept, labels, sums = kmeans_assignment.renew(problem, kept, offsets, shifts)
    np.testing.assert_array_equal(labels, [0, 0, 1])
    np.testing.assert_allclose(kept.gaps, [7, 5 - 2, 7], rtol=1e-4)
    np.testing.assert_array_equal(sums.counts.value, [2, 1])
    # Of the rows less the mean.
    np.testing.assert_array_equal(sums.totals.value, [[2 - 2 * 3], [7 - 3]])
    # Row two is 2 away from its centroid, the others are on theirs.
    np.testing.assert_allclose(
        kmeans_assignment.inertia(problem.spread, offsets, sums), 4, rtol=1e-6
    )


def test_nearest_by_hand():
    scores = jnp.array([[3.0, 1.0, 5.0], [2.0, 1.0, 7.0], [9.0, 4.0, 6.0]])
    found = kmeans_nearest.nearest(scores)
    np.testing.assert_array_equal(found.labels, [1, 0, 0])  # the first of equal ones
    np.testing.assert_array_equal(found.least, [2, 1, 5])
    np.testing.assert_array_equal(found.second, [3, 1, 6])


def test_one_centroid_has_no_second():
    assert kmeans_nearest.nearest(jnp.ones((1, 3))).second.tolist() == [jnp.inf] * 3


@pytest.mark.parametrize(
    ("K", "backend"),
    [(K, "cpu"), (MANY, "cpu"), (MANY, "tpu")],
    ids=["by rows", "by centroids", "many by rows"],
)
@pytest.mark.parametrize("common", [0.0, 100.0])
def test_labels_and_sums_after_moves_of_every_size(K, backend, common, monkeypatch):
    """Compares with scikit-learn's distances; large moves read all rows, small ones few."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(kmeans_assignment, "ACCELERATOR_HELD", 150 * K)  # blocks that overlap
    rng = np.random.default_rng(0)
    Z = (rng.normal(size=(N, D)) + common).astype(np.float32)
    problem = problem_of(Z, K)
    centroids = Z[rng.choice(N, K, replace=False)]
    kept, shifts = unknown(problem, K)
    assert isinstance(kept, Scores if K == MANY and backend == "cpu" else Bounds)
    renew = jax.jit(kmeans_assignment.renew)
    seen = []
    for size in (0, 1.0, 0.3, 0.03, 0.003, 0.0, 0.003, 1.0):
        moved = rng.random(K) < 0.5
        step = size * moved[:, None] * rng.normal(size=(K, D)) / np.sqrt(D)
        before, centroids = centroids, (centroids + step).astype(np.float32)
        if seen:
            shifts = jnp.linalg.norm(jnp.asarray(centroids - before), axis=1)
        kept, labels, sums = renew(problem, kept, jnp.asarray(centroids) - problem.mean, shifts)
        distances = pairwise_distances(Z.astype(np.float64), centroids)
        chosen = distances[np.arange(N), labels]
        np.testing.assert_allclose(chosen, distances.min(axis=1), rtol=1e-5)
        np.testing.assert_array_equal(sums.counts.value, np.bincount(labels, minlength=K))
        members = np.eye(K)[labels]
        centred = Z.astype(np.float64) - np.asarray(problem.mean, np.float64)
        np.testing.assert_allclose(sums.totals.value, members.T @ centred, atol=2e-4)
        offsets = centroids.astype(np.float64) - np.asarray(problem.mean, np.float64)
        inertia = kmeans_assignment.inertia(problem.spread, jnp.float32(offsets), sums)
        np.testing.assert_allclose(inertia, np.sum(chosen**2), rtol=1e-6)
        if isinstance(kept, Bounds):
            ordered = np.sort(distances, axis=1)
            # A bound: never more than the distance that is between the two.
            assert np.all(kept.gaps <= ordered[:, 1] - ordered[:, 0] + 1e-3)
        seen.append(np.asarray(labels))
    assert len({tuple(labels) for labels in seen}) > 3


def test_scores_of_some_rows_at_a_time_are_those_of_all(monkeypatch):
    rng = np.random.default_rng(3)
    problem = problem_of(rng.normal(size=(N, D)).astype(np.float32) + 3)
    offsets = jnp.asarray(rng.normal(size=(K, D)).astype(np.float32))
    at_once = kmeans_assignment.renew(problem, *unknown_at(problem, offsets))
    # Blocks of 16 and of 150 rows: the last one reaches back over what is done.
    for held in (16 * K, 150 * K):
        monkeypatch.setattr(kmeans_assignment, "MANY", N * K)
        monkeypatch.setattr(kmeans_assignment, "HELD", held)
        assert kmeans_assignment._rows_at_once(N, D, K) == held // K
        kept, labels, sums = kmeans_assignment.renew(problem, *unknown_at(problem, offsets))
        np.testing.assert_array_equal(labels, at_once[1])
        np.testing.assert_allclose(kept.gaps, at_once[0].gaps, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(sums.totals.value, at_once[2].totals.value, atol=1e-4)


def unknown_at(problem, offsets):
    kept, shifts = unknown(problem)
    return kept, offsets, shifts


def test_rows_that_cannot_change_are_not_read():
    """A row that is swapped without updating its bound keeps its label."""
    Z = np.repeat(np.eye(K, D, dtype=np.float32) * 10, 50, axis=0)
    problem = problem_of(Z)
    offsets = jnp.eye(K, D) * 10 - problem.mean
    kept, shifts = unknown(problem)
    kept, labels, _ = kmeans_assignment.renew(problem, kept, offsets, shifts)
    other = problem._replace(Z=problem.Z.at[0].set(problem.Z[-1]))
    _, again, _ = kmeans_assignment.renew(other, kept, offsets, jnp.full(K, 0.1))
    np.testing.assert_array_equal(again, labels)
    _, all_anew, _ = kmeans_assignment.renew(other, kept, offsets, jnp.full(K, 100.0))
    assert all_anew[0] == K - 1


def test_padding_rows_are_not_in_the_sums():
    rng = np.random.default_rng(1)
    Z = np.pad(rng.normal(size=(N, D)), ((0, 8), (0, 0))).astype(np.float32)
    problem = kmeans.prepare(jnp.asarray(Z), N, jnp.ones(K, bool))
    kept, shifts = unknown(problem)
    offsets = rng.normal(size=(K, D)).astype(np.float32)
    for size in (0.5, 0.05, 0.005):
        kept, labels, sums = kmeans_assignment.renew(problem, kept, jnp.asarray(offsets), shifts)
        np.testing.assert_array_equal(sums.counts.value, np.bincount(labels[:N], minlength=K))
        step = size * rng.normal(size=(K, D)).astype(np.float32)
        offsets, shifts = offsets + step, jnp.linalg.norm(jnp.asarray(step), axis=1)


def test_sums_of_labels():
    problem = problem_of(np.arange(6, dtype=np.float32).reshape(3, 2), 2)
    sums = kmeans_assignment.sums_of(problem, jnp.array([1, 0, 1]))
    of_one = kmeans_assignment.sums_of(problem, jnp.array([1, 0, 0]))
    np.testing.assert_array_equal(of_one.totals.value, [[2, 2], [-2, -2]])
    assert isinstance(sums, Sums)
    np.testing.assert_array_equal(sums.counts.value, [1, 2])
    np.testing.assert_array_equal(sums.totals.value, [[0, 0], [0, 0]])  # the mean is [2, 3]


@pytest.mark.parametrize("K", [K, kmeans_assignment.LARGE + 40], ids=["by rows", "by centroids"])
def test_heavy_rows_that_leave_a_cluster_leave_nothing_there(K):
    """Compares with sums in float64: a weight of 1e6 that was added and subtracted again would
    leave 0.06."""
    rng = np.random.default_rng(2)
    Z = rng.normal(size=(N, D)).astype(np.float32)
    weights = np.where(rng.random(N) < 0.5, 0.37, 1e6 * rng.random(N)).astype(np.float32)
    weights[:7] = 0
    active = jnp.ones(K, bool)
    problem = kmeans.prepare(jnp.asarray(Z), N, active, weights=jnp.asarray(weights))
    kept, shifts = unknown(problem, K)
    offsets = rng.normal(size=(K, D)).astype(np.float32)
    for size in (0.5, 0.05, 0.05):
        kept, labels, sums = kmeans_assignment.renew(problem, kept, jnp.asarray(offsets), shifts)
        expected = np.bincount(labels, weights.astype(np.float64), K)
        found = [np.asarray(part, np.float64) for part in sums.counts]
        np.testing.assert_allclose(np.sum(found, axis=0), expected, rtol=2e-6)
        np.testing.assert_array_equal(sums.counts.high == 0, expected == 0)
        step = size * rng.normal(size=(K, D)).astype(np.float32)
        offsets, shifts = offsets + step, jnp.linalg.norm(jnp.asarray(step), axis=1)


@pytest.mark.parametrize("common", [0.0, 100.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_columns_give_the_result_of_all_of_z(common, weighted):
    """With orthonormal columns, labels, sums and gaps of all rows follow from the columns."""
    rng = np.random.default_rng(3)
    Z = (rng.normal(size=(N, D)) + common).astype(np.float32)
    weights = jnp.asarray(rng.uniform(1, 3, N), jnp.float32) if weighted else None
    active = jnp.ones(K, bool)
    problem = kmeans.prepare(jnp.asarray(Z), N, active, weights=weights)
    basis = np.linalg.qr(rng.normal(size=(D, 9)))[0].astype(np.float32)
    inside = rng.normal(size=(K, 9)).astype(np.float32)
    X = ((Z - np.asarray(problem.mean, np.float64)) @ basis).astype(np.float32)
    found = kmeans_assignment.of_columns(problem, jnp.asarray(X), jnp.asarray(inside))
    centroids = inside.astype(np.float64) @ basis.T + np.asarray(problem.mean, np.float64)
    distances = np.sort(pairwise_distances(Z.astype(np.float64), centroids), axis=1)
    nearest = pairwise_distances(Z.astype(np.float64), centroids).argmin(axis=1)
    np.testing.assert_array_equal(found.labels, nearest)
    apart = distances[:, 1] - distances[:, 0]
    assert np.all(found.gaps <= apart + 1e-6)
    np.testing.assert_allclose(found.gaps, apart, atol=1e-4)
    if weighted:
        assert found.sums is None
    else:
        totals = [(Z - np.asarray(problem.mean))[nearest == k].sum(axis=0) for k in range(K)]
        np.testing.assert_allclose(found.sums.totals.value, totals, atol=1e-3)
        np.testing.assert_array_equal(found.sums.counts.value, np.bincount(nearest, minlength=K))


def test_columns_are_not_used_for_many_centroids():
    many = kmeans_assignment.LARGE + 1
    problem = problem_of(np.zeros((many, 2), np.float32), many)
    assert kmeans_assignment.of_columns(problem, problem.Z, jnp.zeros((many, 2))) is None
