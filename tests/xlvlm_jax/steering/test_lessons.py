"""Counterparts by label: questions about one image that tell what is there from what is not."""

import dataclasses
from pathlib import Path

import pytest

from xlvlm_jax import steering
from xlvlm_jax.data.sample import Sample


def question(image: str, prompt: str, label: str | None) -> Sample:
    metadata = {} if label is None else {"label": label}
    return Sample(f"{image}/{prompt}", Path(image), image, prompt, ("",), metadata)


ASKED = [
    question("a", "dog?", "yes"),
    question("a", "car?", "no"),
    question("a", "bus?", "no"),
    question("a", "which colour?", None),
    question("b", "cat?", "yes"),
    question("b", "boat?", "no"),
    question("c", "tree?", "no"),
]


def test_by_hand():
    positive, negative = steering.contrast_labels(ASKED)
    assert positive == ["dog?", "bus?", "car?", "which colour?", "cat?", "boat?", "tree?"]
    assert negative == ["car?", "dog?", "dog?", "which colour?", "boat?", "cat?", "tree?"]


def test_counterparts_come_from_others_too():
    among = [*ASKED, question("c", "sky?", "yes")]
    assert steering.contrast_labels(ASKED[6:], among=among) == (["tree?"], ["sky?"])


def test_labels_exchanged_exchange_the_sides():
    two = [ASKED[4], ASKED[5]]
    other = {"yes": "no", "no": "yes"}
    turned = [question("b", each.prompt, other[each.metadata["label"]]) for each in two]
    assert steering.contrast_labels(turned) == steering.contrast_labels(two)
    positive, negative = steering.contrast_labels(two)
    assert positive == negative[::-1]


def test_no_counterpart():
    with pytest.raises(ValueError, match="no image has a question whose label is yes and one"):
        steering.contrast_labels([ASKED[3], ASKED[6]])


def test_images_without_an_id_are_told_apart_by_their_files():
    nameless = [dataclasses.replace(each, image_id="") for each in ASKED]
    assert steering.contrast_labels(nameless) == steering.contrast_labels(ASKED)


@pytest.mark.wrong_types  # a stand-in takes the place of Features
def test_prompts_about_images_without_an_id_are_contrasted_image_by_image(stored):
    rows = [("a.png", "dog?", "yes"), ("a.png", "car?", "no"), ("b.png", "cat?", "yes")]
    opened = stored(
        *(
            {"image": image, "image_id": None, "prompt": prompt, "prediction": said}
            for image, prompt, said in rows
        )
    )
    opened.path = "features"
    asked = steering.Request(opened, "s", ["yes"], ["no"], options={"contrast": "prompt"})
    found = steering.method_named("p2s").examples(asked)
    assert {sample.prompt: there for sample, there in zip(found[0], found[1], strict=True)} == {
        "dog?": "car?",  # about "b.png" there is no other prompt
        "car?": "car?",
    }


@pytest.mark.wrong_types  # a stand-in takes the place of Features
def test_l2s_learns_from_all_labelled_questions(stored):
    opened = stored(
        {"label": "yes", "prompt": "dog?"},
        {"label": "no", "prompt": "car?"},
        {"error": "unreadable"},
        {"prompt": "which colour?"},
    )
    method = steering.method_named("l2s")
    asked = steering.Request(opened, "site", options={"contrast": "label", "context_prompt": None})
    found = method.examples(asked)
    assert found.towards == ["dog?", "car?", "which colour?"]
    assert found.away == ["car?", "dog?", "which colour?"] and found.steered == 2
    with pytest.raises(ValueError, match="states 'mean' is over the tokens of a completion"):
        method.examples(
            steering.Request(opened, "site", options={"contrast": "label", "states": "mean"})
        )
