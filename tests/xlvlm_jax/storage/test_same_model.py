"""Models are distinguished by their fingerprints."""

import dataclasses
import hashlib
import shutil
import warnings

import numpy as np
import pytest

from ports import checkpoint
from xlvlm_jax import Concepts, SteeringVector
from xlvlm_jax.cli.extract import _steering
from xlvlm_jax.demo import embedded
from xlvlm_jax.steering import SiteVectors, concept_vectors, shift_vectors
from xlvlm_jax.storage.same_model import (
    adapter_of,
    checkpoint_of,
    model_of,
    processor_of,
    require_model,
    with_adapter_of,
)


def test_the_description_of_a_model(vlm):
    expected = checkpoint.fingerprint(embedded.LLAVA)
    checkpoint_alone = {"model": embedded.LLAVA.name, "fingerprint": expected}
    assert checkpoint_of(vlm) == checkpoint_alone
    assert model_of(vlm) == checkpoint_alone | {"adapter": None, "adapter fingerprint": None}


def test_another_model_is_named_and_an_unknown_one_passes(vlm, three_words):
    source = {"model": "other", "fingerprint": "abc"}
    with pytest.raises(ValueError, match=r"states of 'other' \(abc\); .* is another model \(\w+\)"):
        require_model(source, vlm, "states of")
    require_model(model_of(vlm), vlm, "states of")
    require_model({}, vlm, "states of")
    require_model(source, three_words, "states of")  # a model without a checkpoint


def test_the_processor_of_another_checkpoint(vlm, tmp_path):
    assert processor_of(vlm) == {}
    other = shutil.copytree(embedded.LLAVA, tmp_path / "other")
    told = processor_of(vlm.with_processor(other))
    assert told.keys() == {"processor", "processor digest"} and told["processor"] == "other"
    assert processor_of(vlm.with_processor(other)) == told
    (other / "chat_template.jinja").write_text("changed")
    assert processor_of(vlm.with_processor(other))["processor digest"] != told["processor digest"]


def test_a_vector_that_was_fitted_again_is_another(tmp_path):
    """In the manifest of `extract --vector`, by which a run is resumed."""
    told = []
    for value in (1.0, 2.0, 1.0):
        SteeringVector(np.full(2, value, np.float32), "layers.3", {}).save(
            tmp_path / "v.safetensors"
        )
        told.append(_steering([tmp_path / "v.safetensors"], 1.0, None)["steering"])
    assert told[0] == told[2] != told[1]


class TestAdapter:
    @pytest.fixture(scope="class")
    def tuned(self, vlm):
        return vlm.with_adapter(embedded.ADAPTERS["color"])

    def test_is_recorded(self, vlm, tuned, tmp_path):
        weights = (embedded.ADAPTERS["color"] / "adapter_model.safetensors").read_bytes()
        digest = hashlib.sha256(weights).hexdigest()[:16]
        told = {"adapter": "color", "adapter fingerprint": digest}
        assert model_of(tuned) == checkpoint_of(tuned) | told
        copied = shutil.copytree(embedded.ADAPTERS["color"], tmp_path / "color")
        again = vlm.with_adapter(copied)
        assert adapter_of(again) == told
        shutil.copytree(embedded.ADAPTERS["mood"], copied, dirs_exist_ok=True)  # trained again
        assert adapter_of(again)["adapter fingerprint"] != digest

    def test_states_with_and_without_it_are_told_apart(self, vlm, tuned):
        require_model(model_of(tuned), tuned, "states of")
        with pytest.raises(
            ValueError,
            match=r"states of 'llava' with no adapter; the model is loaded with adapter 'color' "
            r"\(\w{16}\), load it without an adapter",
        ):
            require_model(model_of(vlm), tuned, "states of")
        with pytest.raises(ValueError, match=r"with adapter 'color' .* loaded with no adapter, lo"):
            require_model(model_of(tuned), vlm, "states of")
        mood = vlm.with_adapter(embedded.ADAPTERS["mood"])
        with pytest.raises(ValueError, match=r"adapter 'color' .* adapter 'mood'"):
            require_model(model_of(tuned), mood, "states of")

    def test_records_of_earlier_releases_pass(self, vlm, tuned):
        for model in (vlm, tuned):
            require_model(checkpoint_of(vlm), model, "states of")
            require_model({"adapter fingerprint": None}, model, "states of")  # of no known model
        assert with_adapter_of(checkpoint_of(vlm), model_of(tuned)) == model_of(tuned)
        assert with_adapter_of(model_of(vlm), model_of(tuned)) == model_of(vlm)

    def test_a_vector_of_another_adapter_warns(self, vlm, tuned):
        vector = SteeringVector(np.ones(192, np.float32), vlm.layers[2], model_of(vlm))
        said = "the steering vector was fitted on 'llava' with no adapter; the model is loaded"
        with pytest.warns(UserWarning, match=said):
            vector.edits_for(tuned, None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vector.edits_for(vlm, None)

    def test_vectors_of_different_adapters_are_not_mixed(self, vlm, tuned):
        base, other, old = (
            SteeringVector(np.ones(192, np.float32), f"layers.{i}", source)
            for i, source in enumerate([model_of(vlm), model_of(tuned), checkpoint_of(vlm)])
        )
        with pytest.raises(ValueError, match="cannot join vectors of models with no adapter and a"):
            SiteVectors.of([base, other])
        assert "adapter" not in SiteVectors.of([base, old]).source
        with pytest.raises(ValueError, match="cannot add vectors of models with no adapter and ad"):
            base + SteeringVector(base.vector, base.site, other.source)

    def test_vectors_of_concepts_and_shifts_keep_it(self, tuned):
        source = model_of(tuned)
        shifts = shift_vectors(np.ones((1, 4), np.float32), np.array([2]), "layers.3", source)
        concepts = Concepts.from_components(np.eye(4, dtype=np.float32))
        learnt = dataclasses.replace(concepts, source=source)
        for vectors in (shifts, concept_vectors(learnt, [0], site="layers.3")):
            (vector,) = vectors.values()
            assert source.items() <= vector.source.items()
