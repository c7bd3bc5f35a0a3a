"""Leading columns rule centroids out, and never the nearest one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from sklearn.metrics import pairwise_distances

from xlvlm_jax.solvers import kmeans, kmeans_assignment, kmeans_leading, kmeans_nearest
from xlvlm_jax.solvers.kmeans_assignment import Ruled, Scores
from xlvlm_jax.solvers.phases import at_once

K, N, D = 140, 704, 40
KEY = jax.random.key(0)


@pytest.fixture
def few(monkeypatch):
    """Sizes with several blocks, of which the last ones overlap or are filled up."""
    sizes = {"COLUMNS": 9, "LEAST_WIDTH": 40, "LEAST_SCORES": 1}
    sizes |= {"CHUNK": 48, "ROWS": 256, "BLOCK": 64, "TOGETHER": 64, "MANY_ROWS": 1}
    sizes |= {"MANY_CENTROIDS": 1}
    for name, value in sizes.items():
        monkeypatch.setattr(kmeans_leading, name, value)
    monkeypatch.setattr(kmeans_nearest, "TURN", 7)


def states(rng, decay=2.0, common=0.0):
    """Rows whose variance decays over the columns of a random basis."""
    basis = np.linalg.qr(rng.normal(size=(D, D)))[0]
    spread = 3 * np.arange(1, D + 1) ** -decay
    return (common + (rng.normal(size=(N, D)) * spread) @ basis).astype(np.float32)


def test_bound_by_hand(few):
    """One column of two: lengths outside it are 4 and 2, so the score is at least 4 - 2 (3 + 8)."""
    basis, z, c = jnp.array([[1.0], [0.0]]), jnp.array([[3.0, 4.0]]), jnp.array([[1.0, 2.0]])
    found = kmeans_leading.of_basis(basis, z @ basis, jnp.array([25.0]), jnp.float32(0))
    np.testing.assert_allclose(found.rows, [[3, 4, 1]], rtol=1e-5)
    # One centroid is the nearest of every row, and there is no other.
    known = kmeans_leading.nothing(found, 1)._replace(share=jnp.float32(0))
    given = z, jnp.zeros(2), jnp.array([1e-5]), found, known, c
    known = kmeans_leading.renew(*given, jnp.array([jnp.inf]), jnp.array([True]))
    assert (known.labels.tolist(), known.floors.tolist()) == ([0], [jnp.inf])
    # A second one at 3, 3 moves. Its score is 18 - 2 (9 + 12) = -24, that of the first 5 - 22.
    both, moved = jnp.array([[1.0, 2.0], [3.0, 3.0]]), jnp.array([0.0, jnp.inf])
    blocks = kmeans_leading.nothing(found, 2).blocks
    known = known._replace(offsets=both, blocks=blocks)
    given = z, jnp.zeros(2), jnp.array([1e-5]), found, known, both
    known = kmeans_leading.renew(*given, moved, jnp.array([True, True]))
    assert (known.labels.tolist(), float(known.share)) == ([1], 0)
    np.testing.assert_allclose(known.floors, [-17], rtol=1e-5)
    # It moves by 0.1 outside the column: its square grows by 0.61, its product with the row falls
    # by at most 4 * 0.1. That is enough to know that it stays the nearest.
    both, moved = jnp.array([[1.0, 2.0], [3.0, 3.1]]), jnp.array([0.0, 0.1])
    given = z, jnp.zeros(2), jnp.array([1e-5]), found, known, both
    known = kmeans_leading.renew(*given, moved, jnp.array([True, True]))
    np.testing.assert_allclose(known.uppers, [-24 + 0.61 + 0.8], rtol=1e-3)
    np.testing.assert_allclose(known.floors, [-17], rtol=1e-5)


@pytest.mark.parametrize(("common", "blocks"), [(0.0, True), (100.0, True), (0.0, False)])
def test_labels_and_bounds_after_moves_of_every_size(few, common, blocks, monkeypatch):
    """Compares with scikit-learn's distances."""
    if not blocks:
        monkeypatch.setattr(kmeans_leading, "MOST_GAPS", 0)
    rng = np.random.default_rng(0)
    Z = states(rng, common=common)
    active = jnp.arange(K) < K - 3
    problem = kmeans.prepare(jnp.asarray(Z), N, active)
    problem = kmeans.with_leading(problem, K, KEY, N)
    centroids = Z[rng.choice(N, K, replace=False)]
    kept, shifts = kmeans_assignment.nothing(problem), jnp.full(K, jnp.inf, jnp.float32)
    assert isinstance(kept, Ruled)
    renew = jax.jit(kmeans_assignment.renew)
    opened, far, seen = [], [], []
    for size in (0, 1.0, 0.3, 0.3, 0.03, 0.003, 0.0, 0.003, 1.0):
        moved = rng.random(K) < (0.9 if size == 1 else 0.3)
        step = size * moved[:, None] * rng.normal(size=(K, D)) / np.sqrt(D)
        before, centroids = centroids, (centroids + step).astype(np.float32)
        if seen:
            shifts = jnp.linalg.norm(jnp.asarray(centroids - before), axis=1)
        offsets = jnp.asarray(centroids) - problem.mean
        kept, labels, sums = renew(problem, kept, offsets, shifts)
        assert max(labels) < K - 3
        distances = pairwise_distances(Z.astype(np.float64), centroids[: K - 3])
        chosen = distances[np.arange(N), labels]
        np.testing.assert_allclose(chosen, distances.min(axis=1), rtol=1e-5, atol=3e-5)
        np.testing.assert_array_equal(sums.counts.value, np.bincount(labels, minlength=K))
        scores = distances**2 - np.asarray(problem.energy)[:, None]
        assert np.all(kept.known.uppers >= scores[np.arange(N), labels] - 1e-3)
        scores[np.arange(N), labels] = np.inf
        if blocks and kept.known.blocks.known:
            order = np.asarray(kept.known.blocks.order)
            np.testing.assert_array_equal(np.sort(order), np.arange(N))
            gaps = np.repeat(kept.known.blocks.gaps[:, : K - 3], 64, axis=0)[np.argsort(order)]
            above = scores - np.asarray(kept.known.uppers)[:, None]
            assert np.all((gaps <= 0) | (above >= gaps - 1e-3))
            far.append(np.mean(gaps > 0))
            scores[gaps > 0] = np.inf
        assert np.all(kept.known.floors <= scores.min(axis=1) + 1e-3)
        members = np.asarray(labels) == np.arange(K)[:, None]
        totals = members @ (Z.astype(np.float64) - np.asarray(problem.mean))
        np.testing.assert_allclose(sums.totals.value, totals, atol=3e-4)
        opened.append(float(kept.known.share))
        seen.append(np.asarray(labels))
    assert len({tuple(labels) for labels in seen}) > 3
    # The first update compares all rows, later ones few: the columns do rule centroids out.
    assert opened[0] > kmeans_leading.HOPELESS * kmeans_leading.AGAIN
    assert max(opened[4:8]) < 0.1
    assert len(far) == 8 * blocks
    assert not blocks or max(far) > 0.5


@pytest.mark.parametrize("most", [1, 4, 6])
@pytest.mark.parametrize("C", [6, 48, 64])
def test_candidates_of_squares_by_numpy(C, most):
    rng = np.random.default_rng(7)
    bounds, numbers = rng.normal(size=(3, C, 64)).astype(np.float32), rng.permutation(3 * C)
    own = jnp.asarray(rng.choice(numbers, 64), jnp.int32)
    found = kmeans_nearest.Candidates.none(most, 64, jnp.float32)
    for some, of in zip(bounds, numbers.reshape(3, C), strict=True):
        found = kmeans_nearest.compare_square(jnp.asarray(some), found, jnp.asarray(of), own)
    bounds[numbers.reshape(3, C, 1) == own] = np.inf
    every = bounds.reshape(3 * C, 64)
    two = np.argsort(bounds, axis=1)[:, :2] + C * np.arange(3)[:, None, None]
    two = two.reshape(6, 64)
    order = np.argsort(np.take_along_axis(every, two, axis=0), axis=0)
    chosen = np.take_along_axis(two, order, axis=0)[:most]
    np.testing.assert_array_equal(found.labels, numbers[chosen])
    np.testing.assert_array_equal(found.bounds, np.take_along_axis(every, chosen, axis=0))
    others = every.copy()
    np.put_along_axis(others, chosen, np.inf, axis=0)
    np.testing.assert_array_equal(found.rest, others.min(axis=0))
    least = kmeans_nearest.least_of_each(jnp.asarray(every))
    np.testing.assert_array_equal(least, every.min(axis=1))


def test_one_centroid_in_a_square_leaves_nothing_else():
    """At every place, also beside the row's own."""
    alone = jnp.where(jnp.eye(16) > 0, 1.0, jnp.inf)
    numbers, none = jnp.arange(16), kmeans_nearest.Candidates.none(4, 16, jnp.float32)
    found = kmeans_nearest.compare_square(alone, none, numbers)
    np.testing.assert_array_equal(found.labels[0], numbers)
    assert (found.bounds[0] == 1).all() and (found.rest == jnp.inf).all()
    own = jnp.roll(numbers, 1)
    found = kmeans_nearest.compare_square(alone.at[own, numbers].set(0), none, numbers, own)
    np.testing.assert_array_equal(found.labels[0], numbers)
    assert (found.bounds[0] == 1).all() and (found.rest == jnp.inf).all()


def test_bounds_of_a_square_with_ties_and_nan():
    """No centroid is below both its own candidate's bound and the rest."""
    rng = np.random.default_rng(8)
    bounds = rng.integers(0, 3, size=(16, 500)).astype(np.float32)
    none = kmeans_nearest.Candidates.none(2, 500, jnp.float32)
    found = kmeans_nearest.compare_square(jnp.asarray(bounds), none, jnp.arange(16))
    low = np.broadcast_to(found.rest, bounds.shape).copy()
    for label, bound in zip(found.labels, found.bounds, strict=True):
        np.put_along_axis(low, np.asarray(label)[None], np.asarray(bound)[None], axis=0)
    assert np.all(low <= bounds)
    bounds[3, 0] = np.nan
    found = kmeans_nearest.compare_square(jnp.asarray(bounds), none, jnp.arange(16))
    assert np.isnan(found.rest[0]) and not np.isnan(found.rest[1:]).any()


def test_centroids_that_are_equal_are_told_apart_from_others(few):
    """Ties in a chunk, in updates that compare all rows and in those that do not."""
    rng = np.random.default_rng(8)
    Z = states(rng)
    problem = kmeans.prepare(jnp.asarray(Z), N, jnp.ones(K, bool))
    problem = kmeans.with_leading(problem, K, KEY, N)
    offsets = jnp.asarray(np.repeat(Z[: K // 4], 4, axis=0)[rng.permutation(K)]) - problem.mean
    kept, shifts = kmeans_assignment.nothing(problem), jnp.full(K, jnp.inf, jnp.float32)
    renew = jax.jit(kmeans_assignment.renew)
    for step in range(3):
        kept, labels, _ = renew(problem, kept, offsets, shifts)
        apart = pairwise_distances(Z.astype(np.float64), offsets + problem.mean)
        np.testing.assert_allclose(apart[np.arange(N), labels], apart.min(axis=1), atol=3e-5)
        before, offsets = offsets, offsets * (1 + 0.01 * (step + 1))
        shifts = jnp.linalg.norm(offsets - before, axis=1)


def test_columns_that_rule_out_nothing_are_left_alone_for_a_while(few):
    """In white noise no column leads: most rows are compared with all centroids anyway."""
    rng = np.random.default_rng(1)
    Z = states(rng, decay=0.0)
    problem = kmeans.prepare(jnp.asarray(Z), N, jnp.ones(K, bool))
    problem = kmeans.with_leading(problem, K, KEY, N)
    offsets = jnp.asarray(Z[:K]) - problem.mean
    kept = kmeans_assignment.nothing(problem)
    renew, shifts = jax.jit(kmeans_assignment.renew), jnp.full(K, jnp.inf, jnp.float32)
    shares = []
    for step in range(5):
        kept, labels, _ = renew(problem, kept, offsets, shifts)
        shares.append(round(float(kept.known.share), 2))
        nearest = pairwise_distances(Z, offsets + problem.mean).argmin(axis=1)
        np.testing.assert_array_equal(labels, nearest)
        offsets = offsets + 0.1 * jax.random.normal(jax.random.key(step), offsets.shape)
    tried = shares[1]
    assert (shares[0], tried > kmeans_leading.HOPELESS) == (0.56, True)
    # The more rows it was that had to be compared, the longer.
    np.testing.assert_allclose(shares[2:4], [0.8 * tried, 0.64 * tried], atol=0.01)


WIDE = 4 * (K + kmeans.OVERSAMPLE)


@pytest.mark.parametrize(
    ("width", "weighted"),
    [(D, False), (D, True), (WIDE, True)],
    ids=["two numbers", "weighted", "compressed"],
)
def test_the_result_is_that_of_all_scores(few, width, weighted, monkeypatch):
    rng = np.random.default_rng(2)
    Z = states(rng)
    Z = jnp.asarray(Z @ np.linalg.qr(rng.normal(size=(width, D)))[0].T.astype(np.float32) + 2)
    monkeypatch.setattr(kmeans, "is_small", lambda *_: False)
    numbers = (K,) if weighted else (K, K - 9)
    given = {"num_samples": N, "num_concepts": numbers, "tol": 0.0}
    given |= {} if width > D else {"init_centroids": Z[:K]}
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,)) if weighted else None
    weights = jnp.asarray(rng.uniform(0.5, 2, N), jnp.float32) if weighted else None
    fixed, inputs = kmeans.plan(KEY, width=width, sample_weight=weights, **given)
    assert bool(fixed.compressed) == (width > D)
    found = jax.jit(lambda inputs, Z: at_once(fixed, inputs, Z, mesh))(inputs, Z)
    monkeypatch.setattr(kmeans_leading, "pays", lambda *_: False)
    expected = jax.jit(lambda inputs, Z: at_once(fixed, inputs, Z, None))(inputs, Z)
    assert found.iterations.tolist() == expected.iterations.tolist()
    for q, number in enumerate(numbers):  # others are meaningless
        ours, theirs = found.components[q, :number], expected.components[q, :number]
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    # A distance of a row to its centroid is rounded to 1e-5: rows are ten times as long.
    np.testing.assert_allclose(found.activations, expected.activations, atol=2e-5)
    np.testing.assert_allclose(found.objective, expected.objective, rtol=1e-6)
    np.testing.assert_allclose(found.history, expected.history, rtol=1e-5)


@pytest.mark.parametrize("max_iter", [2, 50], ids=["stopped", "converged"])
def test_the_objective_without_activations_is_that_of_the_final_centroids(few, max_iter):
    Z = states(np.random.default_rng(4), common=100.0)
    given = {"num_samples": N, "num_concepts": (K,), "init_centroids": Z[:K], "tol": 0.0}
    found = kmeans.solve(jnp.asarray(Z), KEY, **given, max_iter=max_iter, activations=False)
    assert found.activations is None
    apart = pairwise_distances(Z.astype(np.float64), found.components[0, :K])  # others pad it
    expected = np.sum(apart.min(axis=1) ** 2)
    np.testing.assert_allclose(found.objective[0], expected, rtol=1e-6)
    assert bool(found.converged[0]) == (max_iter > 2)


@pytest.mark.parametrize("K", [6, K], ids=["gaps", "two numbers"])
def test_runs_side_by_side_have_no_choice_that_one_run_has_not(few, K):
    """A choice per run would be computed both ways for all of them."""
    Z = jnp.asarray(states(np.random.default_rng(5)))
    problem = kmeans.prepare(Z, N, jnp.ones(K, bool))
    problem = kmeans.with_leading(problem, K, KEY, N)
    step, state = partial(kmeans.update, problem), kmeans.init(problem, Z[:K] - problem.mean)
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    of_one, of_two = jax.make_jaxpr(step)(state), jax.make_jaxpr(jax.vmap(step))(two)
    assert str(of_two).count("cond[") == str(of_one).count("cond[") > 1


def test_a_run_that_sorts_its_rows_leaves_others_right(few):
    """Both are sorted then. What is far from the blocks of the other, and stays, counts again."""
    rng = np.random.default_rng(9)
    Z = states(rng)
    problem = kmeans.prepare(jnp.asarray(Z), N, jnp.ones(K, bool))
    problem = kmeans.with_leading(problem, K, KEY, N)
    centroids = Z[rng.choice(N, K, replace=False)]
    kept, shifts = kmeans_assignment.nothing(problem), np.full(K, np.inf, np.float32)
    kept = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), kept)
    renew = jax.jit(jax.vmap(partial(kmeans_assignment.renew, problem), in_axes=(0, None, None)))
    far = []
    # Where most centroids move, bounds of the near ones alone are kept.
    for size, share in ((0, 1), (0.01, 0.9), (0.01, 0.9), (0.01, 0.9), (3.0, 0.3), (3.0, 0.3)):
        moved, before = rng.random(K) < share, centroids
        step = size * moved[:, None] * rng.normal(size=(K, D)) / np.sqrt(D)
        centroids = (centroids + step).astype(np.float32)
        if far:
            shifts = np.linalg.norm(centroids - before, axis=1)
        kept, labels, _ = renew(kept, jnp.asarray(centroids) - problem.mean, jnp.asarray(shifts))
        distances = pairwise_distances(Z.astype(np.float64), centroids)
        chosen = distances[np.arange(N), labels[0]]
        np.testing.assert_allclose(chosen, distances.min(axis=1), rtol=1e-5, atol=3e-5)
        blocks = kept.known.blocks
        far.append(float(jnp.mean(blocks.gaps[0] > 0)))
        # The second run is as after an update that compared all of its rows.
        kept = kept._replace(
            known=kept.known._replace(
                blocks=blocks._replace(known=jnp.array([blocks.known[0], len(far) < 4]))
            )
        )
    assert max(far) > 0.2


@pytest.mark.parametrize(("K", "move"), [(6, 0.004), (K, 0.02)], ids=["gaps", "two numbers"])
def test_sums_that_follow_the_rows_do_not_drift(few, K, move, monkeypatch):
    """Rows near a border change to and fro in 300 updates; no update sums all rows."""
    monkeypatch.setattr(kmeans_assignment, "FEW", 2)
    rng = np.random.default_rng(6)
    Z = states(rng, common=10.0)
    problem = kmeans.prepare(jnp.asarray(Z), N, jnp.ones(K, bool))
    problem = kmeans.with_leading(problem, K, KEY, N)
    start = Z[rng.choice(N, K, replace=False)] - problem.mean

    def step(carry, key):
        kept, before, first = carry
        offsets = start + move * jax.random.normal(key, start.shape)
        shifts = jnp.where(first, jnp.inf, jnp.linalg.norm(offsets - before, axis=1))
        kept, labels, sums = kmeans_assignment.renew(problem, kept, offsets, shifts)
        # An update that summed all rows once more would lose what is added here.
        marked = sums._replace(totals=sums.totals + first * jnp.ones_like(start))
        return (kept._replace(sums=marked), offsets, False), labels

    carry = kmeans_assignment.nothing(problem), start, True
    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, jax.random.split(KEY, 300)))
    (kept, *_), labels = scan(carry)
    changes = np.sum(labels[1:] != labels[:-1], axis=1)
    assert changes.sum() > 200 and changes.max() < kmeans_assignment.MANY_CHANGED * N
    members = np.asarray(labels[-1]) == np.arange(K)[:, None]
    centred = Z.astype(np.float64) - np.asarray(problem.mean)
    drift = np.abs(kept.sums.totals.value - 1 - members @ centred).max(axis=1)
    assert np.all(drift <= 1e-6 * (members @ np.linalg.norm(centred, axis=1)))
    np.testing.assert_array_equal(kept.sums.counts.value, members.sum(axis=1))


def test_chosen_by_backend_and_size(few, monkeypatch):
    assert kmeans_leading.pays(N, D, K)
    assert not kmeans_leading.pays(N, 39, K)  # too few columns
    problem = kmeans.prepare(jnp.ones((N, D)), N, jnp.ones(K, bool))
    fewer = problem._replace(active=jnp.ones(128, bool))  # no scores of these are kept
    assert kmeans.with_leading(fewer, 128, KEY, N) is fewer
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert not kmeans_leading.pays(N, D, K)
    assert kmeans.with_leading(problem, K, KEY, N) is problem
    monkeypatch.undo()
    assert not kmeans_leading.pays(N, D, K)  # too few scores
    assert isinstance(kmeans_assignment.nothing(problem), Scores)


def test_rows_that_pad_z_are_not_compared(few):
    rng = np.random.default_rng(3)
    Z = np.pad(states(rng), ((0, 8), (0, 0)))
    problem = kmeans.prepare(jnp.asarray(Z), N, jnp.ones(K, bool))
    problem = kmeans.with_leading(problem, K, KEY, N)
    kept, shifts = kmeans_assignment.nothing(problem), jnp.full(K, jnp.inf, jnp.float32)
    offsets = jnp.asarray(Z[:K]) - problem.mean
    kept, labels, sums = kmeans_assignment.renew(problem, kept, offsets, shifts)
    assert labels[N:].tolist() == [0] * 8  # never looked at
    np.testing.assert_array_equal(sums.counts.value, np.bincount(labels[:N], minlength=K))


@pytest.mark.parametrize(("n", "k", "long"), [(20000, 1024, True), (620, 20, False)])
def test_long_loops_are_compiled_with_more_care(n, k, long):
    fixed, _ = kmeans.plan(KEY, width=512, num_samples=n, num_concepts=(k,))
    assert fixed.has_long_loops == long
