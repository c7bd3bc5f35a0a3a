"""Kernels for TPU, run as ordinary operations: they return what the programs of others return."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlvlm_jax.solvers import kmeans, kmeans_assignment, kmeans_nearest, semi_nmf
from xlvlm_jax.solvers.sums import cluster_sums
from xlvlm_jax.solvers.tpu import blocks, clusters, codes

D = 256


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Takes small matrices, in blocks of 128 rows and columns; and chooses what a TPU would."""
    sizes = {"ROWS": (128,), "CHUNKS": (128,), "LEAST_ROWS": 1, "LEAST_WIDTH": 128, "GROUP": 32}
    for name, value in sizes.items():
        monkeypatch.setattr(blocks, name, value)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.delenv(blocks.VARIABLE, raising=False)


def close(got, expected, tolerance=1e-5):
    """Compares relative to the largest number."""
    expected = np.asarray(expected)
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=1e-30)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * largest)


def test_parts_by_hand():
    x = np.float32(1 + 2**-9 + 2**-17)
    parts = [float(part) for part in blocks.parts(jnp.asarray(x))]
    assert parts == [1, 2**-9, 2**-17]
    assert [float(part) for part in blocks.parts(jnp.float32(-3))] == [-3, 0, 0]


@settings(max_examples=50)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=8, max_size=8))
def test_parts_sum_to_the_number(values):
    x = np.float32(values)
    x[np.abs(x) < 2.0**-80] = 0  # whose last parts would be subnormal
    first, *rest = (np.asarray(part, np.float64) for part in blocks.parts(jnp.asarray(x)))
    np.testing.assert_array_equal(first + sum(rest), x)
    # The first is the nearest number of eight bits.
    assert np.all(np.abs(x - first) <= 2.0**-8 * np.abs(x))


@pytest.mark.parametrize("is_exact", [False, True])
def test_products_have_the_error_of_full_precision(is_exact):
    """Compares errors against float64 with those of products at precision "highest"."""
    rng = np.random.default_rng(0)
    small = rng.normal(size=(20, 1024)).astype(np.float32)
    small = (small > 1).astype(np.float32) if is_exact else small
    block = (rng.normal(size=(256, 1024)) + 3).astype(np.float32)
    stack = jnp.asarray(small, jnp.bfloat16) if is_exact else blocks.stacked(jnp.asarray(small))
    exact = small.astype(np.float64) @ block.T.astype(np.float64)
    got = blocks.product(stack, blocks.parts(jnp.asarray(block)), blocks.BY_ROWS, is_exact)
    full = jnp.matmul(small, block.T, precision="highest")
    error, error_of_full = (float(np.sqrt(np.mean((x - exact) ** 2))) for x in (got, full))
    assert error <= error_of_full
    # And dropping a part would show.
    without = blocks.product(
        stack, (*blocks.parts(jnp.asarray(block))[:2], jnp.zeros_like(stack, shape=block.shape)),
        blocks.BY_ROWS, is_exact,
    )  # fmt: skip
    assert np.sqrt(np.mean((without - exact) ** 2)) > 2 * error


def clustered(N, K, seed=0, D=D, common=0.0):
    rng = np.random.default_rng(seed)
    Z = rng.normal(size=(N, D)).astype(np.float32) + np.float32(common)
    offsets = rng.normal(size=(K, D)).astype(np.float32)
    return Z, offsets, Z.mean(axis=0)


def assigned(Z, offsets, mean, counted, are_ones, active=True):
    bias = jnp.where(active, jnp.sum(offsets**2, axis=1), jnp.inf)
    run = jax.jit(clusters.assign, static_argnums=5)
    return run(*map(jnp.asarray, (Z, offsets, mean, bias, counted)), are_ones)


def test_three_rows_by_hand():
    Z = np.zeros((3, 128), np.float32)
    Z[:, 0], mean = [0, 2, 7], np.zeros(128, np.float32)
    mean[0] = 3
    offsets = np.zeros((2, 128), np.float32)
    offsets[:, 0] = [-3, 4]  # centroids 0 and 7
    found = assigned(Z, offsets, mean, np.ones(3, np.float32), True)
    np.testing.assert_array_equal(found.labels, [0, 0, 1])
    # |z - c|^2 less |z - 3|^2.
    np.testing.assert_array_equal(found.least, [0 - 9, 4 - 1, 0 - 16])
    np.testing.assert_array_equal(found.second, [49 - 9, 25 - 1, 49 - 16])
    np.testing.assert_array_equal(found.counts.value, [2, 1])
    np.testing.assert_array_equal(found.totals.value[:, 0], [-3 - 1, 4])


@pytest.mark.parametrize(
    ("N", "K", "weighted", "D"),
    [
        (301, 1, False, D),
        (301, 20, False, D),
        (384, 128, False, D),
        (301, 20, True, D),
        (301, 20, False, 2 * D),  # two steps to sum up
    ],
    ids=["one", "few", "four groups", "weights", "wide"],
)
def test_assignment_and_sums_as_without_the_kernel(N, K, weighted, D):
    """Rows that do not fill a block, rows that do not count, and an inactive centroid."""
    Z, offsets, mean = map(jnp.asarray, clustered(N, K, D=D))
    counted = (jnp.arange(N) < N - 5).astype(jnp.float32)
    if weighted:
        counted *= np.random.default_rng(1).random(N).astype(np.float32) ** 3
    active = jnp.arange(K) != 3
    found = assigned(Z, offsets, mean, counted, not weighted, active)
    plain = kmeans_nearest.nearest(kmeans_assignment.score(Z, offsets, mean, True, active))
    np.testing.assert_array_equal(found.labels, plain.labels)
    close(found.least, plain.least)
    close(found.second, plain.second)
    counts, totals = cluster_sums(Z, plain.labels, K, mean, counted)
    close(found.counts.value, counts.value)
    close(found.totals.value, totals.value)


@pytest.mark.parametrize("K", [20, 40], ids=["one group", "two groups"])
def test_ties_go_to_the_first(K):
    """Every centroid is there twice; small integers have exact products."""
    rng = np.random.default_rng(0)
    Z = rng.integers(-3, 4, size=(130, 128)).astype(np.float32)
    once = rng.integers(-3, 4, size=(K // 2, 128)).astype(np.float32)
    offsets = np.concatenate([once, once])
    zeros = np.zeros(128, np.float32)
    found = assigned(Z, offsets, zeros, np.ones(130, np.float32), True)
    scores = (once**2).sum(1)[:, None] - 2 * once @ Z.T
    np.testing.assert_array_equal(found.labels, scores.argmin(0))
    np.testing.assert_array_equal(found.least, scores.min(0))
    np.testing.assert_array_equal(found.second, scores.min(0))


@settings(max_examples=6)
@given(st.integers(1, 300), st.integers(0, 2**16))
def test_every_row_counts_once(num_rows, seed):
    """For any number of rows: sums of the clusters are those of the rows, labels are nearest."""
    Z, offsets, mean = clustered(300, 7, seed, 128)
    counted = (np.arange(300) < num_rows).astype(np.float32)
    found = assigned(Z, offsets, mean, counted, True)
    assert float(jnp.sum(found.counts.value)) == num_rows
    moved = Z.astype(np.float64) - mean
    # Relative to what is added up: all rows about their mean add up to nothing.
    error = np.abs(np.asarray(found.totals.value).sum(0) - moved[:num_rows].sum(0))
    assert (error <= 1e-6 * np.abs(moved[:num_rows]).sum(0)).all()
    distances = ((moved[:, None] - offsets[None]) ** 2).sum(2)
    np.testing.assert_allclose(distances[np.arange(300), found.labels], distances.min(1), rtol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_updates_as_on_other_backends(weighted, monkeypatch):
    """First all rows, then those whose centroids can have changed; two runs side by side."""
    Z, offsets, _ = clustered(301, 20, common=100.0)
    weights = jnp.asarray(np.random.default_rng(2).random(301), jnp.float32) if weighted else None
    starts = jnp.stack([offsets, offsets[::-1] / 2])

    def updated(backend):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        problem = kmeans.prepare(jnp.asarray(Z), 301, jnp.ones(20, bool), weights=weights)
        assert clusters.takes(problem.Z, 20) == (backend == "tpu")

        def run(start):
            first = kmeans.update(problem, kmeans.init(problem, start))
            return jax.lax.fori_loop(0, 2, lambda _, state: kmeans.update(problem, state), first)

        return jax.jit(jax.vmap(run))(starts)

    got, expected = updated("tpu"), updated("cpu")
    close(got.offsets, expected.offsets)
    np.testing.assert_array_equal(got.kept.labels, expected.kept.labels)
    close(got.objective, expected.objective)


def factored(N, K, seed=0, D=D):
    rng = np.random.default_rng(seed)
    atoms = rng.normal(size=(K, D)).astype(np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    atoms[K // 2 :][:1] *= K > 1  # an inactive atom
    planted = np.maximum(rng.normal(size=(N, K)), 0) * 5
    Z = (planted @ atoms + 0.3 * rng.normal(size=(N, D))).astype(np.float32)
    start = np.abs(rng.normal(size=(K, N))).astype(np.float32)
    energy = 0.5 * (Z**2).sum(axis=1)
    return map(jnp.asarray, (Z, energy, start, atoms, np.float32(0.7)))


@pytest.mark.parametrize(
    ("N", "K", "nonnegative", "D"),
    [(301, 1, True, D), (301, 20, True, D), (256, 20, False, D), (301, 20, True, 2 * D)],
)
def test_codes_and_sums_as_on_other_backends(N, K, nonnegative, D, monkeypatch):
    Z, *others = factored(N, K, D=D)
    assert codes.takes(Z, K)
    collect = jax.jit(semi_nmf.collect, static_argnums=5)
    found = collect(Z, *others, nonnegative)
    jax.clear_caches()
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    expected = collect(Z, *others, nonnegative)
    jax.tree.map(close, found, expected)


def test_costs_that_cancel_come_from_the_residuals():
    """A row that is fitted to four digits costs 1e-8 of its energy, which differences lose."""
    Z, _, start, atoms, _ = factored(200, 4)
    fit = start.T @ atoms
    Z = fit + 1e-4 * Z
    energy = 0.5 * jnp.sum(Z**2, axis=1)
    found, _, cost = jax.jit(semi_nmf.collect)(Z, energy, start, atoms, jnp.float32(0))
    residuals = np.asarray(Z, np.float64) - np.asarray(found, np.float64).T @ np.asarray(atoms)
    expected = 0.5 * (residuals**2).sum(axis=1)
    assert (expected < 1e-6 * np.asarray(energy)).mean() > 0.9
    np.testing.assert_allclose(cost, expected, rtol=0.01)


def test_which_matrices_are_taken(monkeypatch):
    def zeros(N, D, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((N, D), dtype)

    monkeypatch.undo()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for takes in (clusters.takes, codes.takes):
        assert takes(zeros(100_000, 4096), 20)
        assert not takes(zeros(100_000, 4096, jnp.bfloat16), 20)
        assert not takes(zeros(100_000, 4095), 20)  # not whole lanes
        assert not takes(zeros(100_000, 48), 20)  # few columns
        assert not takes(zeros(500, 4096), 20)  # few rows
    assert clusters.takes(zeros(100_000, 4096), 512)
    assert not clusters.takes(zeros(100_000, 4096), 1024)  # more than fits
    assert not codes.takes(zeros(100_000, 4096), 65)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not clusters.takes(zeros(100_000, 4096), 20)


def test_the_variable(monkeypatch):
    monkeypatch.setenv(blocks.VARIABLE, "off")
    assert not blocks.is_on()
    monkeypatch.setenv(blocks.VARIABLE, " On")
    assert blocks.is_on()
    monkeypatch.setenv(blocks.VARIABLE, "maybe")
    with pytest.raises(ValueError, match=r"^XLVLM_TPU_KERNELS is 'maybe'; expected on or off$"):
        blocks.is_on()


MESH = """
from unittest import mock
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from xlvlm_jax.solvers import kmeans, semi_nmf
from xlvlm_jax.solvers.collectives import ONE_DEVICE, Rows
from xlvlm_jax.solvers.tpu import blocks, clusters, codes

blocks.ROWS, blocks.LEAST_ROWS, blocks.LEAST_WIDTH = (128,), 1, 128
N, D, K = 8 * 65, 128, 5
Z = jnp.asarray(np.random.default_rng(0).normal(size=(N, D)), jnp.float32)
start, active = Z[:K] / jnp.linalg.norm(Z[:K], axis=1, keepdims=True), jnp.ones(K, bool)


def by_kmeans(Z, rows):
    # The last rows pad Z.
    problem = kmeans.prepare(Z, N - 3, active, rows)
    state = kmeans.update(problem, kmeans.init(problem, start), rows)
    return state.offsets, state.objective


def by_semi_nmf(Z, rows):
    energy = jnp.sum(Z**2, axis=1) / 2
    problem = semi_nmf.Problem(Z, energy, jnp.float32(0.5), active)
    state = semi_nmf.init(problem, jnp.zeros((K, len(Z))), start, rows)
    state = semi_nmf.update(problem, state, rows)
    return state.small.atoms, state.objective


mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
for update, takes in ((by_kmeans, clusters.takes), (by_semi_nmf, codes.takes)):
    plain = jax.jit(lambda Z: update(Z, ONE_DEVICE))(Z)
    spread = jax.shard_map(
        lambda Z: update(Z, Rows("data")), mesh=mesh, in_specs=P("data"), out_specs=P(),
        check_vma=False,
    )
    sums = str(jax.make_jaxpr(spread)(Z)).count("psum")
    jax.clear_caches()  # of what was traced for a CPU
    with mock.patch("jax.default_backend", return_value="tpu"):
        assert takes(Z[:65], K)
        jaxpr = str(jax.make_jaxpr(spread)(Z))
        assert "pallas_call" in jaxpr
        assert jaxpr.count("psum") == sums, (jaxpr.count("psum"), sums)
        got = jax.jit(spread)(Z)
    for one, other in zip(got, plain):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
print("equal")
"""


def test_on_eight_devices_as_without_the_kernel_on_one():
    """The sums of the devices are one sum, as without the kernel."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", MESH], env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "equal\n", done.stderr[-2000:]
