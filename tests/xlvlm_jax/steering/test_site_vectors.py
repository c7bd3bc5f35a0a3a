"""Vectors of several sites: by hand, on disk, against two vectors of the model, messages."""

import numpy as np
import pytest
import safetensors.numpy

from xlvlm_jax import evaluation, steering
from xlvlm_jax.steering import SiteVectors, SteeringVector

SOURCE = {"method": "coarse", "fingerprint": "f", "model": "m"}
FIRST = SteeringVector(np.float32([1, 2]), "layers.10", {**SOURCE, "norm": 1}, "generated")
SECOND = SteeringVector(np.float32([0, 3, 0]), "layers.9.heads", SOURCE, "generated")


def test_edits_by_hand():
    edits = SiteVectors.of([FIRST, SECOND]).edits(alpha=2.0, where="all")
    states = np.ones((1, 2), np.float32)
    np.testing.assert_array_equal(edits["layers.10"](states), [[3, 5]])
    np.testing.assert_array_equal(edits["layers.9.heads"](np.ones((1, 3), np.float32)), [[1, 7, 1]])


def test_what_all_say_is_kept():
    both = SiteVectors.of([FIRST, SECOND])
    assert (both.source, both.where) == (SOURCE, "generated")
    assert both.site == "layers.10, layers.9.heads"
    assert repr(both) == "SiteVectors(2 sites: layers.10, layers.9.heads)"
    np.testing.assert_array_equal(both.at("layers.10").vector, FIRST.vector)
    assert both.at("layers.9.heads").where == "generated"


def test_they_come_back_in_order(tmp_path):
    path = tmp_path / "deep" / "both.safetensors"
    SiteVectors.of([FIRST, SECOND]).save(path)
    assert set(safetensors.numpy.load_file(path)) == {"layers.10", "layers.9.heads"}
    for loaded in (SiteVectors.load(path), steering.load(path)):
        assert list(loaded.vectors) == ["layers.10", "layers.9.heads"]
        np.testing.assert_array_equal(loaded.vectors["layers.9.heads"], SECOND.vector)
        assert (loaded.source, loaded.where) == (SOURCE, "generated")
    with pytest.raises(ValueError, match=r"holds 'site vectors'; expected 'vector', use"):
        SteeringVector.load(path)
    SiteVectors({"layers.1": np.float32([np.nan, 1])}).save(path)
    with pytest.raises(ValueError, match=r"layers\.1 has NaN; fit it again"):
        steering.load(path)


def test_together_they_are_the_vectors_one_by_one(vlm):
    sites = [f"language_model.model.layers.{i}" for i in (2, 5)]
    drawn = np.random.default_rng(0).standard_normal((2, 192)).astype(np.float32)
    apart = [SteeringVector(v, site) for v, site in zip(drawn, sites, strict=True)]
    conditions = [evaluation.Condition(v, 2.0) for v in ((SiteVectors.of(apart),), tuple(apart))]
    one, other = (condition.edits(vlm, {}) for condition in conditions)
    assert list(one) == list(other) == sites
    states = np.ones((1, 3, 192), np.float32)
    for site in sites:
        np.testing.assert_array_equal(one[site][0](states), other[site][0](states))


def test_messages():
    with pytest.raises(ValueError, match=r"layers.10, layers.10 can't be joined; expected one"):
        SiteVectors.of([FIRST, FIRST])
    with pytest.raises(ValueError, match="the sites none can't be joined"):
        SiteVectors.of([])
    other = SteeringVector(FIRST.vector, "layers.1", {"fingerprint": "g"}, "generated")
    with pytest.raises(ValueError, match="of fingerprint f and g; expected the same"):
        SiteVectors.of([FIRST, other])
    with pytest.raises(ValueError, match=r"no vector for 'x'; expected one of layers\.10"):
        SiteVectors.of([FIRST]).at("x")
