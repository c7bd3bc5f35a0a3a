"""Pieces of stored tensors, against the arrays themselves."""

import numpy as np
import pytest

from ports.checkpoint import fused, safetensors_io


@pytest.fixture
def stored(tmp_path):
    arrays = {"long": np.arange(21.0).reshape(7, 3), "short": np.arange(6.0).reshape(2, 3)}
    safetensors_io.write_file(tmp_path / "model.safetensors", arrays)
    return arrays, safetensors_io.open_directory(tmp_path)


def test_parts_of_a_tensor(stored):
    arrays, tensors = stored
    parts = fused.split(tensors["long"], 3, 1)
    assert [part.shape for part in parts] == [(3, 3), (1, 3), (3, 3)]
    assert parts[1].read().tolist() == [[9, 10, 11]]
    assert parts[2].read((1, 3)).tolist() == arrays["long"][5:].tolist()
    assert (parts[0].dtype, parts[0].file) == (np.float64, tensors["long"].file)


def test_a_part_beyond_the_end_has_no_rows(stored):
    assert [part.shape[0] for part in fused.split(stored[1]["short"], 5)] == [5, 0]


def test_two_tensors_joined(stored):
    arrays, tensors = stored
    joined = fused.Joined(tensors["long"], tensors["short"])
    expected = np.concatenate([arrays["long"], arrays["short"]])
    assert (joined.shape, joined.dtype, joined.file) == ((9, 3), np.float64, tensors["long"].file)
    np.testing.assert_array_equal(joined.read(), expected)
    for first in range(9):
        for end in range(first + 1, 10):
            np.testing.assert_array_equal(joined.read((first, end)), expected[first:end])
