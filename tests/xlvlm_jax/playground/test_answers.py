"""Answers without and with steering are those of `generate`; moving a slider compiles nothing."""

import numpy as np
import pytest

from ports import VLM, passes
from ports.decoding import stream
from xlvlm_jax.concepts.picture_maps import map_pictures
from xlvlm_jax.data import prompts
from xlvlm_jax.playground.answers import Answers
from xlvlm_jax.playground.items import find_items
from xlvlm_jax.playground.settings import Settings, Slider

from .conftest import NORM


def asked(picture, question, *sliders, instruction=None):
    return Settings(picture.id, question, sliders, instruction)


def last(events, run):
    (text,) = [e["text"] for e in events if e.get("run") == run and e.get("done")]
    return text


def last_logits(vlm, picture, prompt):
    inputs = vlm.process([vlm.render(prompt)], [str(picture.path)])
    states = vlm.states(inputs, sites=[NORM])[NORM]  # as maps do
    return np.asarray(vlm.unembed(states[0, -1]))


def test_the_vector_turns_yes_into_no(answers, picture, made, vlm):
    slider = Slider("vectors/yes-no", 1.0, None, None)
    events = list(answers.answer(asked(picture, made.question, slider), picture))
    assert (last(events, "plain"), last(events, "steered")) == ("yes", "no")
    # The words that moved most, with the probabilities of a plain forward pass.
    (words,) = [event["words"] for event in events if "words" in event]
    found = {word["word"]: word for word in words}
    assert found["no"]["after"] > 0.5 > found["no"]["before"]
    logits = last_logits(vlm, picture, made.question)
    (yes,) = vlm.tokenizer.encode("yes", add_special_tokens=False)
    expected = np.exp(logits[yes] - logits.max()) / np.exp(logits - logits.max()).sum()
    assert found["yes"]["before"] == pytest.approx(expected, rel=1e-4)
    assert all(abs(word["after"] - word["before"]) >= 0.0005 for word in words)
    assert "seconds" in events[-1]


def test_unsteered_answers_are_computed_once(answers, picture, made, monkeypatch):
    list(answers.answer(asked(picture, made.question), picture))
    monkeypatch.setattr(stream, "begin", None)
    events = list(answers.answer(asked(picture, made.question), picture))
    assert [event.get("run") for event in events] == ["plain", None]


def test_the_instruction_is_asked_for_without_steering(answers, picture, made, vlm):
    told = "Answer no."
    events = list(answers.answer(asked(picture, made.question, instruction=told), picture))
    first = last_logits(vlm, picture, f"{made.question} {told}").argmax()
    assert last(events, "instructed").startswith(vlm.decode([first]).strip())


def test_moving_sliders_compiles_nothing(answers, picture, made):
    def sizes(*sliders):
        list(answers.answer(asked(picture, made.question, *sliders), picture))
        return stream.begin._cache_size(), stream.proceed._cache_size()

    layer = "language_model.model.layers.2"
    first = sizes(Slider("vectors/yes-no", 0.5, None, None))
    assert sizes(Slider("concepts/0", -3.0, "image", layer)) == first
    both = Slider("concepts/1", 1.0, "generated", None), Slider("vectors/yes-no", 0.1, None, layer)
    assert sizes(*both) == first


def test_after_preparing_questions_and_captions_compile_nothing(answers, pictures, picture, made):
    steps = list(answers.prepare(pictures.blank()))
    assert not any(steps)

    def sizes():
        programs = stream.begin, stream.proceed, passes.encode_images
        return [program._cache_size() for program in programs]

    before = sizes()
    caption = "Is anything else in it? " + prompts.CAPTION
    slider = Slider("concepts/1", 0.2, "image", "language_model.model.layers.1")
    for question in (made.question, "What is in the picture?", caption):
        list(answers.answer(asked(picture, question, slider), picture))
    assert sizes() == before


def test_the_vision_tower_runs_once_per_picture(vlm, made, pictures, picture, monkeypatch):
    fresh = Answers(vlm, find_items(vlm, made.run), max_new_tokens=8)
    other = pictures.add(pictures.blank().path.read_bytes(), "other.png")
    encoded, encode = [], VLM.encode_images
    monkeypatch.setattr(
        VLM, "encode_images", lambda vlm, inputs: encoded.append(1) or encode(vlm, inputs)
    )
    slider = Slider("vectors/yes-no", 1.0, None, None)
    for shown in (picture, other, picture):
        for question in (made.question, "What is in the picture?"):
            list(fresh.answer(asked(shown, question, slider), shown))
    assert len(encoded) == 2


def test_leaving_ends_the_work_between_two_tokens(answers, picture, made, monkeypatch):
    steps = []
    proceed = stream.proceed
    monkeypatch.setattr(stream, "proceed", lambda *a, **b: steps.append(1) or proceed(*a, **b))
    slider = Slider("concepts/1", 0.1, None, None)
    events = answers.answer(asked(picture, made.question, slider), picture)
    for event in events:
        if event.get("run") == "steered":
            break
    events.close()
    assert not steps


def test_a_map_is_that_of_the_command(answers, picture, made):
    from xlvlm_jax.data.sample import Sample

    item = answers.items["vectors/yes-no"]
    drawn = answers.map_of(item, picture, made.question)
    sample = Sample("a", picture.path, "a", made.question)
    found = map_pictures(answers.vlm, [sample], vectors={"v": (NORM, item.vector)})
    values = found.rows[0].maps[0]
    assert drawn["unit"] == "cosine" and drawn["overlay"].startswith("data:image/png;base64,")
    assert drawn["low"] == pytest.approx(min(0, values.min()))
    assert drawn["high"] == pytest.approx(max(0, values.max()))
    concept = answers.map_of(answers.items["concepts/0"], picture, made.question)
    assert concept["unit"] == "activation"


def test_logits_that_are_not_finite_are_said(answers, picture, made):
    slider = Slider("vectors/yes-no", 3e37, None, None)
    with pytest.raises(ValueError, match="logits are not finite; turn the sliders down"):
        list(answers.answer(asked(picture, made.question, slider), picture))
