"""Two sets of parameters in one program, and the features that it computes."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import ports
from ports import paired
from ports.paired import check_alike, paired_states, share_params, with_like_heads
from xlvlm_jax import Features, data
from xlvlm_jax.data import scenes, select
from xlvlm_jax.demo import embedded
from xlvlm_jax.features import ExtractionSettings, extract
from xlvlm_jax.features.manifest import finetuned_site
from xlvlm_jax.features.selection import Selection

NORM, LAYER = "language_model.model.norm", "language_model.model.layers.4"
FIRST = "language_model.model.layers.0"
SETTINGS = ExtractionSettings(
    sites=(NORM,),
    selection=Selection("class", "dog,cat,bird,rabbit"),
    batch_size=8,
    max_new_tokens=12,
)


@pytest.fixture(scope="module")
def tuned():
    """Returns the model with its last four decoder layers changed by matrices of rank one."""
    vlm = ports.load(embedded.LLAVA)
    random = np.random.default_rng(0)

    def change(path, leaf):
        name = jax.tree_util.keystr(path)
        if "v_proj" in name and "language_model" in name and leaf.ndim == 2:
            low = random.normal(size=(leaf.shape[0], 1)) @ random.normal(size=(1, leaf.shape[1]))
            return leaf + 0.5 * float(leaf.std()) * low.astype(np.float32)
        return leaf

    vlm.params = jax.tree_util.tree_map_with_path(change, vlm.params)
    return vlm


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scenes")
    scenes.write(directory, train=24, seed=3)
    return data.load("coco", directory, "train")[:8]


@pytest.fixture(scope="module")
def inputs(vlm, samples):
    texts = [f"{vlm.render(sample.prompt)} {sample.references[0]}" for sample in samples]
    return vlm.process(texts, [Image.open(sample.image) for sample in samples])


def test_states_are_those_of_each_model_alone(vlm, tuned, inputs):
    pair = paired_states(vlm, vlm.params, tuned.params, inputs, [LAYER, NORM])
    for states, model in zip(pair, (vlm, tuned), strict=True):
        expected = model.states(inputs, sites=[LAYER, NORM])
        for site in (LAYER, NORM):
            assert states[site].shape == expected[site].shape
            scale = np.abs(expected[site]).max()
            real = inputs["attention_mask"].astype(bool)
            difference = np.abs(np.asarray(states[site]) - np.asarray(expected[site]))[real]
            assert difference.max() < 1e-5 * scale
    assert np.abs(pair[0][NORM] - pair[1][NORM]).max() > 0.1


def test_what_is_shared_is_held_and_computed_once(vlm, tuned, inputs, monkeypatch):
    shared = share_params(vlm.params, tuned.params)
    kept = [a is b for a, b in zip(*map(jax.tree.leaves, (vlm.params, shared)), strict=True)]
    assert kept.count(False) == 8  # the changed v_proj of eight layers
    costs, jitted = [], paired.states_of_pair

    def costed(module, distinct, arrays, *static, mesh):
        executable = jitted.lower(module, distinct, arrays, *static, mesh=mesh).compile()
        costs.append(executable.cost_analysis()["flops"])
        return executable(distinct, arrays)

    monkeypatch.setattr(paired, "states_of_pair", costed)
    for params in (vlm.params, shared):
        paired_states(vlm, vlm.params, params, inputs, [FIRST])
    one, both = costs  # a model beside itself costs as much as one alone
    assert one < both < 1.6 * one  # the images are encoded once


def test_a_model_of_another_shape_is_refused(vlm, inputs):
    other = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf[:3] if "lm_head" in jax.tree_util.keystr(path) else leaf, vlm.params
    )
    with pytest.raises(ValueError, match=r"lm_head\.kernel is \(3, \d+\), the original's \(\d+, "):
        paired_states(vlm, vlm.params, other, inputs, [NORM])
    with pytest.raises(ValueError, match="no site matches 'orm'"):
        paired_states(vlm, vlm.params, vlm.params, inputs, ["orm"])
    with pytest.raises(ValueError, match=r"lm_head\.\w+ is missing"):
        paired.check_alike(vlm.params, {k: v for k, v in vlm.params.items() if k == "vision_tower"})


def test_one_extraction_of_both_equals_one_of_each(vlm, tuned, samples, tmp_path):
    extract(vlm, samples, tmp_path / "both", SETTINGS, finetuned=tuned)
    extract(vlm, samples, tmp_path / "a", SETTINGS)
    extract(tuned, samples, tmp_path / "b", SETTINGS)
    both, a, b = (Features.open(tmp_path / name) for name in ("both", "a", "b"))
    common = [row for row, i in enumerate(a.sample_rows) if i in b.sample_rows]
    other = [row for row, i in enumerate(b.sample_rows) if i in a.sample_rows]
    assert both.sample_rows.tolist() == a.sample_rows[common].tolist() != []
    np.testing.assert_array_equal(both.tokens, a.tokens[common])
    np.testing.assert_allclose(both.matrix(NORM), a.matrix(NORM)[common], atol=1e-4)
    expected = b.matrix(NORM)[other]
    np.testing.assert_allclose(both.matrix(finetuned_site(NORM)), expected, atol=1e-4)
    assert [s["finetuned prediction"] for s in both.samples] == [s["prediction"] for s in b.samples]
    with pytest.raises(ValueError, match="started with other arguments"):
        extract(vlm, samples, tmp_path / "both", SETTINGS)


def test_both_read_the_same_caption_under_teacher_forcing(vlm, tuned, samples, tmp_path):
    words = [form for word in ("dog", "cat", "bird", "rabbit") for form in (word, f"{word}s")]
    settings = dataclasses.replace(
        SETTINGS, selection=Selection("class", ",".join(words)), mode="teacher-forcing"
    )
    leading = select.leading(samples, words)
    extract(vlm, leading, tmp_path / "both", settings, finetuned=tuned)
    both = Features.open(tmp_path / "both")
    assert set(both.sites) == {NORM, finetuned_site(NORM)}
    assert len(both.tokens) >= 4
    for row in range(2):
        sample = both.samples[both.sample_rows[row]]
        text = f"{vlm.render(sample['prompt'])} {sample['references'][0]}"
        inputs = vlm.process([text], [Image.open(sample["image"])])
        for model, site in ((vlm, NORM), (tuned, finetuned_site(NORM))):
            expected = model.states(inputs, sites=[NORM])[NORM][0, both.positions[row]]
            np.testing.assert_allclose(both.matrix(site)[row], expected, atol=1e-3)


def test_references_that_hold_a_word_come_first(samples):
    sample = dataclasses.replace(samples[0], references=("a pup", "two Dogs", "the dog", "dogma"))
    (found,) = select.leading([sample], ("dog", "dogs"))
    assert found.references == ("two Dogs", "the dog", "a pup", "dogma")
    assert select.leading([sample], "cat")[0].references == sample.references


def test_a_head_of_one_checkpoint_and_a_tied_one_of_the_other(vlm, tmp_path):
    """Fine-tuning may untie a head; everything else still matches."""
    shutil.copytree(vlm.directory, tmp_path / "tied")
    file = tmp_path / "tied" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    del tensors["language_model.lm_head.weight"]
    safetensors.numpy.save_file(tensors, file)
    config = json.loads((vlm.directory / "config.json").read_text())
    (tmp_path / "tied" / "config.json").write_text(
        json.dumps({**config, "tie_word_embeddings": True})
    )
    tied = ports.load(tmp_path / "tied")
    with pytest.raises(ValueError, match=r"lm_head\.kernel is .*, the original's missing"):
        check_alike(tied.params, vlm.params)
    original, finetuned = with_like_heads(tied, vlm)
    check_alike(original.params, finetuned.params)
    assert finetuned is vlm
    head = original.params["language_model"]["lm_head"]["kernel"]
    table = tied.params["language_model"]["model"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(head, table.T)
    assert with_like_heads(tied, tied) == (tied, tied)
