"""Training sequences of the embedded model, and training itself."""

import dataclasses
import re

import jax
import numpy as np
import pytest

import ports
from xlvlm_jax.data import prompts, scenes
from xlvlm_jax.demo import embedded
from xlvlm_jax.demo.embedded import blueprint, sequences, train
from xlvlm_jax.demo.embedded.sequences import Turn


def test_continuations_by_hand():
    """The prompt's last position predicts the first token of the answer, and so on to the end."""
    tokenizer = blueprint.make_tokenizer()
    turns = [Turn(prompts.question("What color is the dog?"), "red", weight=2.0)]
    rows = sequences.continuations(tokenizer, turns, count=2, length=28)
    shown = tokenizer.convert_ids_to_tokens(rows.input_ids[0])
    end = shown.index(":") + 1
    assert shown[:3] == ["<0x0A>", "What", "▁color"]
    assert shown[end] == "▁red"
    assert tokenizer.convert_ids_to_tokens(rows.target[0, end - 1 : end + 1]) == ["▁red", "</s>"]
    assert np.flatnonzero(rows.weight[0]).tolist() == [end - 1, end]
    assert rows.weight[1].sum() == 0


def test_a_prompt_that_does_not_fit_is_left_out():
    turns = [Turn("A " * 40, "yes"), Turn("Is it?", "no")]
    rows = sequences.continuations(blueprint.make_tokenizer(), turns, count=1, length=16)
    assert "Is" in "".join(blueprint.make_tokenizer().convert_ids_to_tokens(rows.input_ids[0]))


def test_the_text_is_that_of_the_chat_template(vlm):
    assert sequences.render("\nWhat?") == vlm.render("\nWhat?")


def test_continuations_see_what_single_prompts_see(vlm):
    """Logits after a shared picture equal those of a forward pass per prompt."""
    from PIL import Image

    scene = scenes.sample_scene("test", 5)
    picture = scenes.training_image(scene)
    turns = [Turn(prompts.CAPTION, "two red dogs"), Turn(prompts.question("Is it?"), "yes")]
    tokenizer = vlm.tokenizer
    rows = sequences.continuations(tokenizer, turns, count=2, length=28)
    pixels = train.normalise(picture[None])
    got = sequences.logits(
        vlm.module, vlm.params, sequences.prefix(tokenizer), pixels, rows.input_ids[None]
    )
    texts = [f"{vlm.render(t.prompt)} {t.answer}" for t in turns]
    for row, text in enumerate(texts):
        inputs = vlm.process([text], [Image.fromarray(picture)])
        np.testing.assert_allclose(inputs["pixel_values"], pixels, atol=1e-5)
        expected = np.asarray(vlm.forward(inputs).logits[0])
        first = len(sequences.prefix(tokenizer))
        count = len(expected) - first
        np.testing.assert_allclose(got[0, row, :count], expected[first:], atol=2e-4)


@pytest.mark.slow
def test_training_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """A run that is killed after two of four steps and resumed ends like an uninterrupted one."""
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    model, params, example = _tiny()

    def loss(params, batch):
        return train.answer_loss(*model, params, batch)

    def dying(rng, progress):
        if progress >= 0.5:
            raise KeyboardInterrupt
        return example(rng, progress)

    stage = train.Stage("whole", steps=4, batch=2, rate=1e-3, muon=True)
    logs: list[dict] = []
    whole = train.run_stage(stage, loss, params, example, tmp_path / "a", 0, logs.append)
    assert logs[-1]["step"] == 4
    with pytest.raises(KeyboardInterrupt):
        train.run_stage(stage, loss, params, dying, tmp_path / "b", 0, logs.append)
    again = train.run_stage(stage, loss, params, example, tmp_path / "b", 0, logs.append)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), whole, again)
    same = jax.tree.map(np.array_equal, whole, params)
    assert not all(jax.tree.leaves(same))


@pytest.mark.slow
def test_frozen_modules_stay_as_they_are(tmp_path):
    model, params, example = _tiny()

    def loss(params, batch):
        return train.answer_loss(*model, params, batch)

    stage = train.Stage("align", steps=1, batch=2, rate=1e-2, frozen=("vision_tower",))
    after = train.run_stage(stage, loss, params, example, tmp_path, 0, lambda figures: None)
    same = jax.tree.map(np.array_equal, after, params)
    assert all(jax.tree.leaves(same["vision_tower"]))
    assert not all(jax.tree.leaves(same["language_model"]))


def _tiny():
    """Returns the embedded model with two layers in each of its towers."""
    vlm = ports.load(embedded.LLAVA)
    config = vlm.module.config
    text, vision = (
        dataclasses.replace(each, num_layers=2) for each in (config.text, config.vision)
    )
    module = vlm.module.clone(config=dataclasses.replace(config, text=text, vision=vision))
    tokenizer = blueprint.make_tokenizer()
    pictures = train.Pictures(0)

    def example(rng, progress):
        return train.answer_example(pictures, tokenizer, rng, progress)

    return (module, sequences.prefix(tokenizer)), _without_layers(vlm.params), example


def _without_layers(params):
    """Returns the parameters without layers_2, layers_3 and so on."""
    if not isinstance(params, dict):
        return params
    kept = {name: each for name, each in params.items() if not re.match("layers_[2-9]", name)}
    return {name: _without_layers(each) for name, each in kept.items()}
