"""Parts of fused layers and the tensors that checkpoints store them in."""

import numpy as np
import pytest

from ports import names


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setattr(names, "_FUSED", {})
    names.fuse("both", "right", "left")


@pytest.mark.parametrize(
    ("path", "stored", "name"),
    [
        (("layers_3", "both", "left", "kernel"), ("layers_3", "both", "kernel"), "both.weight"),
        (("layers_3", "both", "right", "bias"), ("layers_3", "both", "bias"), "both.bias"),
        # A layer that is fused elsewhere, a part's name below another layer, and others.
        (("layers_3", "both", "kernel"), ("layers_3", "both", "kernel"), "both.weight"),
        (
            ("layers_3", "one", "left", "kernel"),
            ("layers_3", "one", "left", "kernel"),
            "one.left.w",
        ),
        (("layers_3", "both", "up", "kernel"), ("layers_3", "both", "up", "kernel"), "both.up.w"),
    ],
)
def test_the_tensor_of_a_parameter(path, stored, name):
    assert names.stored_path(path) == stored
    assert names.tensor_name(path).startswith(f"layers.3.{name}")


def test_a_parameter_without_a_module():
    assert names.stored_path(("left",)) == ("left",) and names.parts_of("left") == ()


def test_parts_are_in_the_order_of_the_stored_rows():
    stored = np.arange(5)
    tree = {("norm", "scale"): "norm", ("both", "left", "kernel"): stored[2:]}
    tree |= {("both", "right", "kernel"): stored[:2], ("both", "left", "bias"): "alone"}
    grouped = names.by_tensor(tree)
    assert list(grouped) == [("norm", "scale"), ("both", "kernel"), ("both", "bias")]
    assert list(grouped["both", "kernel"]) == [
        ("both", "right", "kernel"),
        ("both", "left", "kernel"),
    ]
    joined = np.concatenate(list(grouped["both", "kernel"].values()))
    np.testing.assert_array_equal(joined, stored)
    assert {path: value for group in grouped.values() for path, value in group.items()} == tree
