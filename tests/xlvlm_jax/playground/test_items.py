"""Concepts and vectors of a run directory become sliders; those of another model do not."""

import dataclasses

import numpy as np
import pytest

from xlvlm_jax import steering
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.playground.answers import Answers
from xlvlm_jax.playground.edits import edits_of, settings_of
from xlvlm_jax.playground.items import find_items, read_vector, typical_activations
from xlvlm_jax.playground.settings import Slider

from .conftest import NORM


def test_a_run_shows_its_living_concepts_and_vectors(vlm, made):
    items = find_items(vlm, made.run)
    assert [item.id for item in items] == ["concepts/0", "concepts/1", "vectors/yes-no"]
    yes, _, vector = items
    assert yes.words == ("yes", "right") and yes.pictures == (str(made.picture),)
    assert {item.site for item in items} == {NORM}
    # By hand: concept 0 is active in both rows, with 2 and 4.
    stored = Concepts.load(made.run / "concepts").components
    np.testing.assert_allclose(yes.vector, 3 * stored[0], rtol=1e-6)
    difference = stored[1] - stored[0]
    assert vector.vector @ difference == pytest.approx(30, rel=1e-5)


def test_equal_names_get_ids_of_their_own(vlm, made):
    file = made.run / "steering" / "yes-no.safetensors"
    items = find_items(vlm, made.run, vectors=[file])
    assert len({item.id for item in items}) == len(items) == 4


def test_typical_activations_by_hand():
    codes = np.float32([[0, -1, 0], [4, 3, 0], [2, 0, 0]])
    concepts = Concepts(np.eye(3, dtype=np.float32), codes)
    assert typical_activations(concepts).tolist() == [3, 2, 1]
    similar = dataclasses.replace(concepts, method="kmeans")
    assert typical_activations(similar).tolist() == [1, 1, 1]
    unknown = dataclasses.replace(concepts, activations=None)
    assert typical_activations(unknown).tolist() == [1, 1, 1]


def test_vectors_of_other_models_are_refused(vlm, foreign, tmp_path):
    path = tmp_path / "other.safetensors"
    path.write_bytes(foreign)
    with pytest.raises(ValueError, match="fitted on 'another'"):
        find_items(vlm, vectors=[path])
    steering.SteeringVector(np.ones(7, np.float32), NORM).save(path)
    with pytest.raises(ValueError, match="has width 7; the states of this model at"):
        read_vector(vlm, path)


def test_vectors_of_samples_have_no_slider(vlm, tmp_path):
    made = steering.SampleVectors(np.ones((1, 192), np.float32), ("a",), NORM)
    made.save(tmp_path / "steering" / "samples.safetensors")
    with pytest.raises(ValueError, match="vectors of single samples"):
        read_vector(vlm, tmp_path / "steering" / "samples.safetensors")
    said = []
    assert find_items(vlm, tmp_path, tell=said.append) == []
    assert len(said) == 1 and "no slider" in said[0]


def test_vectors_of_several_sites_are_one_slider(vlm, tmp_path):
    sites = [f"language_model.model.layers.{i}" for i in (2, 5)]
    vectors = {site: np.full(192, i, np.float32) for i, site in enumerate(sites, start=1)}
    path = tmp_path / "heads.safetensors"
    steering.SiteVectors(vectors, where="generated").save(path)
    item = read_vector(vlm, path)
    assert item.site == ", ".join(sites) and item.vector is None
    assert Answers(vlm, [item], max_new_tokens=8).sites == vlm.layers
    (setting,) = settings_of(vlm, {item.id: item}, [Slider(item.id, 2.0, "all", None)])
    edits = edits_of(vlm, {}, [setting], vlm.layers)
    for i, site in enumerate(sites, start=1):
        steered = edits[site][-1](np.zeros((1, 192), np.float32))
        np.testing.assert_array_equal(steered, np.full((1, 192), 2 * i))
    steering.SiteVectors({sites[0]: np.ones(7, np.float32)}).save(path)
    with pytest.raises(ValueError, match="has width 7; the states of this model at"):
        read_vector(vlm, path)


def test_an_empty_run_is_refused(vlm, tmp_path):
    with pytest.raises(FileNotFoundError, match="no concepts"):
        find_items(vlm, tmp_path)
