"""Matrices as callers pass them, by type and dtype; everything else is refused."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.sparse
import tensorstore as ts

from xlvlm_jax.solvers import validation

Z = np.array([[1.5, -2.0], [3.0, 0.25]])


class Labelled:
    """Converts to numbers like xarray, dask and Zarr arrays."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


class Opened:
    """Returns a matrix per site, like `Features`."""

    def matrix(self, site):
        return Z


def numbers(given):
    found = validation.as_matrix(given, "Z", row="sample")
    assert isinstance(found, jnp.ndarray) or found.dtype.kind in "iu" or found.dtype == np.float64
    return np.asarray(found, np.float64)


@pytest.mark.parametrize("dtype", ["f2", ">f2", "f4", ">f4", "f8", ">f8", np.longdouble])
@pytest.mark.parametrize("kind", [np.asarray, Labelled, np.ndarray.tolist], ids=str)
def test_floats_of_every_size_and_byte_order(dtype, kind):
    np.testing.assert_array_equal(numbers(kind(Z.astype(dtype))), Z)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, "i4", ">i8", "u1"])
def test_other_numbers(dtype):
    whole = np.array([[1, 2], [3, 4]]).astype(dtype)
    np.testing.assert_array_equal(numbers(whole), [[1, 2], [3, 4]])
    assert numbers(jnp.asarray(np.array([[1, 2]], np.int32))).tolist() == [[1, 2]]


def test_integers_and_float64_keep_their_digits_until_they_are_centred():
    seconds = np.array([[1_700_000_001], [1_700_000_003]])
    wide = validation.as_matrix(seconds, "Z", row="sample")
    np.testing.assert_array_equal(validation.centred(wide, wide.mean(axis=0)), [[-1], [1]])


@pytest.mark.parametrize("dtype", ["u1", "i8", "f8"])
def test_blocks_are_centred_as_the_whole(dtype):
    """Each row has 400,000 numbers and is one block."""
    rows = np.random.default_rng(0).integers(0, 200, (3, 400_000)).astype(dtype)
    origin = rows.mean(axis=0)
    expected = (rows.astype(np.float64) - origin).astype(np.float32)
    np.testing.assert_array_equal(validation.centred(rows, origin), expected)
    np.testing.assert_array_equal(validation.narrow(rows), rows.astype(np.float32))
    np.testing.assert_allclose(validation.deviations(rows, origin), rows.std(axis=0), 1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("offset", [0, 16])
def test_only_aligned_memory_is_shared_and_only_on_request(dtype, offset):
    memory = np.zeros(640 + 128, np.uint8)
    first = -memory.ctypes.data % 64 + offset
    given = memory[first : first + 640].view(dtype).reshape(-1, 4)
    given[:] = np.arange(given.size).reshape(given.shape) % 100
    kept, shared = given.copy(), validation.as_matrix(given, "Z", row="sample", share=True)
    own = validation.as_matrix(given, "Z", row="sample")
    assert (shared.unsafe_buffer_pointer() == given.ctypes.data) == (offset == 0)
    np.testing.assert_array_equal(shared, kept)
    del shared
    given[:] = 0
    np.testing.assert_array_equal(own, kept)
    columns = validation.as_matrix(kept.T, "Z", row="sample", share=True)
    np.testing.assert_array_equal(columns, kept.T)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("N", "rows"), [(16, 16), (17, 24), (5, 16)])
def test_the_copy_has_the_rows_that_pad_it(dtype, N, rows):
    """So that `padded` has nothing left to do."""
    memory = np.zeros(4 * N * dtype(0).itemsize + 128, np.uint8)
    first = -memory.ctypes.data % 64
    given = memory[first : first + 4 * N * dtype(0).itemsize].view(dtype).reshape(N, 4)
    given[:] = np.arange(given.size).reshape(given.shape)
    for share in (True, False):
        found = validation.as_matrix(given, "Z", row="sample", share=share, pad=True)
        np.testing.assert_array_equal(found, validation.padded(jnp.asarray(given)))
        assert found.shape == (rows, 4) and validation.padded(found) is found
        is_shared = found.unsafe_buffer_pointer() == given.ctypes.data
        assert is_shared == (share and rows == N)


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "float16", "int64"])
def test_tensors_of_torch(name):
    torch = pytest.importorskip("torch")
    tensor = torch.tensor(Z).to(getattr(torch, name))
    np.testing.assert_array_equal(numbers(tensor), tensor.double().numpy())
    if tensor.is_floating_point():
        np.testing.assert_array_equal(numbers(tensor.T.requires_grad_()), tensor.double().T.numpy())


def test_tables_of_pandas():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(Z, columns=["a", "b"])
    np.testing.assert_array_equal(numbers(table), Z)
    np.testing.assert_array_equal(numbers(table.astype("Float64")), Z)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_an_array_of_tensorstore_is_read(dtype):
    spec = {"driver": "zarr3", "kvstore": "memory://"}
    array = ts.open(spec, create=True, dtype=ts.dtype(dtype), shape=[2, 2]).result()
    array[...] = Z.astype(array.dtype.numpy_dtype)
    assert not validation.is_stored(array)
    np.testing.assert_array_equal(numbers(array), Z)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "got NoneType: load it first"),
        ("states.npy", "got str: load it first"),
        (scipy.sparse.eye(3), r"got scipy\.dia_matrix: call its toarray\(\)"),
        (np.ma.masked_array(Z, Z > 2), "got numpy.MaskedArray: fill the masked values"),
        (Opened(), r"Opened: pass its matrix\(site\) or stored\(site\)"),
        ({"a": 1}, "got dict: "),
        ([[1.0, 2.0], [3.0]], "got list: numpy.asarray says: "),
    ],
    ids=["None", "path", "sparse", "masked", "features", "dict", "ragged"],
)
def test_what_is_not_an_array_is_named(given, message):
    with pytest.raises(TypeError, match="Z must be an array of numbers.*" + message) as caught:
        validation.as_matrix(given, "Z", row="sample")
    assert "\n" not in str(caught.value)


class Source:
    def __init__(self, shape, given):
        self.shape, self.given = shape, given

    def read(self, start, stop):
        return self.given


def test_a_source_with_another_shape_than_it_reports():
    assert validation.is_stored(Source((3, 2), Z))
    with pytest.raises(ValueError, match=r"gave \(2, 2\) for the 3 rows from 0 on; expected \(3,"):
        validation.read_rows(Source((3, 2), Z), None)
    np.testing.assert_array_equal(validation.read_rows(Source((2, 2), Z), None), Z)


def test_a_unit_only_where_squares_leave_float32():
    # Of [10, 2] numbers as large as `largest`.
    for largest in (1e-3, 1.0, 1e6):
        assert validation.unit_of(jnp.full((10, 2), largest), largest) == 1
    for largest in (1e-8, 1e12, 3e19):
        unit = validation.unit_of(jnp.full((10, 2), largest), largest)
        assert 1 <= largest / unit < 2 and np.log2(unit) % 1 == 0
    # One large number of many is not a reason.
    few = jnp.zeros((1000, 1000)).at[0, 0].set(2e6)
    assert validation.unit_of(few, 2e6) == 1


def test_the_root_mean_square_norm_by_hand():
    np.testing.assert_allclose(
        validation.root_mean_square(jnp.array([[3.0, 4.0], [0, 0]])), 12.5**0.5
    )


def test_weights_in_a_unit_of_their_own():
    weights, unit = validation.check_weights([3, 0, 12], 3)
    np.testing.assert_array_equal(weights, [3 / 8, 0, 12 / 8])
    assert unit == 8


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2], r"must have shape \(3,\), one number per row; got \(2,\)"),
        ([1, -2, 1], "finite numbers of at least zero; got -2.0 for row 1"),
        ([1, 2, np.nan], "finite numbers of at least zero; got nan for row 2"),
        ([0, 0, 0], "sample_weight is zero for all rows"),
    ],
)
def test_invalid_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        validation.check_weights(weights, 3)
