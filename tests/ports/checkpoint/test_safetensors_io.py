"""Reading and writing files, and the messages for damaged ones."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ports.checkpoint import safetensors_io

from .. import helpers

TENSORS = {
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "brain": np.arange(4).astype(ml_dtypes.bfloat16),
    "single": np.array([[0.5]], np.float32),
    "scalar": np.float32(2.5).reshape(()),
    "empty": np.zeros((0, 3), np.float32),
    "integers": np.array([1, -2], np.int64),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors_io.write_file(path, TENSORS)
    return path


def with_header(path, header, data=b"\0" * 8):
    """Writes a file with this header (an object for JSON, or bytes)."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def test_what_is_written_is_read(file):
    stored = safetensors_io.open_file(file)
    assert set(stored) == set(TENSORS)
    for name, value in TENSORS.items():
        got = stored[name].read()
        assert (got.shape, got.dtype) == (value.shape, value.dtype)
        np.testing.assert_array_equal(got, value)


def test_the_library_reads_what_is_written(file):
    theirs = safetensors.numpy.load_file(file)
    for name, value in TENSORS.items():
        np.testing.assert_array_equal(theirs[name], value)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_eight_bits_that_torch_writes(tmp_path, name):
    values = torch.arange(0, 120, dtype=torch.uint8).view(getattr(torch, name))  # no NaN
    safetensors.torch.save_file({"x": values}, tmp_path / "x")
    got = safetensors_io.open_file(tmp_path / "x")["x"].read()
    np.testing.assert_array_equal(got.astype(np.float32), values.float().numpy())


def test_transposed_tensors_are_written_in_their_own_order(tmp_path):
    value = np.arange(6.0, dtype=np.float32).reshape(2, 3).T
    safetensors_io.write_file(tmp_path / "t.safetensors", {"x": value})
    stored = safetensors_io.open_file(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(stored["x"].read(), value)


def test_a_write_that_fails_leaves_the_old_file(file):
    before = file.read_bytes()
    with pytest.raises(Exception, match=r"."):
        safetensors_io.write_file(file, {"x": np.array([object()])})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_every_truncation_is_noticed(file):
    whole = file.read_bytes()
    for length in (0, 7, 8, 40, len(whole) - 1):
        file.write_bytes(whole[:length])
        with helpers.raises_line(ValueError, str(file), "download the file again"):
            safetensors_io.open_file(file)


def test_a_file_that_shrinks_after_it_was_opened(file):
    tensor = safetensors_io.open_file(file)["half"]
    file.write_bytes(file.read_bytes()[: tensor.offset + 5])
    with helpers.raises_line(ValueError, str(file), "ends early"):
        tensor.read()


def test_a_dtype_without_a_reader_is_named(tmp_path):
    header = {"x": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}
    with helpers.raises_line(ValueError, "tensor 'x' has dtype 'F4'", "F32, F16, BF16"):
        safetensors_io.open_file(with_header(tmp_path / "x", header))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b"9" * 5_000,
        b"[]",
        b'"text"',
        b"{",
        {"x": 1},
        {"x": {}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 16]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"x": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2.0], "data_offsets": [0.0, 8.0]}},
        {"x": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}},
        {"x": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
        {"x\ny": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        b'{"x": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, Infinity]}}',
    ],
    ids=lambda header: str(header)[:60],
)
def test_invalid_headers_are_refused(tmp_path, header):
    file = with_header(tmp_path / "model.safetensors", header)
    with helpers.raises_line(ValueError, str(file), "not a valid safetensors header"):
        safetensors_io.open_file(file)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "x"]), inner
        )
    ),
    max_leaves=12,
)
_entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F99"]) | _json,
        "shape": st.lists(st.integers(-2, 9), max_size=3) | _json,
        "data_offsets": st.lists(st.integers(-9, 40), min_size=2, max_size=2) | _json,
    }
)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.binary(max_size=60)
    | _json.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.text(max_size=4), _entry | _json, max_size=3).map(
        lambda value: json.dumps(value).encode()
    ),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_garbage_gives_tensors_or_a_one_line_error(tmp_path, header, length):
    file = with_header(tmp_path / "model.safetensors", header)
    if length is not None:
        file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    try:
        for tensor in safetensors_io.open_directory(tmp_path).values():
            assert tensor.read().shape == tensor.shape
    except (ValueError, FileNotFoundError) as error:
        assert str(tmp_path) in str(error)
        assert "\n" not in str(error)


class TestDirectories:
    def write_shards(self, directory):
        for shard, names in {"a": ["half"], "b": ["brain", "scalar"]}.items():
            safetensors_io.write_file(
                directory / f"{shard}.safetensors", {name: TENSORS[name] for name in names}
            )
        index = {"half": "a.safetensors", "brain": "b.safetensors", "scalar": "b.safetensors"}
        self.write_index(directory, {"weight_map": index})

    def write_index(self, directory, index):
        text = index if isinstance(index, str) else json.dumps(index)
        (directory / "model.safetensors.index.json").write_text(text)

    def test_shards_are_one_model(self, tmp_path):
        self.write_shards(tmp_path)
        assert set(safetensors_io.open_directory(tmp_path)) == {"half", "brain", "scalar"}

    def test_a_single_file_counts_before_an_index(self, tmp_path):
        """As in transformers: the index may be of an earlier state of the directory."""
        self.write_shards(tmp_path)
        (tmp_path / "b.safetensors").unlink()
        safetensors_io.write_file(tmp_path / "model.safetensors", {"single": TENSORS["single"]})
        assert set(safetensors_io.open_directory(tmp_path)) == {"single"}

    def test_a_missing_shard_is_named(self, tmp_path):
        self.write_shards(tmp_path)
        (tmp_path / "b.safetensors").unlink()
        with helpers.raises_line(FileNotFoundError, f"{tmp_path} has no b.safetensors"):
            safetensors_io.open_directory(tmp_path)

    def test_a_directory_without_weights(self, tmp_path):
        with helpers.raises_line(FileNotFoundError, "has no model.safetensors", "convert them"):
            safetensors_io.open_directory(tmp_path)

    @pytest.mark.parametrize(
        "index",
        ["", "[" * 100_000, "[]", "{}", {"weight_map": []}, {"weight_map": {"x": ["a"]}}],
        ids=lambda index: str(index)[:30],
    )
    def test_an_invalid_index(self, tmp_path, index):
        self.write_index(tmp_path, index)
        with helpers.raises_line(ValueError, "expected a JSON object with a 'weight_map'"):
            safetensors_io.open_directory(tmp_path)

    @pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "a.bin", 5, None])
    def test_an_index_that_points_elsewhere(self, tmp_path, name):
        self.write_index(tmp_path, {"weight_map": {"x": name}})
        with helpers.raises_line(ValueError, f"got {name!r}; expected the name of a safetensors"):
            safetensors_io.open_directory(tmp_path)
