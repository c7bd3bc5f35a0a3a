"""Rows that stay on disk: the same result as in memory, tile by tile."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlvlm_jax.concepts.decomposition import decompose, decompose_stored
from xlvlm_jax.solvers import buckets, kmeans, phases
from xlvlm_jax.solvers.streamed import columns, semi_nmf, tiles
from xlvlm_jax.solvers.streamed import kmeans as kmeans_on_disk
from xlvlm_jax.storage import zarr_rows
from xlvlm_jax.storage.zarr_rows import StoredRows, create_array, wait

from .helpers import Compilations

KEY = jax.random.key(0)
N, D, K = 301, 24, 4


def planted(seed=0):
    rng = np.random.default_rng(seed)
    codes = 10 * rng.exponential(size=(N, K)) * (rng.random((N, K)) < 0.4)
    return (3 + codes @ rng.normal(size=(K, D)) + 0.1 * rng.normal(size=(N, D))).astype(np.float32)


def store(path, Z, dtype="float32"):
    array = create_array(path, dtype, (0, Z.shape[1]))
    chunk = array.chunk_layout.write_chunk.shape[0]
    whole = -(-len(Z) // chunk) * chunk
    array = wait(array.resize(exclusive_max=[whole, Z.shape[1]]))
    wait(array[: len(Z)].write(Z.astype(array.dtype.numpy_dtype)))
    return StoredRows(path, len(Z))


@pytest.fixture
def small_tiles(monkeypatch):
    """Divides the rows into five tiles, the last of which is short."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 64 * 4 * D)


def test_rows_come_in_order_and_by_number(tmp_path):
    Z = planted()
    source = store(tmp_path / "Z", Z)
    starts, parts = zip(*source.tiles(100), strict=True)
    assert starts == (0, 100, 200, 300)
    np.testing.assert_array_equal(np.concatenate(parts), Z)
    np.testing.assert_array_equal(source.take(np.array([300, 5])), Z[[300, 5]])
    with pytest.raises(IndexError, match="rows 5 to 301 of 301"):
        source.take(np.array([301, 5]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_by_number_come_from_their_own_chunks(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(zarr_rows, "_CHUNK_BYTES", 16 * 4 * D)
    Z = planted()
    source = store(tmp_path / "Z", Z, dtype)
    numbers = np.random.default_rng(0).integers(0, N, 200)  # some of them twice
    expected = Z.astype(source.dtype)[numbers]
    np.testing.assert_array_equal(source.take(numbers), expected)
    np.testing.assert_array_equal(source.take(np.arange(7, 40)), Z[7:40].astype(source.dtype))
    assert source.take(np.zeros(0, int)).shape == (0, D)
    source._is_plain = False  # what TensorStore finds
    np.testing.assert_array_equal(source.take(numbers), expected)


@pytest.mark.parametrize("method", ["snmf", "kmeans", "pca"])
def test_the_same_as_in_memory(tmp_path, small_tiles, method):
    Z, told = planted(), []
    one = decompose(Z, K, method, key=KEY)
    source = store(tmp_path / "Z", Z)
    streamed = decompose_stored(source, K, method, key=KEY, progress=told.append)
    assert told[-1].iteration == streamed.iterations
    np.testing.assert_allclose(streamed.objective, one.objective, rtol=1e-5)
    scale = np.abs(one.components).max()
    np.testing.assert_allclose(streamed.components, one.components, atol=2e-3 * scale)
    assert streamed.activations.shape == (N, K)
    assert len(streamed.history) == streamed.iterations + 1
    assert streamed.converged


def test_an_atom_without_rows_is_revived(tmp_path, small_tiles):
    # Compressed to two columns the third direction can't be seen; a pass over the rows finds it.
    Z = np.zeros((N, D), np.float32)
    Z[:, 0], Z[::2, 1], Z[7, 2] = 50, 40, 30
    found = decompose_stored(store(tmp_path / "Z", Z), 3, key=KEY)
    one = decompose(Z, 3, key=KEY)
    np.testing.assert_allclose(found.objective, one.objective, rtol=1e-4)


def test_activations_are_written_as_they_come(tmp_path, small_tiles):
    Z, written = planted(), []
    found = decompose_stored(
        store(tmp_path / "Z", Z),
        K,
        key=KEY,
        write=lambda start, rows: written.append((start, rows)),
    )
    assert found.activations is None
    assert [start for start, _ in written] == [0, 64, 128, 192, 256]
    kept = decompose_stored(store(tmp_path / "Y", Z), K, key=KEY).activations
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in written]), kept)


def test_bfloat16_rows(tmp_path, small_tiles):
    source = store(tmp_path / "Z", planted(), "bfloat16")
    rows = np.concatenate([part for _, part in source.tiles(64)])
    one = decompose(rows.astype(np.float32), K, key=KEY)
    streamed = decompose_stored(source, K, key=KEY)
    np.testing.assert_allclose(streamed.objective, one.objective, rtol=1e-4)


@pytest.mark.parametrize("method", ["snmf", "kmeans", "pca"])
def test_a_bad_row_is_named(tmp_path, small_tiles, method):
    Z = planted()
    Z[130, 3] = np.nan
    with pytest.raises(ValueError, match="NaN or Inf in row 130"):
        decompose_stored(store(tmp_path / "Z", Z), K, method, key=KEY)


class NumberedByNumpy:
    """Tiles that begin at numpy's integers, as a `Source` of a user's may yield."""

    def __init__(self, Z):
        self.Z, self.shape = Z, Z.shape

    def tiles(self, count):
        for start in np.arange(0, len(self.Z), count):
            yield start, self.Z[start : start + count]

    def take(self, numbers):
        return self.Z[numbers]


def test_a_bad_row_is_named_where_numpy_counts_rows(small_tiles):
    Z = planted()
    Z[130, 3] = np.nan
    with pytest.raises(ValueError, match="NaN or Inf in row 130,"):
        tiles.scale_of(NumberedByNumpy(Z), exact=True)


def test_what_cannot_be_streamed(tmp_path):
    source = store(tmp_path / "Z", planted())
    with pytest.raises(ValueError, match="'simple' can't be streamed; expected one of snmf"):
        decompose_stored(source, K, "simple", key=KEY)
    with pytest.raises(ValueError, match="init is not available for stored rows"):
        decompose_stored(source, K, key=KEY, init=np.eye(K, D))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="'pca' reads stored rows on one device; omit mesh"):
        decompose_stored(source, K, "pca", key=KEY, mesh=mesh)
    with pytest.raises(ValueError, match="num_concepts=302 is larger than the 301 rows"):
        decompose_stored(source, 302, "kmeans", key=KEY)


def test_components_of_a_wide_source_take_several_passes(tmp_path, monkeypatch):
    rows, width = 900, 300
    monkeypatch.setattr(tiles, "TILE_BYTES", 200 * 4 * width)
    rng = np.random.default_rng(1)
    axes = np.linalg.qr(rng.normal(size=(width, width)))[0]
    Z = (5 + rng.normal(size=(rows, width)) * 0.99 ** np.arange(width) @ axes).astype(np.float32)
    found = decompose_stored(store(tmp_path / "Z", Z), K, "pca", key=KEY, tol=1e-6)
    values = np.linalg.svd(Z - Z.mean(axis=0, dtype=np.float64), compute_uv=False)
    assert found.converged and found.iterations > 2
    np.testing.assert_allclose(found.objective, 0.5 * np.sum(values[K:] ** 2), rtol=1e-5)
    np.testing.assert_allclose(found.components @ found.components.T, np.eye(K), atol=1e-5)
    variances = np.sum(found.activations**2, axis=0)
    np.testing.assert_allclose(variances, values[:K] ** 2, rtol=1e-4)
    assert np.all(np.diff(found.history) <= 1e-6 * found.history[0])


def test_clusters_of_a_sample_s_columns_are_those_in_memory(tmp_path, monkeypatch):
    rows, width = 1500, 200
    monkeypatch.setattr(tiles, "TILE_BYTES", 400 * 4 * width)
    monkeypatch.setattr(buckets, "SMALL_UPDATE", 0)  # in memory, small rows are not compressed
    assert kmeans.columns(rows, K) == (K + kmeans.BY_SAMPLE, True)
    rng = np.random.default_rng(2)
    centres = 3 * rng.normal(size=(2 * K, width))
    Z = (centres[rng.integers(0, 2 * K, rows)] + rng.normal(size=(rows, width))).astype(np.float32)
    one = decompose(Z, K, "kmeans", key=KEY)
    found = decompose_stored(store(tmp_path / "Z", Z), K, "kmeans", key=KEY)
    np.testing.assert_allclose(found.objective, one.objective, rtol=1e-5)
    np.testing.assert_allclose(found.components, one.components, atol=1e-3)
    np.testing.assert_allclose(found.activations, one.activations, atol=1e-4)

    Z[700, 3] = np.inf
    with pytest.raises(ValueError, match="NaN or Inf in row 700"):
        decompose_stored(store(tmp_path / "Y", Z), K, "kmeans", key=KEY)


class Rows:
    """A source of another class."""

    def __init__(self, Z, shape=None):
        self.Z, self.shape = Z, shape or Z.shape

    def tiles(self, count):
        for start in range(0, len(self.Z), count):
            yield start, self.Z[start : start + count]

    def take(self, numbers):
        return self.Z[np.minimum(numbers, len(self.Z) - 1)]


class Counted(Rows):
    """Counts how often all rows are read."""

    passes = 0

    def tiles(self, count):
        self.passes += 1
        yield from super().tiles(count)


@pytest.mark.parametrize("method", ["snmf", "kmeans"])
def test_an_update_is_one_pass_and_is_reported(small_tiles, method):
    source, told = Counted(planted()), []
    found = decompose_stored(
        source,
        K,
        method,
        key=KEY,
        tol=0.0,
        max_iter=40 if method == "snmf" else 300,
        progress=lambda at: told.append((at.iteration, source.passes)),
    )
    # Two passes compress the rows, whose updates read none; the last pass writes activations.
    on_rows = [(iteration, passes) for iteration, passes in told if passes > 2]
    first = 3 - on_rows[0][0]
    assert on_rows == [(on_rows[0][0] + i, 3 + i) for i in range(len(on_rows))]
    assert found.iterations == on_rows[-1][0]
    assert source.passes == first + found.iterations + 1


@pytest.mark.parametrize("method", ["kmeans", "pca"])
def test_rows_far_from_zero_are_those_near_it(small_tiles, method):
    """An offset that float32 adds to these rows exactly, without loss."""
    rng = np.random.default_rng(0)
    Z = rng.integers(-512, 512, size=(N, D)) / 64 + 8 * rng.integers(0, 2, size=(N, 1))
    near = decompose_stored(Rows(Z.astype(np.float32)), K, method, key=KEY)
    far = decompose_stored(Rows((Z + 2**16).astype(np.float32)), K, method, key=KEY)
    np.testing.assert_allclose(far.objective, near.objective, rtol=1e-5)
    np.testing.assert_allclose(far.history[-1], far.objective, rtol=1e-5)
    np.testing.assert_allclose(far.activations, near.activations, atol=2e-3)


@pytest.mark.parametrize("method", ["snmf", "kmeans", "pca"])
@pytest.mark.parametrize("exponent", [-70, 66])
def test_rows_at_any_scale(small_tiles, method, exponent):
    """The result is that at scale one, with alpha in proportion; squares do not fit float32."""
    unit, Z, told = 2.0**exponent, planted(), []
    options = {"snmf": {"n_init": 1, "max_iter": 30}}.get(method, {})
    plain = decompose_stored(Rows(Z), K, method, key=KEY, **options)
    if method == "snmf":
        options["alpha"] = unit
    found = decompose_stored(
        Rows((Z * unit).astype(np.float32)), K, method, key=KEY, progress=told.append, **options
    )
    assert found.converged == plain.converged
    np.testing.assert_allclose(found.objective / unit / unit, plain.objective, rtol=1e-4)
    np.testing.assert_allclose(told[-1].objective / unit / unit, plain.objective, rtol=1e-2)
    assert np.isfinite(found.history).all()
    of_rows = unit if method == "kmeans" else 1
    scale = np.abs(plain.components).max()
    np.testing.assert_allclose(found.components / of_rows, plain.components, atol=2e-3 * scale)
    if method == "kmeans":
        offsets = Z.astype(np.float64)[:, None] * unit - np.asarray(found.components, np.float64)
        exact = 1 / (1 + np.linalg.norm(offsets, axis=2))
        np.testing.assert_allclose(found.activations, exact, rtol=1e-4)
    else:
        scale = np.abs(plain.activations).max()
        np.testing.assert_allclose(
            found.activations / unit, plain.activations, rtol=0, atol=2e-3 * scale
        )
    if method == "pca":
        np.testing.assert_allclose(found.mean / unit, plain.mean, rtol=1e-4, atol=1e-4)


def test_one_row_that_dwarfs_all_others(small_tiles):
    Z = planted() * np.float32(2.0**-20)
    Z[150] = 0
    Z[150, 1] = 2.0**70  # not among the rows whose scale is looked at first
    found = decompose_stored(Rows(Z), 2, "kmeans", key=KEY)
    np.testing.assert_array_equal(np.sort(found.components[:, 1])[1:], Z[150:151, 1])


@pytest.mark.parametrize("method", ["snmf", "kmeans", "pca"])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((N + 5, D), r"gave \(45, 24\) for the 50 rows from 256 on; expected \(50, 24\)"),
        ((N, D + 1), r"gave \(\d+, 24\) for .* expected \(\d+, 25\)"),
        ((256 + 64 * 2, D), r"gave \(45, 24\) for the 64 rows from 256 on"),
    ],
    ids=["fewer", "narrower", "ended"],
)
def test_a_source_with_another_shape_than_it_reports(small_tiles, method, shape, message):
    with pytest.raises(ValueError, match=message):
        decompose_stored(Rows(planted(), shape), K, method, key=KEY)


def test_the_largest_scores_are_those_of_one_sort():
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 50, 1000).astype(np.float32)  # with ties: earlier rows come first
    largest = tiles.Largest(30)
    for start in range(0, 1000, 64):
        largest.add(start, scores[start : start + 64])
    np.testing.assert_array_equal(largest.numbers, np.argsort(-scores, kind="stable")[:30])
    none = tiles.Largest(0)
    none.add(0, scores)
    assert len(none.numbers) == 0


def test_rows_whose_squares_exceed_float32_are_left_as_they_are():
    X = np.full((4, 2), 1e19, np.float32)
    small = columns.Compressed(jnp.eye(2), X, X[:, 0], 0.0, jnp.zeros(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert columns.turn_to_axes(small) is small


def test_rows_are_turned_to_their_axes_in_place():
    rng = np.random.default_rng(5)
    X = columns._aligned(5000, 8)  # more than one block
    X[:] = rng.normal(size=X.shape) @ rng.normal(size=(8, 8))
    basis = np.linalg.qr(rng.normal(size=(D, 8)))[0].astype(np.float32)
    rows = X @ basis.T
    small = columns.Compressed(jnp.asarray(basis), X, np.sum(X**2, axis=1), 0.0, jnp.zeros(D))
    turned = columns.turn_to_axes(small)
    assert turned.X is X and jax.device_put(X).unsafe_buffer_pointer() == X.ctypes.data
    np.testing.assert_allclose(X @ np.asarray(turned.basis).T, rows, atol=1e-4)
    overlaps = X.T.astype(np.float64) @ X
    lengths = np.diagonal(overlaps)
    np.testing.assert_allclose(overlaps, np.diag(lengths), atol=1e-5 * lengths[0])
    assert np.all(np.diff(lengths) <= 0)


# Numbers per row: the columns, and the codes before and after an update, or the sums that decide
# which rows k-means revisits.
@pytest.mark.parametrize(
    ("solver", "numbers"),
    [(semi_nmf, 64 + 2 * 20 + 6), (kmeans_on_disk, 48 + 14)],
    ids=["snmf", "kmeans"],
)
def test_programs_for_the_columns_need_no_second_matrix_of_their_size(solver, numbers):
    N, K = 2**19, 20
    for program in phases.compiled(*solver.in_columns((N, 512), KEY, num_concepts=K)):
        memory = program.memory_analysis()
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
        # A few blocks of rows do not grow with N.
        assert needed <= 4 * N * numbers + 2**24


@pytest.mark.parametrize("solver", [semi_nmf, kmeans_on_disk], ids=["snmf", "kmeans"])
def test_programs_compiled_ahead_are_those_that_run(solver):
    plan, given, X = solver.in_columns((203, D), KEY, num_concepts=K)
    phases.compiled(plan, given, X)
    Z = jax.device_put(np.random.default_rng(6).normal(size=X.shape).astype(np.float32))
    with Compilations() as compilations:
        found = phases.watched(plan, given, Z, None, lambda standing: None)
    assert not compilations.names
    assert found.iterations[0] > 0
