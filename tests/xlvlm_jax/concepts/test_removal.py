"""Removing concepts one by one: against single passes of the model, and a direction it needs."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

import ports
from ports.inputs.patch_layout import PatchLayout
from xlvlm_jax import Concepts
from xlvlm_jax.concepts.explain import explain_picture
from xlvlm_jax.concepts.removal import answers_without, concept_directions, removal_effects
from xlvlm_jax.data import prompts, scenes
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.storage.same_model import model_of

SITE = "language_model.model.layers.5"
SCENE = scenes.Scene("dog", "red", 1, "beach", "happy", seed=3)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "dog.png"
    Image.fromarray(scenes.draw(SCENE)).save(path)
    return Sample("dog", path, "dog", prompts.question("What animal is it?"))


@pytest.fixture(scope="module")
def directions(vlm):
    """Nine random directions, the head's for "dog", and zero."""
    head = np.asarray(vlm.params["language_model"]["lm_head"]["kernel"])
    dog = vlm.tokenizer.encode("dog", add_special_tokens=False)[-1]
    random = np.random.default_rng(0).normal(size=(9, 192))
    return np.float32([*random, head[:, dog], 0 * head[:, dog]])


def test_effects_are_those_of_single_passes(vlm, sample, directions):
    value, effects = removal_effects(vlm, sample, "dog", SITE, directions)
    text = f"{vlm.render(sample.prompt)} dog"
    inputs = vlm.process([text], [Image.open(sample.image)])
    dog = inputs["input_ids"][0, -1]

    def scored(edits):
        logits = np.asarray(vlm.forward(inputs, edits=edits).logits[0, -2], np.float64)
        return logits[dog] - np.log(np.exp(logits).sum())

    assert value == pytest.approx(scored({}), abs=1e-4)
    for k in (0, 8, 9):
        expected = scored({SITE: ports.ablate(directions[k])}) - value
        assert effects[k] == pytest.approx(expected, abs=2e-4)
    assert effects[10] == pytest.approx(0, abs=1e-6)
    # The model is sure of its answer, and only the direction of the word itself makes it less so.
    assert effects[9] < -0.01 and effects[9] < 20 * effects[:9].min()


def test_answers_are_those_of_single_generations(vlm, sample, directions):
    found = answers_without(vlm, sample, SITE, directions[[0, 9]], max_new_tokens=4)
    inputs = vlm.process([vlm.render(sample.prompt)], [Image.open(sample.image)])
    for text, k in zip(found, (0, 9), strict=True):
        edits = {SITE: ports.ablate(directions[k])}
        tokens = vlm.generate(inputs, max_new_tokens=4, edits=edits).tokens
        assert text == vlm.decode(tokens)[0].strip()


def test_what_is_removed():
    atoms = np.float32([[1, 0], [0, 2]])
    np.testing.assert_array_equal(concept_directions(Concepts(atoms)), atoms)
    centred = concept_directions(Concepts(atoms, method="kmeans"))
    np.testing.assert_array_equal(centred, [[0.5, -1], [-0.5, 1]])
    with pytest.raises(ValueError, match="a single centroid of 'kmeans' has no direction"):
        concept_directions(Concepts(atoms[:1], method="kmeans"))


def test_a_single_centroid_is_refused_before_the_model_answers(vlm, sample, monkeypatch):
    monkeypatch.setattr(type(vlm), "generate", None)
    source = {"site": SITE, **model_of(vlm)}
    centroid = Concepts.from_components(np.ones((1, 192), np.float32), "kmeans")
    centroid = dataclasses.replace(centroid, words=[["a"]], source=source)
    with pytest.raises(ValueError, match="a single centroid of 'kmeans' has no direction"):
        explain_picture(vlm, centroid, sample)


def test_an_empty_answer(vlm, sample, directions):
    with pytest.raises(ValueError, match="the answer for sample dog is empty"):
        removal_effects(vlm, sample, " ", SITE, directions)


@pytest.fixture(scope="module")
def concepts(vlm, directions):
    words = [["a"], ["b"], ["dog"]]
    chosen = directions[[0, 1, 9]] / np.linalg.norm(directions[[0, 1, 9]], axis=1, keepdims=True)
    source = {"site": SITE, **model_of(vlm)}
    return Concepts(chosen, options={"alpha": 0.1}, words=words, source=source)


def test_an_answer_is_explained_by_activation_and_effect(vlm, sample, concepts):
    found = explain_picture(vlm, concepts, sample, num_concepts=1, max_new_tokens=4)
    assert found.prediction == "dog" and found.log_probability > -0.5
    by_number = {each.concept: each for each in found.concepts}
    assert by_number[2].words == ["dog"] and by_number[2].effect < -0.01
    assert by_number[2].map.shape == (8, 8) == found.layout.positions.shape
    activations = [each.activation for each in found.concepts]
    assert activations == sorted(activations, reverse=True)
    of_image = explain_picture(vlm, concepts, sample, of_image=True, max_new_tokens=4)
    for each in of_image.concepts:
        assert each.activation == pytest.approx(each.map.max())


def test_only_the_most_active_are_removed(vlm, sample, concepts, monkeypatch):
    every = explain_picture(vlm, concepts, sample, max_new_tokens=4)
    monkeypatch.setattr("xlvlm_jax.concepts.explain.MOST_REMOVED", 2)
    told = []
    found = explain_picture(
        vlm,
        concepts,
        sample,
        num_concepts=1,
        max_new_tokens=4,
        progress=lambda *at: told.append(at),
    )
    assert (found.num_removed, every.num_removed) == (2, 3) and told == [(2, 2)]
    effects = {each.concept: each.effect for each in every.concepts}
    assert {each.concept for each in found.concepts} <= {x.concept for x in every.concepts[:2]}
    for each in found.concepts:
        assert each.effect == pytest.approx(effects[each.concept], abs=1e-4)


def test_a_picture_without_cells(vlm, sample, concepts, monkeypatch):
    """Its concepts can only be those of the answer."""
    none = PatchLayout(np.zeros((0, 4), int), np.zeros((0, 4, 4)))
    monkeypatch.setattr("xlvlm_jax.concepts.explain.picture_layouts", lambda *_: [[none]])
    with pytest.raises(
        ValueError, match=r"dog\.png is so long that none of its cells is left; crop"
    ):
        explain_picture(vlm, concepts, sample, of_image=True)
    found = explain_picture(vlm, concepts, sample, max_new_tokens=4)
    assert {each.map.shape for each in found.concepts} == {(0, 4)}


def test_command_and_page(vlm, sample, concepts, tmp_path, xlvlm):
    concepts.save(tmp_path / "concepts")
    status, out, errors = xlvlm(
        *("explain", "embedded", sample.image, "--concepts", tmp_path / "concepts"),
        *("--prompt", sample.prompt, "--max-new-tokens", 4, "--output", tmp_path / "page.html"),
    )
    assert status == 0, errors
    assert "effect" in out and "without it" in out and ": dog" in out
    page = (tmp_path / "page.html").read_text()
    assert "Why “dog”" in page and page.count("<article") == 3
    assert page.count('class="map"') == 3 and "Without it:" in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"words": None}, [], "has no words; run `xlvlm ground` first"),
        ({"words": [[], [], []]}, [], "the concepts have no words; ground them first"),
        ({}, ["--site", "layers.1"], f"the concepts are of site '{SITE}', not of"),
        ({"source": {"site": SITE, "fingerprint": "other", "model": "m"}}, [], "learnt on the sta"),
        ({"components": np.eye(3, dtype=np.float32)}, [], "192 columns but the concepts have 3"),
        ({}, ["--num-concepts", "0"], "--num-concepts must be at least 1, got 0"),
        ({}, ["--output", "page.gif"], "expected a file ending in .html, .png, .svg or .pdf"),
    ],
)
def test_messages(sample, concepts, tmp_path, xlvlm, change, options, message):
    known = {name: getattr(concepts, name) for name in ("components", "options", "words", "source")}
    Concepts(**(known | change)).save(tmp_path / "concepts")
    status, _, errors = xlvlm(
        *("explain", "embedded", sample.image, "--concepts", tmp_path / "concepts", *options)
    )
    assert status == 2 and message in " ".join(errors.split()), errors


def test_a_sample_without_features(concepts, tmp_path, xlvlm):
    concepts.save(tmp_path / "concepts")
    status, _, errors = xlvlm("explain", "embedded", "s1", "--concepts", tmp_path / "concepts")
    assert status == 2 and "does not name its features; give --features" in errors
    status, _, errors = xlvlm("explain", "embedded", "s1")
    assert status == 2 and "embedded is not a directory of concepts" in " ".join(errors.split())
