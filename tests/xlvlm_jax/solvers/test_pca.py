"""PCA: by hand, against scikit-learn, and what must hold for any matrix."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from xlvlm_jax.solvers import pca

from .helpers import alone

KEY = jax.random.key(0)
N, D, K = 30, 8, 3
solve = partial(alone(pca), num_samples=N, num_concepts=K)


def correlated(seed, n=N, d=D, common=0.0):
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(d, d)))[0]
    scales = 20 * 0.7 ** np.arange(d)
    return (rng.normal(size=(n, d)) * scales @ axes + common).astype(np.float32)


def of_variances(scales, n=800, seed=0):
    """Returns a matrix whose column k has these deviations before it is turned."""
    rng = np.random.default_rng(seed)
    d = len(scales)
    axes = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return (rng.normal(size=(n, d)) * scales @ axes).astype(np.float32)


def check_axes(Z, found, K, loss=1e-5, rtol=1e-3):
    """Compares variances, one by one, and what all axes explain to an SVD in float64.

    Axes of huge variance count as little as to `tol`.
    """
    centred = Z.astype(np.float64) - Z.mean(axis=0, dtype=np.float64)
    expected = np.linalg.svd(centred, compute_uv=False)[:K] ** 2
    # A digit of an axis may be a share of a huge one: compares what they span.
    basis = np.linalg.qr(np.asarray(found.components, np.float64).T)[0]
    explained = np.linalg.svd(centred @ basis, compute_uv=False) ** 2
    np.testing.assert_allclose(explained, expected, rtol=rtol)
    scores = np.sum(np.asarray(found.activations, np.float64) ** 2, axis=0)
    np.testing.assert_allclose(scores, expected, rtol=rtol)
    counted = np.minimum(expected, pca.DOMINANT * np.median(expected))
    assert np.sum(expected - explained) <= loss * np.sum(counted)


def test_points_on_a_line_by_hand():
    Z = jnp.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    result = alone(pca)(Z, KEY, num_samples=3, num_concepts=1)
    np.testing.assert_allclose(result.components, [[0.5**0.5, 0.5**0.5]], rtol=1e-6)
    np.testing.assert_allclose(result.activations[:, 0], [-(2**0.5), 0, 2**0.5], atol=1e-6)
    np.testing.assert_allclose(result.mean, [2, 2])
    np.testing.assert_allclose(result.objective, 0, atol=1e-6)


@pytest.mark.parametrize("shape", [(60, 20), (20, 60), (400, 270)], ids=str)
@pytest.mark.parametrize("common", [0.0, 100.0])
def test_components_and_scores_of_scikit_learn(shape, common):
    # The last shape is above EXACT: Krylov iteration.
    Z = correlated(0, *shape, common)
    theirs = PCA(6, svd_solver="full").fit(Z.astype(np.float64))
    ours = alone(pca)(jnp.asarray(Z), KEY, num_samples=len(Z), num_concepts=6)
    np.testing.assert_allclose(ours.components, theirs.components_, atol=1e-3)
    np.testing.assert_allclose(ours.activations, theirs.transform(Z), atol=2e-2)
    explained = np.sum(np.var(np.asarray(ours.activations), axis=0, ddof=1))
    np.testing.assert_allclose(explained, theirs.explained_variance_.sum(), rtol=1e-5)
    residual = Z - theirs.inverse_transform(theirs.transform(Z))
    np.testing.assert_allclose(ours.objective, 0.5 * np.sum(residual**2), rtol=1e-3)


@pytest.mark.parametrize("num_samples", [6000, 5950])
def test_a_narrow_matrix_by_its_covariance(num_samples):
    """Far from the origin, in several tiles; padding rows change nothing."""
    assert pca.is_narrow(num_samples, 300, 60)
    Z = correlated(0, num_samples, 300, common=100.0)
    padded = np.concatenate([Z, np.zeros((6000 - num_samples, 300), np.float32)])
    problem = pca.prepare(jnp.asarray(padded), num_samples)
    centred = Z.astype(np.float64) - Z.mean(axis=0, dtype=np.float64)
    expected = centred.T @ centred
    found = pca.covariance(problem.Z, problem.real, problem.mean)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(found, found.T)
    theirs = PCA(60, svd_solver="full").fit(Z.astype(np.float64))
    ours = alone(pca)(jnp.asarray(padded), KEY, num_samples=num_samples, num_concepts=60)
    # Axes beyond these have variances that float32 can't tell apart.
    np.testing.assert_allclose(ours.components[:12], theirs.components_[:12], atol=1e-3)
    np.testing.assert_allclose(ours.components @ ours.components.T, np.eye(60), atol=1e-5)
    assert int(ours.iterations) == 0 and bool(ours.converged)


@pytest.mark.parametrize(("noise", "huge"), [(0.9, 1), (0.1, 100)])
def test_the_objective_beside_many_axes(noise, huge):
    """A hundredth and a millionth of the energy is left, where a difference of sums loses digits.

    With columns a hundred times larger than the others, plain eigenvectors in float32 would lose
    1e-5 of these.
    """
    rng = np.random.default_rng(1)
    Z = rng.normal(size=(3000, 60)) @ rng.normal(size=(60, 290))
    Z = Z + noise * rng.normal(size=Z.shape)
    Z[:, [7, 100]] *= huge
    Z = (Z + 10).astype(np.float32)
    assert pca.plan(KEY, width=290, num_samples=3000, num_concepts=(62,))[0].narrow
    found = alone(pca)(jnp.asarray(Z), KEY, num_samples=3000, num_concepts=62)
    check_axes(Z, found, 62)
    centred = Z.astype(np.float64) - Z.mean(axis=0, dtype=np.float64)
    basis = np.linalg.qr(np.asarray(found.components, np.float64).T)[0]
    left = 0.5 * np.sum((centred - centred @ basis @ basis.T) ** 2)
    np.testing.assert_allclose(found.objective, left, rtol=3e-6)
    assert float(found.history[0]) == float(found.objective)
    scores = centred @ np.asarray(found.components, np.float64).T
    np.testing.assert_allclose(found.activations, scores, atol=1e-6 * np.abs(scores).max())


def test_what_is_narrow():
    assert pca.is_narrow(20000, 512, 256) and pca.is_narrow(100000, 300, 20)
    assert not pca.is_narrow(3000, 4096, 20) and not pca.is_narrow(100000, 512, 20)


@pytest.mark.parametrize(("rank", "K"), [(12, 10), (300, 10), (300, 40)])
def test_many_updates_keep_the_axes_orthonormal(rank, K):
    """Also if Z has fewer directions than an update considers."""
    rng = np.random.default_rng(3)
    Z = rng.normal(size=(700, rank)) @ rng.normal(size=(rank, 300)) * 0.99 ** np.arange(300)
    Z = jnp.asarray(Z, jnp.float32)
    many = alone(pca)(Z, KEY, num_samples=700, num_concepts=K, tol=-1.0, max_iter=40)
    assert int(many.iterations) == 40
    np.testing.assert_allclose(many.components @ many.components.T, np.eye(K), atol=1e-5)
    history = np.asarray(many.history)
    assert np.all(np.diff(history) <= 1e-6 * float(jnp.sum(Z**2)))
    expected = PCA(K, svd_solver="full").fit(np.asarray(Z, np.float64))
    explained = np.sum(np.var(np.asarray(many.activations), axis=0, ddof=1))
    np.testing.assert_allclose(explained, expected.explained_variance_.sum(), rtol=1e-5)


@pytest.mark.parametrize("max_iter", [0, 1, 2, 3])
def test_few_updates_of_few_directions_give_orthonormal_axes(max_iter):
    """The first span is larger than the space that the rows span."""
    rng = np.random.default_rng(4)
    Z = jnp.asarray(rng.integers(-3, 4, (600, 12)) @ rng.integers(-3, 4, (12, 400)), jnp.float32)
    found = alone(pca)(Z, KEY, num_samples=600, num_concepts=40, tol=-1.0, max_iter=max_iter)
    assert int(found.iterations) == max_iter
    np.testing.assert_allclose(found.components @ found.components.T, np.eye(40), atol=1e-5)


def test_blocks_fit_into_the_space():
    for K, N, D in [(33, 257, 300), (40, 600, 400), (256, 10000, 4096), (256, 513, 4096)]:
        assert not pca.is_small(N, D, K)
        width, first, more, kept = pca.blocks_for(K, N, D)
        # The last block's image is one more.
        assert K <= kept < kept + more * width <= first * width <= min(N, D) - width
    assert pca.blocks_for(256, 10000, 4096) == (32, 17, 8, 288)
    assert pca.blocks_for(20, 3000, 4096) == (32, 0, 1, 32)


@pytest.mark.parametrize("backend", pca.WIDTHS)
def test_blocks_fit_into_every_space(backend):
    """In the smallest space that is iterated in, and next to multiples of all widths."""
    for W in range(64, 1025, 32):
        least = max(pca.EXACT, 2 * W) + 1
        multiples = range(least // 32 * 32, least + 3 * 128, 32)
        near = {multiple + beside for multiple in multiples for beside in (-1, 0, 1)}
        for space in {least} | {size for size in near if size > least}:
            assert not pca.is_small(space, space, W)
            B, first, more, kept = pca.blocks_for(W, space, 4096, backend)
            assert W <= kept < kept + more * B <= first * B <= space - B, (W, space)
            assert pca.LANES <= B <= pca.WIDTHS[backend]


@pytest.mark.parametrize(("shape", "K"), [((600, 300), 100), ((384, 700), 160)], ids=str)
def test_wide_blocks_in_a_small_space(monkeypatch, shape, K):
    """As on a TPU, whose blocks have 128 columns: here there is no room for an update by such."""
    monkeypatch.setitem(pca.WIDTHS, "cpu", 128)
    Z = of_variances(np.arange(1, shape[1] + 1) ** -0.5, shape[0])
    found = alone(pca)(jnp.asarray(Z), KEY, num_samples=len(Z), num_concepts=K)
    assert bool(found.converged) and found.components.shape == (K, shape[1])
    check_axes(Z, found, K)


def test_a_span_is_that_of_powers_of_the_covariance():
    """Against float64; and what the axes miss is what their images have beyond the span."""
    rng = np.random.default_rng(5)
    Z = rng.normal(size=(90, 60)) * 0.9 ** np.arange(60)
    problem = pca.prepare(jnp.asarray(Z, jnp.float32), 90)
    start = jnp.asarray(rng.normal(size=(60, 4)), jnp.float32)
    none = jnp.zeros((60, 0))
    first = pca.State(none, jnp.zeros((90, 0)), pca.orthonormal(start), problem.energy, none, none)
    span = jax.jit(pca.extend, static_argnums=2)(problem, first, 3)
    centred = Z - Z.mean(axis=0)
    A = centred.T @ centred
    powers = np.concatenate([start, A @ start, A @ A @ start], axis=1)
    expected = np.linalg.qr(powers)[0]
    basis = np.asarray(span.basis)
    np.testing.assert_allclose(basis @ basis.T, expected @ expected.T, atol=1e-3)
    np.testing.assert_allclose(span.scores, centred @ basis, atol=1e-4)
    state = jax.jit(pca.best_axes, static_argnums=(2, 3))(problem, span, 12, 5)
    missed = A @ np.asarray(state.basis, np.float64)
    missed = np.sum((missed - basis @ (basis.T @ missed)) ** 2, axis=0)
    variances = np.sum(np.asarray(state.scores, np.float64) ** 2, axis=0)
    error = pca.expected_gain(jnp.asarray(missed), jnp.asarray(variances), 5)
    np.testing.assert_allclose(state.error, error, rtol=1e-3)


def test_narrow_blocks_need_fewer_columns(monkeypatch):
    """Noise, whose axes differ little in variance."""
    rng = np.random.default_rng(5)
    Z = jnp.asarray(rng.normal(size=(1000, 600)), jnp.float32)

    def solved(width):
        monkeypatch.setitem(pca.WIDTHS, "cpu", width)
        found = alone(pca)(Z, KEY, num_samples=1000, num_concepts=96)
        blocks = pca.blocks_for(96, 1000, 600)
        return found, blocks.width * (blocks.first + int(found.iterations) * blocks.more)

    (narrow, few), (wide, many) = solved(32), solved(96)
    assert bool(narrow.converged) and 1.5 * few <= many
    expected = PCA(96, svd_solver="full").fit(np.asarray(Z, np.float64)).explained_variance_.sum()
    for found in (narrow, wide):
        explained = np.sum(np.var(np.asarray(found.activations, np.float64), axis=0, ddof=1))
        np.testing.assert_allclose(explained, expected, rtol=2e-5)


def test_blocks_under_vmap():
    """Both matrices in one program, as alone; one needs more updates."""
    rng = np.random.default_rng(6)
    Z = jnp.asarray(rng.normal(size=(2, 300, 270)), jnp.float32).at[1].mul(0.97 ** jnp.arange(270))
    solve = partial(pca.solve, num_samples=300, num_concepts=(40,))
    both = jax.vmap(solve, in_axes=(0, None))(Z, KEY)
    iterations = both.iterations[:, 0]
    assert iterations[0] > iterations[1]
    for i in range(2):
        one = solve(Z[i], KEY)
        assert int(one.iterations[0]) == iterations[i]
        np.testing.assert_allclose(both.objective[i], one.objective, rtol=1e-5)
        components = both.components[i, 0, :40]
        np.testing.assert_allclose(components @ components.T, np.eye(40), atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(-10, 10))
def test_orthonormal_ordered_and_independent_of_a_shift(seed, shift):
    Z = correlated(seed)
    plain = solve(jnp.asarray(Z), KEY)
    np.testing.assert_allclose(plain.components @ plain.components.T, np.eye(K), atol=1e-5)
    assert np.all(np.diff(np.var(np.asarray(plain.activations), axis=0)) <= 0)
    history = np.asarray(plain.history)[: int(plain.iterations) + 1]
    assert np.all(np.diff(history) <= 1e-6 * np.sum(Z**2))
    shifted = solve(jnp.asarray(Z + np.float32(shift)), KEY)
    np.testing.assert_allclose(shifted.objective, plain.objective, rtol=1e-3)
    # Axes of nearly equal variance may turn into each other: compare what they span.
    spans = [np.asarray(r.components).T @ np.asarray(r.components) for r in (plain, shifted)]
    np.testing.assert_allclose(*spans, atol=2e-2)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_permuting_rows_permutes_scores(seed):
    Z = correlated(7)
    order = np.random.default_rng(seed).permutation(N)
    plain, permuted = solve(jnp.asarray(Z), KEY), solve(jnp.asarray(Z[order]), KEY)
    np.testing.assert_allclose(plain.activations[order], permuted.activations, atol=1e-3)


def test_a_direction_absent_from_the_first_rows_is_found():
    # The first directions come from an eighth of the rows. One row in 4200 has all of the largest
    # component, alone in its column.
    rng = np.random.default_rng(0)
    Z = rng.normal(size=(4200, 300)).astype(np.float32)
    Z[:, 7] = 0
    Z[1200, 7] = 1000
    plan, _ = pca.plan(KEY, width=300, num_samples=4200, num_concepts=(20,))
    assert 512 <= plan.sample < 600
    expected = PCA(20, svd_solver="full").fit(Z).explained_variance_.sum()
    for seed in range(4):
        found = alone(pca)(jnp.asarray(Z), jax.random.key(seed), num_samples=4200, num_concepts=20)
        assert abs(found.components[0, 7]) > 0.99
        explained = np.var(np.asarray(found.activations), axis=0, ddof=1).sum()
        assert explained > 0.999 * expected


@pytest.mark.parametrize("offset", [100, 1e4])
def test_two_million_rows_far_from_zero(offset):
    """If rows were added one by one, the error of their mean would be several deviations."""
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((2_000_000, 2), np.float32) * np.float32([1, 2]) + np.float32(offset)
    found = alone(pca)(jnp.asarray(Z), KEY, num_samples=len(Z), num_concepts=1)
    truth = Z.astype(np.float64)
    mean = truth.mean(axis=0)
    np.testing.assert_allclose(found.mean, mean, rtol=2**-24, atol=0)
    values, axes = np.linalg.eigh((truth - mean).T @ (truth - mean))
    variance = np.var(np.asarray(found.activations, np.float64)) * len(Z)
    np.testing.assert_allclose(variance, values[1], rtol=1e-6)
    np.testing.assert_allclose(found.objective, 0.5 * values[0], rtol=1e-6)
    np.testing.assert_allclose(np.abs(found.components[0] @ axes[:, 1]), 1, rtol=1e-6)
    assert float(found.history[0]) == float(found.objective)


@pytest.mark.parametrize("K", [20, 40])
def test_columns_of_huge_variance_do_not_end_the_others_early(K):
    """Four columns are a thousand times larger, as in states; all axes converge, not only these."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(300, 300)))[0]
    Z = rng.normal(size=(1500, 300)) * 10 * 0.97 ** np.arange(300) @ axes
    Z[:, [3, 50, 120, 200]] = 1000 * rng.normal(size=(1500, 4)) * [1, 2, 3, 4]
    Z = (Z + 5).astype(np.float32)
    found = alone(pca)(jnp.asarray(Z), KEY, num_samples=1500, num_concepts=K)
    assert bool(found.converged) and int(found.iterations) < 100
    centred = Z.astype(np.float64) - Z.mean(axis=0, dtype=np.float64)
    components = np.asarray(found.components, np.float64)
    images = components @ centred.T @ centred
    variances = np.sum(images * components, axis=1)
    # Beyond the span: a float32 has a part of the huge columns in its last digit.
    beyond = images - images @ components.T @ components
    assert np.max(np.linalg.norm(beyond, axis=1) / variances) < 0.02
    explained = np.linalg.svd(centred, compute_uv=False)[:K] ** 2
    np.testing.assert_allclose(variances, explained, rtol=1e-3)
    left = np.sum((centred - centred @ components.T @ components) ** 2) / 2
    np.testing.assert_allclose(found.objective, left, rtol=1e-6)


@pytest.mark.parametrize("huge", [1e3, 2e3])
def test_directions_of_huge_variance_hide_no_others(huge):
    """A float32 image of a column with a share of them has lost the smaller ones."""
    Z = of_variances(np.r_[[huge] * 4, np.arange(1, 697) ** -0.5])
    for tol in (1e-5, 1e-6):
        found = alone(pca)(jnp.asarray(Z), KEY, num_samples=800, num_concepts=250, tol=tol)
        assert bool(found.converged) and int(found.iterations) <= 2
        check_axes(Z, found, 250, tol, 2e-3 if tol == 1e-5 else 1e-3)


@pytest.mark.parametrize("huge", [100, 1000])
def test_coordinates_of_huge_variance_hide_no_others(huge):
    """As in hidden states, with their mean: a few coordinates are that much larger."""
    Z = of_variances(np.arange(1, 701) ** -0.5)
    large = np.random.default_rng(1).normal(size=(800, 4)) + np.array([1, -1, 3, 0])
    Z[:, [3, 50, 120, 200]] = huge * np.std(Z) * large
    found = alone(pca)(jnp.asarray(Z), KEY, num_samples=800, num_concepts=250)
    assert bool(found.converged)
    check_axes(Z, found, 250)


def test_what_rounding_hides_from_an_update_is_found_from_the_images():
    """A state whose blocks say nothing is missed, although its axes are far from the best."""
    Z = of_variances(np.r_[[1e3] * 4, np.arange(1, 297) ** -0.5], n=400)
    problem = pca.prepare(jnp.asarray(Z), 400)
    blocks = pca.blocks_for(40, 400, 300)
    random = pca.first_directions(problem, KEY, blocks, 400, pca.ONE_DEVICE, 0)
    state = jax.jit(pca.init, static_argnums=(2, 3))(problem, random, 40, blocks)
    order = np.r_[:20, -20:0, 40 : state.basis.shape[1] - 20, 20:40]
    turned = state.basis[:, order]
    scores = pca.project(problem, turned)
    wrong = state._replace(basis=turned, scores=scores, error=jnp.float32(0))
    assert bool(wrong.spread)
    seen = pca.checked(problem, wrong, blocks, 40, 1e-5)
    assert float(seen.error) > 1e-3
    both = np.concatenate([turned, seen.new], axis=1)
    np.testing.assert_allclose(both.T @ both, np.eye(both.shape[1]), atol=1e-4)
    # Nothing to look for: the error is above tol, or variances are alike.
    for other in (wrong._replace(error=jnp.float32(1)), wrong._replace(spread=jnp.array(False))):
        assert float(pca.checked(problem, other, blocks, 40, 1e-5).error) == float(other.error)


def test_history_does_not_rise_by_rounding():
    """A digit of the energy is larger than what an update explains."""
    Z = of_variances(np.r_[[1e3] * 4, np.arange(1, 297) ** -0.5])
    found = alone(pca)(jnp.asarray(Z), KEY, num_samples=800, num_concepts=40, tol=-1.0, max_iter=8)
    assert np.all(np.diff(found.history) <= 0)
    np.testing.assert_allclose(found.history[-1], found.objective, rtol=1e-6)


def test_history_of_several_numbers_ends_at_their_objectives():
    Z = jnp.asarray(of_variances(np.arange(1, 301) ** -0.5))
    both = pca.solve(Z, KEY, num_samples=800, num_concepts=(40, 64), tol=1e-7)
    last = int(both.iterations[0])
    assert last > 0
    np.testing.assert_allclose(both.history[:, last], both.objective, rtol=1e-6)
    assert np.all(both.history[0, : last + 1] > both.history[1, : last + 1])
    assert np.all(np.diff(both.history[:, : last + 1]) <= 0)


def test_one_program_for_numbers_of_rows_that_are_padded_to_one():
    """Also with fewer rows than axes."""
    plans = {pca.plan(KEY, width=64, num_samples=N, num_concepts=(4,))[0] for N in (10, 12, 16)}
    assert len(plans) == 1
    Z = correlated(0, 10, 64)
    padded = jnp.asarray(np.pad(Z, ((0, 6), (0, 0))))
    found = alone(pca)(padded, KEY, num_samples=10, num_concepts=4)
    expected = PCA(4, svd_solver="full").fit(Z.astype(np.float64))
    np.testing.assert_allclose(found.components, expected.components_, atol=1e-4)
    np.testing.assert_allclose(found.activations[:10], expected.transform(Z), atol=1e-3)


@pytest.mark.parametrize(
    ("huge", "steep"),
    [([1e2, 3e2, 5e2], False), ([1e4] * 3, True), ([1e7, 1e5, 1e3], True)],
    ids=["apart", "eight digits", "steps"],
)
def test_small_eigenvalues_beside_huge_ones(huge, steep):
    """With eight digits between the first and the last, eigenvectors in float32 keep none of it."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(900, 200)) * np.r_[huge, 0.98 ** np.arange(197)]
    overlaps = jnp.asarray(scores.T @ scores, jnp.float32)
    values, axes = jax.jit(pca.principal, static_argnums=(1, 2))(overlaps, 150, steep)
    expected = np.linalg.svd(scores, compute_uv=False) ** 2
    np.testing.assert_allclose(values[:150], expected[:150], rtol=1e-4)
    np.testing.assert_allclose(axes.T @ axes, np.eye(200), atol=1e-5)
    axes = np.linalg.qr(np.asarray(axes[:, :150], np.float64))[0]
    explained = np.linalg.svd(scores @ axes, compute_uv=False) ** 2
    np.testing.assert_allclose(explained, expected[:150], rtol=1e-4)
