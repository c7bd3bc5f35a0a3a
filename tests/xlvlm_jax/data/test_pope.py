"""POPE's questions: by hand, and messages."""

import json

import pytest

from xlvlm_jax import data, evaluation

LINES = [
    {
        "question_id": 1,
        "image": "COCO_val2014_000000310196.jpg",
        "text": "Is there a snowboard in the image?",
        "label": "yes",
    },
    {"question_id": 2, "image": "scenes/a.png", "text": "Is there a dog?", "label": "no"},
]


def write(directory, lines=LINES, split="random"):
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (directory / f"coco_pope_{split}.json").write_text(text)


def test_questions_by_hand(tmp_path):
    write(tmp_path, split="popular")
    first, second = data.load("pope", tmp_path, "popular", prompt="{question} Say yes or no.")
    assert (first.id, first.image_id) == ("1", "310196")
    assert first.image == tmp_path / "val2014" / "COCO_val2014_000000310196.jpg"
    assert first.prompt == "Is there a snowboard in the image? Say yes or no."
    assert first.references == ("yes",) * 10 and first.metadata["label"] == "yes"
    assert second.image == tmp_path / "scenes/a.png"


def test_scores_of_both_protocols(tmp_path):
    write(tmp_path)
    samples = data.load("pope", tmp_path)
    measured = evaluation.Questions().measure(samples, ["yes", "no"], ["Yes.", "No!"])
    assert measured["POPE"]["official"]["accuracy"] == 0.5
    assert measured["POPE"]["plain"]["accuracy"] == 1
    assert measured["POPE"]["xl-vlms"] == {"accuracy": 1, "f1": 1}
    assert measured["scores"]["all"]["normalised"] == 1


def test_the_list_of_xl_vlms(tmp_path):
    ending = " Answer with just one word."
    listed = [
        {"filename": name, "instruction": f"{text}{ending}", "response": label, "subset": subset}
        for name, text, label, subset in [
            ("COCO_val2014_000000310196.jpg", "Is there a dog?", "yes", "random"),
            ("COCO_val2014_000000310196.jpg", "Is there a cat?", "no", "random"),
            ("b.jpg", "Is there a car?", "no", "popular"),
        ]
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(listed))
    given = {"questions": "annotations.json", "prompt": "{question}"}
    first, second = data.load("pope", tmp_path, "popular", **given)
    assert (first.prompt, first.metadata["label"]) == ("Is there a dog?", "yes")
    assert first.image == tmp_path / "images" / "COCO_val2014_000000310196.jpg"
    assert (second.id, second.prompt, second.references[0]) == ("2", "Is there a car?", "no")
    assert len(data.load("pope", tmp_path, "all", **given)) == 3
    del listed[1]["subset"]
    (tmp_path / "annotations.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"\[1\]: key 'subset' missing"):
        data.load("pope", tmp_path, **given)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{**LINES[0], "label": "No"}], "line 1: 'label' is 'No'; expected 'yes' or 'no'"),
        ([LINES[0]] * 2, "line 2: question_id 1 is a duplicate"),
        ([{"question_id": 1}], "line 1: key 'label' missing"),
        ([], "has no questions"),
    ],
)
def test_bad_files(tmp_path, lines, message):
    write(tmp_path, lines)
    with pytest.raises(ValueError, match=message):
        data.load("pope", tmp_path)


def test_messages(tmp_path):
    with pytest.raises(ValueError, match="POPE has no split 'train'; expected one of random, pop"):
        data.load("pope", tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="no such file; pass its name"):
        data.load("pope", tmp_path)
    (tmp_path / "coco_pope_random.json").write_text("{")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        data.load("pope", tmp_path)
