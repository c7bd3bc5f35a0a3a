"""Samples as tables: columns by hand, and one clear line without pandas."""

import sys
from pathlib import Path

import pytest

from xlvlm_jax import data
from xlvlm_jax.data.sample import Sample

SAMPLES = [
    Sample("a", Path("a.jpg"), "1", "Say.", ("x", "y"), {"attributes": {"colour": "red"}}),
    Sample("b", Path("b.jpg"), "2", "Say."),
]


def test_a_line_per_sample():
    pytest.importorskip("pandas")
    table = data.to_pandas(SAMPLES)
    assert list(table.columns) == [
        "id", "image", "image_id", "prompt", "references", "attributes.colour",
    ]  # fmt: skip
    assert table["id"].tolist() == ["a", "b"]
    assert table.loc[0, "references"] == ["x", "y"]
    assert table["attributes.colour"].isna().tolist() == [False, True]
    # What features keep of them makes the same table.
    assert data.to_pandas([sample.to_dict() for sample in SAMPLES]).equals(table)
    assert len(data.to_pandas([])) == 0


def test_without_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"needs pandas, .*; run `pip install .xlvlm-jax\[pandas\]'`$"
    ):
        data.to_pandas(SAMPLES)
