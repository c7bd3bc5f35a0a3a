"""Files of overcomplete: its own values, what a state dict lacks, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from xlvlm_jax import sae
from xlvlm_jax.features.pth.writer import write_pth

DATA = Path(__file__).parents[2] / "data" / "overcomplete"
FILES = sorted(path for path in DATA.iterdir() if path.suffix in (".pt", ".pth"))


@pytest.fixture(scope="module")
def expected():
    with np.load(DATA / "expected.npz") as found:
        return dict(found)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_codes_and_reconstructions_are_those_of_overcomplete(file, expected):
    """Models after an update, when their dictionaries are not normalised yet, and in eval mode."""
    found = sae.load(file)
    for name, ours in (
        ("codes", found.encode(expected["states"])),
        ("states", found.reconstruct(expected["states"])),
        ("dictionary", found.components),
    ):
        theirs = expected[f"{file.stem}.{name}"]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    assert np.count_nonzero(expected[f"{file.stem}.codes"]) > 0


def test_pursuit_takes_negative_products(expected):
    """Where all are negative; SAELens' takes none."""
    assert (expected["pursuit-few.codes"] < 0).any()


def test_saved_ones_load_equal(expected, tmp_path):
    for name in ("pursuit-few.pth", "archetypal.pth", "batchtopk.pth"):
        before = sae.load(DATA / name)
        sae.save(before, tmp_path / name)
        after = sae.load(tmp_path / name)
        codes = np.asarray(before.encode(expected["states"]))
        np.testing.assert_allclose(
            after.encode(expected["states"]), codes, rtol=0, atol=1e-5 * np.abs(codes).max()
        )


def test_a_code_at_the_threshold_is_active(tmp_path):
    stored = {
        "thresholds": np.zeros(2, np.float32),  # their logarithms
        "encoder.final_block.0.weight": np.eye(2, dtype=np.float32),
        "encoder.final_block.0.bias": np.zeros(2, np.float32),
        "dictionary._weights": np.eye(2, dtype=np.float32),
        "dictionary.multiplier": np.float32(0),
    }
    write_pth(tmp_path / "a.pth", stored)
    (tmp_path / "a.json").write_text('{"class": "JumpSAE"}')
    states = np.float32([[1, 0.99], [2, -3]])
    assert sae.load(tmp_path / "a.pth").encode(states).tolist() == [[1, 0], [2, 0]]


def test_messages(tmp_path):
    def refused(match, name="topk", kind=ValueError, beside=None, **tensors):
        from xlvlm_jax.features.pth.reader import read_pth

        stored = {key: np.asarray(v) for key, v in read_pth(DATA / f"{name}.pth").items()} | tensors
        write_pth(tmp_path / "a.pth", {k: v for k, v in stored.items() if v is not None})
        values = json.loads((DATA / f"{name}.json").read_text()) if beside is None else beside
        (tmp_path / "a.json").write_text(json.dumps(values))
        with pytest.raises(kind, match=match) as raised:
            sae.load(tmp_path / "a.pth")
        assert "\n" not in str(raised.value) and "a.pth" in str(raised.value)

    refused("is a OMPSAE of overcomplete; expected one of SAE, TopKSAE", beside={"class": "OMPSAE"})
    refused("has no 'top_k', which a TopKSAE needs", beside={"class": "TopKSAE"})
    refused("k is 9; expected 1 to the 8 features", beside={"class": "TopKSAE", "top_k": 9})
    options = {"class": "TopKSAE", "top_k": 2, "normalization": "l3"}
    refused("normalization is 'l3'; expected one of l2", beside=options)
    refused("not finite", **{"encoder.final_block.0.bias": np.full(8, np.nan, np.float32)})
    deep = {"encoder.mlp_blocks.0.0.weight": np.eye(6, dtype=np.float32)}
    refused("its encoder is not linear", **deep)
    layer_norm = {"encoder.final_block.1.weight": np.ones(8, np.float32)}
    refused("its encoder is not linear", **layer_norm)
    before = {"encoder.final_block.0.weight": np.eye(6, dtype=np.float32)}
    refused("it encodes before the pursuit", "pursuit", **before)
    write_pth(tmp_path / "b.pth", {"weight": np.eye(2)})
    with pytest.raises(ValueError, match="neither a model of overcomplete nor its state dict"):
        sae.load(tmp_path / "b.pth")
    shutil.copy(DATA / "topk.pth", tmp_path / "c.pth")
    with pytest.raises(FileNotFoundError, match=r"state dict, .* write c\.json beside it, such as"):
        sae.load(tmp_path / "c.pth")
