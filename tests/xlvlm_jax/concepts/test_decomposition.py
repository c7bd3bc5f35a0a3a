"""From states to concepts and back: every method, every input, every error, the files."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import cluster, decomposition

from xlvlm_jax.concepts import decomposition as concepts
from xlvlm_jax.concepts import record
from xlvlm_jax.concepts.decomposition import decompose, project
from xlvlm_jax.concepts.methods import METHODS
from xlvlm_jax.concepts.reconstruction import reconstruct, squared_residual
from xlvlm_jax.concepts.record import Concepts, StoredActivations
from xlvlm_jax.solvers import pca
from xlvlm_jax.storage.zarr_rows import StoredRows

KEY = jax.random.key(0)
N, D, K = 20, 6, 3
QUICK = {"snmf": {"n_init": 2, "max_iter": 50}, "kmeans": {}, "pca": {}, "simple": {}}


def rows(seed=0):
    rng = np.random.default_rng(seed)
    codes = 5 * rng.exponential(size=(N, K)) * (rng.random((N, K)) < 0.6)
    return (codes @ rng.normal(size=(K, D)) + 0.1 * rng.normal(size=(N, D))).astype(np.float32)


def quick(Z, method="snmf", num_concepts=K, **options):
    return decompose(Z, num_concepts, method, key=KEY, **QUICK[method] | options)


@pytest.mark.parametrize("method", METHODS)
def test_projecting_the_same_rows_gives_the_activations_again(method):
    Z = rows()
    concepts = quick(Z, method)
    assert concepts.components.shape == (K, D)
    assert concepts.activations.shape == (N, K)
    assert len(concepts.history) == concepts.iterations + 1
    assert isinstance(concepts.objective, float)
    largest = np.max(np.abs(concepts.activations))
    np.testing.assert_allclose(project(Z, concepts), concepts.activations, atol=1e-4 * largest)
    assert project(Z[:1], concepts).shape == (1, K)
    assert project(Z[:0], concepts).shape == (0, K)


def test_kmeans_without_activations():
    whole, without = quick(rows(), "kmeans"), quick(rows(), "kmeans", activations=False)
    assert without.activations is None
    np.testing.assert_array_equal(without.components, whole.components)
    np.testing.assert_allclose(without.objective, whole.objective, rtol=1e-6)
    assert (without.iterations, without.options) == (whole.iterations, whole.options)
    sizes = [concepts.memory_needed((512, D), 256, "kmeans", activations=a) for a in (True, False)]
    assert sizes[1] < 0.75 * sizes[0]
    with pytest.raises(ValueError, match=r"^'pca' computes its activations .*; omit"):
        quick(rows(), "pca", activations=False)


def test_memory_from_given_centroids():
    """Their program takes them as an argument."""
    needed = partial(concepts.memory_needed, (64, 8), 3, "kmeans", activations=False)
    given = needed(init=np.ones((3, 8)))
    assert given > 64 * 8 * 4
    assert given != needed()


def test_a_single_centroid_is_found_every_time():
    """Its offset from the mean of the rows is rounding, which has no direction."""
    found = quick(rows(), "kmeans", 1, n_init=3)
    assert found.stability.tolist() == [1] and found.stability.dtype == np.float32


def test_numbers_of_numpy():
    assert quick(rows(), "simple", np.array(3)).components.shape == (3, D)
    assert [len(each.components) for each in quick(rows(), "simple", np.array([2, 3]))] == [2, 3]


def test_given_init_is_the_only_start():
    with pytest.warns(UserWarning, match="n_init=2 has no effect with given init"):
        quick(rows(), "kmeans", n_init=2, init=rows()[:K])


def test_nndl_is_snmf():
    assert quick(rows()).method == "snmf"
    named = decompose(rows(), K, "nndl", key=KEY, **QUICK["snmf"])
    assert named.method == "snmf"
    np.testing.assert_array_equal(named.components, quick(rows()).components)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.25, 8.0]))
def test_scaling_by_a_power_of_two_scales_centroids_and_scores(seed, scale):
    Z = rows(seed)
    for method in ("kmeans", "pca", "simple"):
        plain, scaled = quick(Z, method), quick(Z * np.float32(scale), method)
        factor = 1 if method == "pca" else scale
        np.testing.assert_allclose(
            scaled.components, factor * plain.components, rtol=1e-4, atol=1e-3
        )
        np.testing.assert_allclose(scaled.objective, scale**2 * plain.objective, rtol=1e-3)


# Concepts that were given.


@pytest.mark.parametrize("method", METHODS)
def test_given_components_project_like_learnt_ones(method):
    learnt = quick(rows(), method)
    given_concepts = Concepts.from_components(
        np.asarray(learnt.components),
        method,
        **({"mean": np.asarray(learnt.mean)} if method == "pca" else {}),
    )
    assert given_concepts.activations is None
    new = rows(1)
    np.testing.assert_array_equal(project(new, given_concepts), project(new, learnt))


def test_a_given_mean_keeps_its_digits_and_stays():
    """float32 would round the mean to a multiple of 64."""
    Z = 1e9 + rows().astype(np.float64)
    given_concepts = Concepts.from_components(np.eye(2, D), "pca", mean=Z.mean(axis=0))
    expected = (Z - Z.mean(axis=0))[:, :2]
    np.testing.assert_allclose(project(Z, given_concepts), expected, atol=1e-4)
    moved = given_concepts.with_components(np.eye(2, D, 1, np.float32))
    np.testing.assert_array_equal(moved.mean, given_concepts.mean)


def test_ties_go_to_the_nearest_component():
    """1 / (1 + distance) of distances below 1e-8 is one in float32."""
    near = np.float32([[1e-9, 0], [0, 1e-9]])
    for method in ("kmeans", "simple"):
        concepts = Concepts.from_components(near, method)
        codes = project(near[::-1], concepts)
        assert (np.asarray(codes) == 1).all()
        np.testing.assert_array_equal(reconstruct(concepts, codes, near[::-1]), near[::-1])
        traced = jax.jit(lambda codes, Z, given=concepts: reconstruct(given, codes, Z))
        np.testing.assert_array_equal(traced(codes, near[::-1]), near[::-1])
        assert squared_residual(concepts, near, np.asarray(codes)) == 0


def test_given_components_by_hand():
    Z = np.array([[3.0, -4.0]])
    axes = np.eye(2)
    for method, expected, options in (
        ("snmf", [[1, 0]], {"alpha": 2}),
        ("kmeans", [[1 / (1 + 20**0.5), 1 / (1 + 34**0.5)]], {}),
        ("simple", [[1 / (1 + 20**0.5), 1 / (1 + 34**0.5)]], {}),
        ("pca", [[3, -4]], {}),
        ("pca", [[2, -4]], {"mean": np.array([1.0, 0.0])}),
    ):
        concepts = Concepts.from_components(axes, method, **options)
        np.testing.assert_allclose(project(Z, concepts), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("components", "method", "options", "message"),
    [
        (np.ones(3), "snmf", {}, r"components must be a matrix .* got shape \(3,\)"),
        (np.array([[1.0, np.nan]]), "snmf", {}, "components has NaN or Inf in row 0"),
        (np.ones((2, 3)), "pca", {"mean": np.ones(2)}, r"mean must have shape \(3,\).*got \(2,\)"),
        (np.ones((2, 3)), "kmeans", {"mean": np.ones(3)}, "'kmeans' does not subtract a mean"),
        (np.ones((2, 3)), "pca", {"mean": np.full(3, np.nan)}, "^mean has NaN or Inf; give"),
        (np.ones((2, 3)), "svd", {}, "unknown method 'svd'"),
        (np.ones((2, 3)), "snmf", {"beta": 1}, "no option 'beta'"),
    ],
)
def test_bad_given_components(components, method, options, message):
    with pytest.raises(ValueError, match=message):
        Concepts.from_components(components, method, **options)


# Input of other types, and matrices that have little to say.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.int32, np.float64, ml_dtypes.bfloat16])
def test_other_types_give_what_their_values_give_as_float32(method, dtype):
    Z = (4 * rows()).astype(dtype)
    for array in (Z, jnp.asarray(Z)):
        concepts = quick(array, method)
        assert concepts.components.dtype == concepts.activations.dtype == jnp.float32
        wide = quick(Z.astype(np.float32), method)
        np.testing.assert_allclose(concepts.objective, wide.objective, rtol=1e-4, atol=1e-3)
        assert np.all(np.isfinite(project(array, concepts)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "Z",
    [np.zeros((N, D)), np.ones((N, D)), np.repeat(np.eye(2, D), N // 2, axis=0)],
    ids=["zero", "constant", "duplicates"],
)
def test_matrices_of_lower_rank_than_concepts(method, Z):
    concepts = quick(Z, method)
    assert np.all(np.isfinite(concepts.components))
    assert np.all(np.isfinite(concepts.activations))
    assert concepts.converged
    if method in ("kmeans", "pca"):
        np.testing.assert_allclose(concepts.objective, 0, atol=1e-5)
    if method in ("snmf", "pca"):
        np.testing.assert_allclose(np.linalg.norm(concepts.components, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_sample(method):
    Z = np.array([[3.0, 4.0]])
    concepts = quick(Z, method, 1)
    expected = {"snmf": [[0.6, 0.8]], "kmeans": Z, "simple": Z}
    if method in expected:
        np.testing.assert_allclose(concepts.components, expected[method], rtol=1e-5)
    assert concepts.activations.shape == (1, 1)
    assert np.all(np.isfinite(concepts.activations))


# Complaints.


def spoilt(row, value):
    Z = rows()
    Z[row:, 1] = value
    return Z


@pytest.mark.parametrize(
    ("Z", "num_concepts", "method", "options", "message"),
    [
        (rows(), 50, "snmf", {}, "num_concepts=50 is larger than the 20 rows of Z; use fewer"),
        (rows(), 7, "pca", {}, r"num_concepts=7 is larger than min\(N, D\) = 6"),
        (rows(), 0, "kmeans", {}, "num_concepts must be a whole number of at least 1; got 0"),
        (rows(), 2.5, "kmeans", {}, "num_concepts must be a whole number of at least 1; got 2.5"),
        (spoilt(19, np.nan), 2, "snmf", {}, "Z has NaN or Inf in row 19, "),
        (spoilt(17, np.inf), 2, "kmeans", {}, r"Z has NaN or Inf in row 17 \(and 2 more rows\)"),
        (np.full((4, 2), 1e300), 2, "pca", {}, "in row 0 .*values beyond float32"),
        (np.ones(5), 2, "snmf", {}, r"Z must be a matrix .* per sample; got shape \(5,\)"),
        (np.ones((2, 3, 4)), 2, "snmf", {}, r"Z must be a matrix .* got shape \(2, 3, 4\)"),
        (np.ones((5, 0)), 2, "snmf", {}, "Z has no columns"),
        (np.ones((5, 2), complex), 2, "snmf", {}, "Z must hold real numbers; got complex128"),
        (np.full((5, 2), "a"), 2, "snmf", {}, "Z must hold real numbers"),
        (rows(), 2, "kmean", {}, "unknown method 'kmean'; .*did you mean 'kmeans'"),
        (rows(), 2, "kmeans", {"alpha": 1}, "'kmeans' has no option 'alpha'; its options are tol"),
        (rows(), 2, "snmf", {"max_iters": 1}, "no option 'max_iters'.*did you mean 'max_iter'"),
        (rows(), 2, "simple", {"tol": 1}, "'simple' has no option 'tol'; it has no options"),
        (rows(), 2, "snmf", {"alpha": -1}, "alpha must be a finite number of at least 0; got -1"),
        (rows(), 2, "snmf", {"tol": np.nan}, "tol must be a finite number of at least 0; got nan"),
        (rows(), 2, "snmf", {"n_init": 0}, "n_init must be a whole number of at least 1; got 0"),
        (rows(), 2, "kmeans", {"init": np.ones((3, D))}, r"init must have shape \(2, 6\)"),
        (rows(), 2, "snmf", {"init": spoilt(0, np.inf)[:2]}, "init has NaN or Inf in row 0"),
    ],
)
@pytest.mark.wrong_types
def test_bad_input(Z, num_concepts, method, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        decompose(Z, num_concepts, method, key=KEY, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.wrong_types
def test_an_invalid_key():
    with pytest.raises(ValueError, match=r"key must come from jax.random.key; got 0"):
        decompose(rows(), 2, key=0)
    with pytest.raises(ValueError, match=r"got an array of keys of shape \(2,\), pass one of"):
        decompose(rows(), 2, key=jax.random.split(KEY))


def test_a_mesh_without_an_axis_for_rows():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="mesh has no axis 'data' to shard rows on, only model"):
        decompose(rows(), 2, key=KEY, mesh=mesh)


@pytest.mark.parametrize(
    ("Z", "message"),
    [
        (np.ones((4, 5)), "Z has 5 columns but the concepts have 6; project states from the site"),
        (np.ones(6), r"Z must be a matrix .* got shape \(6,\)"),
        (spoilt(4, np.nan), r"Z has NaN or Inf in row 4 \(and 15 more rows\)"),
    ],
)
def test_bad_input_of_project(Z, message):
    with pytest.raises(ValueError, match=message):
        project(Z, Concepts.from_components(np.eye(6)))


# Offsets, scales, and what float32 cannot hold.


@pytest.mark.parametrize("method", ["kmeans", "pca"])
def test_float64_and_integers_are_centred_before_float32(method):
    """The values are Unix seconds, which float32 rounds to multiples of 128."""
    rng = np.random.default_rng(0)
    near = np.stack([rng.integers(0, 1000, 500), rng.normal(size=500) * 300], axis=1)
    far = near + np.array([1.7e9, 0])
    count = 1 if method == "pca" else 2
    for Z in (far, far.astype(np.int64)):
        expected = quick(near if Z is far else near.astype(np.int64), method, count)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the centroids
            found = quick(Z, method, count)
        np.testing.assert_allclose(found.objective, expected.objective, rtol=1e-6)
        np.testing.assert_allclose(found.activations, expected.activations, rtol=1e-4, atol=1e-3)
        if method == "pca":
            np.testing.assert_allclose(found.mean, Z.mean(axis=0), rtol=0, atol=1e-6 * 300)
            np.testing.assert_allclose(project(Z, found), found.activations, atol=1e-3)


def test_centroids_that_float32_rounds_are_named():
    Z = np.arange(20.0)[:, None] + [[1e9, 0]]
    with pytest.warns(UserWarning, match="column 0 of Z has mean 1e.09 .* by up to 32") as said:
        quick(Z, "kmeans", 2)
    assert "\n" not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick(Z - [[1e9, 0]], "kmeans", 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-20, 1e9, 1e18])
def test_the_result_at_any_scale(method, scale):
    """The result is that at scale one, with alpha in proportion; squares would exceed float32."""
    unit = 2.0 ** np.floor(np.log2(scale))
    Z, alpha = rows(), {"alpha": 1.0} if method == "snmf" else {}
    plain = quick(Z, method, **alpha)
    scaled = quick(
        (Z * unit).astype(np.float32),
        method,
        **{name: unit * value for name, value in alpha.items()},
    )
    np.testing.assert_allclose(scaled.objective / unit / unit, plain.objective, rtol=1e-5)
    of_rows = method in ("kmeans", "simple")
    np.testing.assert_allclose(
        scaled.components / (unit if of_rows else 1), plain.components, rtol=1e-3, atol=1e-4
    )
    again = project((Z * unit).astype(np.float32), scaled)
    if of_rows:
        # What rounding makes of a distance of zero is not zero any more times the unit.
        both = [(1 / np.asarray(found) - 1) / unit for found in (again, scaled.activations)]
        np.testing.assert_allclose(*both, atol=1e-5 * np.abs(Z).max())
        ours, theirs = (
            concepts.distances((Z * of).astype(np.float32), found)[1] / of
            for of, found in ((unit, scaled), (1, plain))
        )
        assert np.all((scaled.activations >= 0) & (scaled.activations <= 1))
    else:
        np.testing.assert_allclose(again, scaled.activations, atol=1e-3 * np.abs(again).max())
        ours, theirs = scaled.activations / unit, plain.activations
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(theirs).max())
    assert np.all(np.isfinite(scaled.history))


def test_an_objective_beyond_float32_is_refused():
    result = pca.solve(
        jnp.full((4, 2), 1e30).at[0].set(-1e30), KEY, num_samples=4, num_concepts=(1,)
    )
    one = jax.tree.map(lambda leaf: leaf[0], result)
    with pytest.raises(ValueError, match=r"objective of pca is (inf|nan).*divide Z by its largest"):
        concepts._concepts(one, METHODS["pca"], {})


def test_rows_too_short_for_alpha_are_named_and_their_concepts_dead():
    Z = rows() / 100
    with pytest.warns(
        UserWarning, match=r"only 0 % of the rows have a nonzero code: alpha is 1, .*norm"
    ):
        found = quick(Z)
    assert found.dead.tolist() == [True] * K
    relative = quick(Z, alpha=0.01, relative_alpha=True)
    scale = np.sqrt(np.mean(np.sum(Z.astype(np.float64) ** 2, axis=1)))
    np.testing.assert_allclose(relative.options["alpha"], 0.01 * scale, rtol=1e-6)
    assert not relative.dead.any() and not quick(Z, "pca").dead.any()
    np.testing.assert_allclose(
        relative.activations, quick(Z, alpha=0.01 * scale).activations, rtol=1e-3, atol=1e-4
    )
    with pytest.raises(ValueError, match="relative_alpha must be True or False; got 1"):
        quick(Z, relative_alpha=1)
    with pytest.raises(ValueError, match="nonnegative must be True or False; got 'no'"):
        Concepts.from_components(Z[:2], nonnegative="no")


# The states of a real model, beside scikit-learn in float64.


@pytest.fixture(scope="module")
def states(shared):
    with np.load(shared / "states" / "smollm2-dog.npz") as arrays:
        return arrays["language_model.model.layers.28"]


def test_kmeans_of_real_states_is_scikit_learns(states):
    # Fewer columns than four times the concepts: all updates on the rows themselves.
    Z = states[:, :64] if states.shape[1] > 64 else states
    found = decompose(Z, 8, "kmeans", key=KEY, init=Z[:8], tol=0)
    theirs = cluster.KMeans(8, init=Z[:8].astype(np.float64), n_init=1, tol=0)
    theirs.fit(Z.astype(np.float64))
    np.testing.assert_allclose(found.objective, theirs.inertia_, rtol=1e-6)
    np.testing.assert_array_equal(concepts.distances(Z, found)[0], theirs.labels_)
    np.testing.assert_allclose(found.components, theirs.cluster_centers_, rtol=1e-5, atol=1e-3)


def test_pca_of_real_states_is_scikit_learns(states):
    found = decompose(states, 20, "pca", key=KEY)
    theirs = decomposition.PCA(20, svd_solver="full").fit(states.astype(np.float64))
    variances = np.var(np.asarray(found.activations, np.float64), axis=0, ddof=1)
    np.testing.assert_allclose(variances.sum(), theirs.explained_variance_.sum(), rtol=1e-5)
    np.testing.assert_allclose(variances[:5], theirs.explained_variance_[:5], rtol=1e-4)
    deviation = states.std(axis=0)
    assert np.all(np.abs(found.mean - theirs.mean_) <= 1e-6 * deviation)


def test_codes_of_real_states_are_scikit_learns(states):
    found = decompose(states, 10, key=KEY, n_init=2, max_iter=100)
    atoms = np.asarray(found.components, np.float64)
    theirs = decomposition.sparse_encode(
        states.astype(np.float64),
        atoms,
        algorithm="lasso_cd",
        alpha=1.0,
        positive=True,
        max_iter=100_000,
    )

    def objective(codes):
        codes = np.asarray(codes, np.float64)
        return 0.5 * np.sum((states - codes @ atoms) ** 2) + np.sum(codes)

    np.testing.assert_allclose(found.objective, objective(found.activations), rtol=1e-6)
    assert found.objective <= objective(theirs) * (1 + 1e-6)
    assert float(found.history[-1]) == found.objective


# Composition.


@pytest.mark.parametrize("method", METHODS)
def test_decompose_traces_under_jit_and_vmap(method):
    options = {} if method == "simple" else {"tol": 0.0, "max_iter": 4}
    Z, keys = jnp.stack([rows(0), rows(1)]), jax.random.split(KEY, 2)

    def solve(Z, key):
        return decompose(Z, K, method, key=key, **options)

    one = solve(Z[1], keys[1])
    jitted = jax.jit(solve)(Z[1], keys[1])
    both = jax.vmap(solve)(Z, keys)
    for found in (jitted, jax.tree.map(lambda leaf: leaf[1], both)):
        assert found.method == method and found.options == one.options
        np.testing.assert_allclose(found.components, one.components, atol=1e-3)
        np.testing.assert_allclose(found.activations, one.activations, atol=1e-3)
        np.testing.assert_allclose(found.objective, one.objective, rtol=1e-4)


def test_decompose_traces_on_a_mesh():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    traced = jax.jit(lambda Z: decompose(Z, K, "simple", key=KEY, mesh=mesh).components)(rows())
    np.testing.assert_array_equal(traced, quick(rows(), "simple").components)


@pytest.mark.parametrize(
    "option", [{"relative_alpha": True}, {"verbose": 1}, {"progress": lambda at: None}]
)
def test_what_needs_values_is_refused_under_jit(option):
    with pytest.raises(ValueError, match=r"^\w+ needs values .* under jit and vmap; omit it"):
        jax.jit(lambda Z: decompose(Z, K, key=KEY, **option))(rows())


@pytest.mark.parametrize("method", METHODS)
def test_project_traces_under_jit_vmap_and_grad(method):
    """Compares the gradient with finite differences whose step float32 resolves."""
    Z, learnt = jnp.asarray(rows(1)), quick(rows(), method)
    expected = project(Z, learnt)
    np.testing.assert_allclose(jax.jit(project)(Z, learnt), expected, atol=1e-5)
    by_row = jax.vmap(lambda z: project(z[None], learnt)[0])(Z)
    np.testing.assert_allclose(by_row, expected, atol=1e-4 * np.abs(expected).max())

    def loss(Z, components):
        concepts = dataclasses.replace(learnt, components=components)
        return jnp.sum(jnp.cos(project(Z, concepts)))

    components = jnp.asarray(learnt.components)
    slopes = jax.grad(loss, argnums=(0, 1))(Z, components)
    rng = np.random.default_rng(0)
    for i, (value, slope) in enumerate(zip((Z, components), slopes, strict=True)):
        step = rng.normal(size=value.shape).astype(np.float32)
        step *= 1e-2 / np.linalg.norm(step)
        moved = [
            loss(*((v + s * step if j == i else v) for j, v in enumerate((Z, components))))
            for s in (1, -1)
        ]
        measured = float(moved[0] - moved[1]) / 2
        np.testing.assert_allclose(jnp.vdot(slope, step), measured, rtol=0.05, atol=2e-4)


def test_a_gradient_at_a_centroid_is_a_number():
    concepts = Concepts.from_components(np.eye(2), "kmeans")
    slope = jax.grad(lambda Z: jnp.sum(project(Z, concepts)))(jnp.eye(2))
    assert np.all(np.isfinite(slope))


WIDE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from sklearn.decomposition import PCA
from xlvlm_jax.concepts.decomposition import decompose, project
rng = np.random.default_rng(0)
Z = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)) + 1e8
for method in sys.argv[1:]:
    options = {"max_iter": 50} if method != "simple" else {}
    for given in (Z, jnp.asarray(Z), Z - 1e8):
        found = decompose(given, 3, method, key=jax.random.key(0), **options)
        for name in ("components", "activations", "history"):
            assert getattr(found, name).dtype == jnp.float64, (method, name)
        again = project(given, found)
        assert again.dtype == jnp.float64
        np.testing.assert_allclose(again, found.activations, atol=1e-6 * np.abs(again).max())
    short = decompose((Z - 1e8).astype(np.float32), 3, method, key=jax.random.key(0), **options)
    assert short.components.dtype == short.activations.dtype == jnp.float32
    # Drawn in float64 the starts of snmf and kmeans are others: another optimum near it.
    rtol = 0.1 if method in ("snmf", "kmeans") else 1e-4
    np.testing.assert_allclose(short.objective, found.objective, rtol=rtol)
    if method == "pca":
        theirs = PCA(3, svd_solver="full").fit(Z - 1e8)
        np.testing.assert_allclose(found.components, theirs.components_, atol=1e-9)
print("wide")
"""


def test_sixty_four_bits_throughout():
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WIDE, "snmf"], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "wide\n", done.stderr[-2000:]


class Stored:
    def __init__(self, Z):
        self.Z, self.shape = Z, Z.shape

    def read(self, start, stop):
        return self.Z[start:stop]


def test_distances_of_stored_rows(monkeypatch):
    learnt = quick(rows(), "kmeans")
    monkeypatch.setattr(concepts, "PROJECTED_BYTES", 4 * D * 8)
    for found, expected in zip(
        concepts.distances(Stored(rows()), learnt), concepts.distances(rows(), learnt), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_stored_rows_are_projected_some_at_a_time(monkeypatch, waited_for):
    Z, learnt, values = rows(1), quick(rows()), waited_for(concepts)
    monkeypatch.setattr(concepts, "PROJECTED_BYTES", 7 * 4 * D)
    np.testing.assert_allclose(project(Stored(Z), learnt), project(Z, learnt), atol=1e-5)
    assert len(values) == -(-len(Z) // 7)
    with pytest.raises(ValueError, match=r"Z has NaN or Inf in row 17 \(and 2 more rows\)"):
        project(Stored(spoilt(17, np.inf)), learnt)


def test_many_concepts_are_projected_on_fewer_rows_at_a_time(monkeypatch):
    """Their activations, not the rows, fill the memory."""
    Z, learnt = rows(1), Concepts.from_components(np.tile(np.eye(D), (4, 1)), "simple")
    monkeypatch.setattr(concepts, "PROJECTED_BYTES", 7 * 4 * 4 * D)
    parts = [len(part) for _, part, _ in concepts.project_stored(Stored(Z), learnt)]
    assert max(parts) == 7 and sum(parts) == len(Z)


# On disk.


def test_dead_concepts_of_activations_on_disk(tmp_path, monkeypatch):
    codes = np.zeros((9, 4), np.float32)
    codes[8, 1] = codes[2, 3] = 1
    monkeypatch.chdir(tmp_path)
    with StoredActivations(".", *codes.shape) as activations:
        monkeypatch.chdir("/")
        activations.write(0, codes)
        found = Concepts(np.eye(4), activations.rows())
        monkeypatch.setattr(record, "TILE_NUMBERS", 8)  # two rows
        monkeypatch.setattr(StoredRows, "__array__", None)  # not as a whole
        assert found.dead.tolist() == [True, False, True, False]


@pytest.mark.parametrize("method", METHODS)
def test_saved_concepts_come_back(tmp_path, method):
    concepts = quick(rows(), method)
    concepts.save(tmp_path / "new" / "concepts")
    again = Concepts.load(tmp_path / "new" / "concepts")
    for name in ("components", "activations", "history", "mean"):
        np.testing.assert_array_equal(getattr(again, name), getattr(concepts, name))
    for name in ("method", "options", "objective", "iterations", "converged", "words", "source"):
        assert getattr(again, name) == getattr(concepts, name)
    assert sorted(path.name for path in (tmp_path / "new" / "concepts").iterdir()) == [
        "concepts.json",
        "concepts.safetensors",
    ]
    new = rows(1)
    np.testing.assert_array_equal(project(new, again), project(new, concepts))


def test_words_and_images_are_kept(tmp_path):
    concepts = Concepts(np.eye(2, dtype=np.float32), words=[["hund"], []], images=[["a.jpg"], []])
    concepts.save(tmp_path)
    again = Concepts.load(tmp_path)
    assert (again.words, again.images) == (concepts.words, concepts.images)
    assert json.loads((tmp_path / "concepts.json").read_text())["num_concepts"] == 2


def test_damaged_or_missing_files(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no concepts in .*concepts\.safetensors is missing"
    ):
        Concepts.load(tmp_path)
    first, second = tmp_path / "first", tmp_path / "second"
    Concepts(np.eye(2, dtype=np.float32)).save(first)
    Concepts(np.eye(3, dtype=np.float32)).save(second)
    (second / "concepts.safetensors").replace(first / "concepts.safetensors")
    with pytest.raises(ValueError, match="come from different saves; decompose again"):
        Concepts.load(first)
    (first / "concepts.json").write_text("{")
    with pytest.raises(ValueError, match="is not a description of concepts"):
        Concepts.load(first)


def test_a_save_that_fails_leaves_the_old_concepts(tmp_path):
    Concepts(np.eye(2, dtype=np.float32)).save(tmp_path)
    with pytest.raises(TypeError):
        Concepts(np.eye(3, dtype=np.float32), source={"not": {"JSON"}}).save(tmp_path)
    assert Concepts.load(tmp_path).components.shape == (2, 2)


# Weights of rows.


def test_weights_scale_the_objective_and_nothing_else():
    Z, weights = rows(), 0.5 + np.arange(len(rows())) % 3
    one, other = (
        decompose(Z, 2, "kmeans", key=KEY, sample_weight=scale * weights) for scale in (1, 3e30)
    )
    np.testing.assert_allclose(other.components, one.components, rtol=1e-4, atol=1e-4)
    assert other.objective == pytest.approx(3e30 * one.objective, rel=1e-4)
    squared = np.min((1 / np.asarray(one.activations) - 1) ** 2, axis=1)
    assert one.objective == pytest.approx(weights @ squared, rel=1e-3)
    assert "sample_weight" not in one.options


def test_weights_of_a_method_without_them():
    with pytest.raises(ValueError, match="'snmf' does not take weights; omit sample_weight or use"):
        decompose(rows(), 2, key=KEY, sample_weight=np.ones(len(rows())))


# On a mesh.

SHARDED = """
import jax, numpy as np
from xlvlm_jax.concepts.methods import METHODS
from xlvlm_jax.concepts.decomposition import decompose, memory_needed, project

assert len(jax.devices()) == 8
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
explicit = jax.make_mesh((8,), ("data",))  # as JAX makes it, unless it is told of types
assert explicit.explicit_axes == ("data",)
rng = np.random.default_rng(0)
codes = 10 * rng.exponential(size=(61, 3)) * (rng.random((61, 3)) < 0.5)  # 8 does not divide 61
Z = (codes @ rng.normal(size=(3, 10)) + 0.1 * rng.normal(size=(61, 10))).astype(np.float32)
for method in METHODS:
    # As many updates on both: where they end, equal objectives leave atoms 1e-4 apart.
    options = {"n_init": 2, "tol": 0, "max_iter": 15} if method == "snmf" else {}
    one = decompose(Z, 3, method, key=jax.random.key(1), **options)
    eight, other = (
        decompose(Z, 3, method, key=jax.random.key(1), mesh=on, **options)
        for on in (mesh, explicit)
    )
    assert other.activations.sharding == eight.activations.sharding
    jax.tree.map(np.testing.assert_array_equal, other, eight)
    assert eight.activations.shape == one.activations.shape == (61, 3)
    np.testing.assert_allclose(eight.objective, one.objective, rtol=1e-5)
    for name in ("components", "activations"):
        a, b = (np.asarray(getattr(c, name)) for c in (eight, one))
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), err_msg=method + name)
    a, b = np.asarray(project(Z, one, mesh=explicit)), np.asarray(project(Z, one))
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), err_msg=method)
far = Z + np.float32(1e4)
one = decompose(far, 3, "pca", key=jax.random.key(1))
exact = (far.astype(np.float64) - np.asarray(one.mean)) @ np.asarray(one.components, np.float64).T
np.testing.assert_allclose(project(far, one, mesh=mesh), exact, atol=1e-3)
# Many components, block by block, with progress.
wide = rng.normal(size=(645, 300)).astype(np.float32)
told = []
one = decompose(wide, 40, "pca", key=jax.random.key(1))
eight = decompose(wide, 40, "pca", key=jax.random.key(1), mesh=mesh, progress=told.append)
assert 0 < eight.iterations == one.iterations == told[-1].iteration and eight.converged
assert [at.iteration for at in told] == sorted({at.iteration for at in told})
np.testing.assert_allclose(told[-1].objective, eight.objective, rtol=1e-5)
np.testing.assert_allclose(eight.history, one.history, rtol=1e-5)
a, b = (np.asarray(each.activations @ each.components) for each in (eight, one))
np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())
np.testing.assert_allclose(eight.components @ eight.components.T, np.eye(40), atol=1e-5)
weights = np.arange(61) % 5
one, eight = (
    decompose(Z, 3, "kmeans", key=jax.random.key(1), sample_weight=weights, mesh=on)
    for on in (None, mesh)
)
np.testing.assert_allclose(eight.objective, one.objective, rtol=1e-5)
np.testing.assert_allclose(eight.components, one.components, atol=1e-4)
one = decompose(Z, 3, key=jax.random.key(1))
eight = decompose(Z, 3, key=jax.random.key(1), mesh=mesh)
np.testing.assert_allclose(eight.objective, one.objective, rtol=1e-5)
# A matrix that lies along axes of type Explicit; without `mesh` too.
spread, same = (
    jax.device_put(Z[:56], jax.sharding.NamedSharding(on, jax.sharding.PartitionSpec("data")))
    for on in (explicit, mesh)
)
for more in ({}, {"mesh": explicit}):
    found = decompose(spread, 3, "simple", key=jax.random.key(1), **more)
    expected = decompose(same, 3, "simple", key=jax.random.key(1), **more)
    np.testing.assert_array_equal(found.components, expected.components)
    np.testing.assert_array_equal(project(spread, found, **more), project(same, found, **more))
assert memory_needed((61, 10), 3, mesh=explicit) == memory_needed((61, 10), 3, mesh=mesh)
print("equal")
"""


def test_eight_devices_give_the_result_of_one():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "equal\n", done.stderr[-2000:]


@pytest.mark.parametrize("method", ["snmf", "simple"])
def test_rows_that_float32_rounds_away_are_named(method):
    """Unlike k-means and PCA, these methods cannot subtract the mean in float64 first."""
    near = np.random.default_rng(0).normal(size=(50, 3))
    options = {"max_iter": 2, "n_init": 1} if method == "snmf" else {}
    expected = (
        rf"column \d of Z has mean 1e\+08 and standard deviation [01]\.\d+: {method} computes in "
        r"float32, which rounds values there by up to 4; subtract the columns' means first, or set"
    )
    with pytest.warns(UserWarning, match=expected):
        decompose(1e8 + near, 2, method, key=KEY, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decompose(1e2 + near, 2, method, key=KEY, **options)
        # A column that is constant but for rounding loses nothing that counts.
        decompose(np.c_[near[:, :2], 1e3 + 1e-12 * near[:, :1]], 2, method, key=KEY, **options)
        decompose(np.full((50, 3), 1e8), 2, method, key=KEY, **options)
