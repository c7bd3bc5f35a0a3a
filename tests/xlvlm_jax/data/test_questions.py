"""Questions from a file of lines: by hand, as POPE's own, and messages."""

import json

import pytest

from xlvlm_jax import data

LINES = [
    {"image": "a.jpg", "question": "Is there a dog?", "label": "yes", "type": "real"},
    {"image": "a.jpg", "question": "Is there a boat?", "label": "no", "type": "adversarial"},
    {"image": "sub/b.jpg", "question": "Is there a car?", "label": "no", "id": "b/1"},
]


@pytest.fixture
def written(tmp_path):
    def write(lines=LINES, name="questions.jsonl"):
        (tmp_path / name).write_text("\n\n".join(map(json.dumps, lines)) + "\n")
        return tmp_path

    return write


def test_by_hand(written):
    directory = written()
    first, second, third = data.load("questions", directory, prompt="{question} Answer.")
    assert (first.id, second.id, third.id) == ("1", "3", "b/1")  # numbers of lines
    assert third.image == directory / "sub" / "b.jpg" and third.image_id == "sub/b.jpg"
    assert first.prompt == "Is there a dog? Answer." and first.references == ("yes",) * 10
    kinds = [sample.metadata["negatives"] for sample in (first, second, third)]
    assert kinds == ["real", "adversarial", None]
    assert third.metadata["label"] == third.metadata["answer"] == "no"
    (chosen,) = data.load("questions", directory, "adversarial")
    assert chosen.id == "3"


def test_the_number_of_a_line_may_be_an_id(written):
    asked = {"image": "a.jpg", "question": "Is there a dog?", "label": "yes"}
    found = data.load("questions", written([asked | {"id": 3}, asked]))
    assert [sample.id for sample in found] == ["3", "line 3"]


def test_as_the_reader_of_pope(written):
    directory = written()
    lines = [{"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"}]
    (directory / "coco_pope_random.json").write_text("\n".join(map(json.dumps, lines)))
    (theirs,) = data.load("pope", directory, "random")
    ours = data.load("questions", directory)[0]
    assert (ours.prompt, ours.references, ours.image) == (
        theirs.prompt,
        theirs.references,
        theirs.image,
    )
    assert {*theirs.metadata} == {*ours.metadata}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has no questions"),
        ([LINES[0], {"image": "a.jpg"}], "line 3: key 'question' missing; it has image; expected"),
        ([LINES[0] | {"label": "Yes"}], "line 1: 'label' is 'Yes'; expected 'yes' or 'no'"),
        ([LINES[0] | {"type": 3}], "line 1: 'type' must be a string, got 3"),
        ([LINES[2], LINES[2]], "line 3: id b/1 is a duplicate"),
    ],
)
def test_bad_lines(written, lines, message):
    with pytest.raises(ValueError, match=message):
        data.load("questions", written(lines))


def test_bad_files(written, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"questions\.jsonl: no such file"):
        data.load("questions", tmp_path)
    with pytest.raises(ValueError, match="no questions of type 'val'; expected one of real, adv"):
        data.load("questions", written(), "val")
    (tmp_path / "questions.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        data.load("questions", tmp_path)
    (tmp_path / "questions.jsonl").write_bytes(b'{"image": "caf\xe9.jpg"}')
    with pytest.raises(ValueError, match=r"questions\.jsonl: byte 14: not UTF-8"):
        data.load("questions", tmp_path)


def test_types_that_are_offered_can_be_chosen(written):
    with pytest.raises(ValueError, match=r"expected one of real, adversarial, all$"):
        data.load("questions", written(), "None")
    with pytest.raises(ValueError, match=r"type 'real'; expected all: none has a type$"):
        data.load("questions", written(LINES[2:]), "real")


def test_only_a_line_feed_ends_a_line(tmp_path):
    """Strings in JSON may hold what Unicode ends lines with."""
    asked = "Is there\u2028a\u2029dog\x85?"
    line = json.dumps(LINES[0] | {"question": asked}, ensure_ascii=False)
    (tmp_path / "questions.jsonl").write_bytes(f"{line}\r\n\r\n{line}\r\n".encode())
    found = data.load("questions", tmp_path)
    assert [(each.id, each.metadata["question"]) for each in found] == [("1", asked), ("3", asked)]
