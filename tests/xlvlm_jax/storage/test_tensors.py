"""Arrays as a safetensors file."""

import ast
from pathlib import Path

import hypothesis
import hypothesis.extra.numpy as drawn
import numpy as np
import pytest
from hypothesis import strategies
from safetensors import safe_open
from safetensors.numpy import load

import ports
import xlvlm_jax
from xlvlm_jax.storage.tensors import as_bytes, write, write_with_rows

Z = np.arange(12, dtype=np.float32).reshape(3, 4)


def test_rows_are_written_in_blocks(tmp_path):
    others = {"a": np.int32([[1, 2]]), "b": np.int64([3]), "empty": np.zeros((0, 2), "f4")}
    write_with_rows(tmp_path / "file", others, "rows", (3, 4), iter([Z[:2], Z[2:].T.T]))
    found, usual = load((tmp_path / "file").read_bytes()), load(as_bytes(others | {"rows": Z}))
    for name, array in usual.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_what_is_written_array_by_array_is_what_is_written_at_once(tmp_path):
    given = {
        "rows": Z.T,
        "flags": np.array([True, False, True]),
        "ids": np.int64([[1, -2]]),
        "few": np.int32([7])[::-1],
        "empty": np.zeros((0, 2), np.float32),
        "one": np.asarray(np.float32(3)),
    }
    write(tmp_path / "file", given, {"kind": "x"})
    usual = load(as_bytes(given))
    with safe_open(tmp_path / "file", "numpy") as file:
        assert file.metadata() == {"kind": "x"}
        assert set(file.keys()) == set(usual)
        for name, array in usual.items():
            np.testing.assert_array_equal(file.get_tensor(name), array, strict=True)


@pytest.mark.parametrize(
    "array",
    [Z, Z.T, Z[:, 1], Z[::-1], Z[::2, ::3], np.asfortranarray(Z), np.float32(3), np.zeros((0, 4))],
    ids=["plain", "transposed", "column", "reversed", "steps", "fortran", "scalar", "empty"],
)
def test_values_are_kept_whatever_their_order_in_memory(array):
    found = load(as_bytes({"a": array}))["a"]
    assert found.dtype == np.asarray(array).dtype
    assert found.tolist() == array.tolist()


@hypothesis.given(drawn.arrays(np.int32, drawn.array_shapes(max_dims=4)), strategies.booleans())
def test_axes_in_any_order(array, reverse):
    turned = array.transpose(np.random.default_rng(0).permutation(array.ndim))
    turned = turned[::-1] if reverse else turned
    np.testing.assert_array_equal(load(as_bytes({"a": turned}))["a"], turned)


def test_metadata_and_dtypes():
    content = as_bytes({"a": Z.astype(np.float16), "b": Z > 2}, {"kind": "test"})
    assert b'"kind":"test"' in content
    assert {name: str(each.dtype) for name, each in load(content).items()} == {
        "a": "float16",
        "b": "bool",
    }


def test_every_file_is_written_through_it():
    """Only two writers, which make arrays contiguous, call safetensors' own."""
    writers = {"ports/checkpoint/safetensors_io.py", "xlvlm_jax/storage/tensors.py"}
    root = Path(xlvlm_jax.__file__).parents[1]
    for package in (ports, xlvlm_jax):
        for file in Path(package.__file__).parent.rglob("*.py"):
            if str(file.relative_to(root)) in writers:
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module == "safetensors.numpy":
                    assert {each.name for each in node.names} <= {"load", "load_file"}, file
                elif isinstance(node, ast.ImportFrom) and node.module == "safetensors":
                    assert "numpy" not in {each.name for each in node.names}, file
                elif isinstance(node, ast.Import):
                    assert "safetensors.numpy" not in {each.name for each in node.names}, file
