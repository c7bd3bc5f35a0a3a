"""AMBER's questions and descriptions: by hand, and messages."""

import json

import pytest

from xlvlm_jax import data
from xlvlm_jax.data.amber import word_lists

QUERIES = {
    "existence": [{"id": 2, "image": "AMBER_1.jpg", "query": "Is there a cloud in this image?"}],
    "attribute": [{"id": 3, "image": "AMBER_1.jpg", "query": "Is the sky sunny?"}],
    "relation": [{"id": 4, "image": "AMBER_2.jpg", "query": "Is there direct contact?"}],
}
TRUTHS = [
    {"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["sun"]},
    {"id": 2, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 3, "type": "discriminative-attribute-state", "truth": "yes"},
    {"id": 4, "type": "relation", "truth": "no"},
]


@pytest.fixture
def amber(tmp_path):
    def write(queries=QUERIES, truths=TRUTHS):
        (tmp_path / "data" / "query").mkdir(parents=True, exist_ok=True)
        for name, listed in queries.items():
            path = tmp_path / "data" / "query" / f"query_discriminative-{name}.json"
            path.write_text(json.dumps(listed))
        described = [{"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."}]
        path = tmp_path / "data" / "query" / "query_generative.json"
        path.write_text(json.dumps(described))
        (tmp_path / "data" / "annotations.json").write_text(json.dumps(truths))
        return tmp_path

    return write


def test_questions_by_hand(amber):
    directory = amber()
    (sample,) = data.load("amber", directory, "existence", prompt="{question}")
    assert (sample.id, sample.image_id) == ("2", "AMBER_1")
    assert sample.image == directory / "AMBER_1.jpg"
    assert sample.prompt == "Is there a cloud in this image?"
    assert sample.references == ("no",) * 10
    assert sample.metadata["amber_type"] == "discriminative-hallucination"
    assert sample.metadata["label"] == "no"
    (directory / "image").mkdir()
    every = data.load("amber", directory, "all")
    assert [each.id for each in every] == ["2", "3", "4"]
    assert every[2].image == directory / "image" / "AMBER_2.jpg"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truths": TRUTHS[:1]}, r"annotations\.json: no annotation for id 2"),
        ({"truths": TRUTHS * 2}, r"annotations\.json: \[4\]: id 1 is a duplicate"),
        ({"truths": {"images": []}}, "expected a list, as in AMBER's annotations"),
        ({"queries": QUERIES | {"existence": QUERIES["existence"] * 2}}, r"\[1\]: id 2 is a dup"),
        (
            {"queries": QUERIES | {"existence": [{"question_id": 1, "text": "?"}]}},
            r"\[0\]: key 'id' missing; it has question_id, text; expected AMBER's queries",
        ),
        (
            {"queries": QUERIES | {"existence": [{"id": 1, "image": "a", "query": "Describe"}]}},
            "'truth' is .*; expected 'yes' or 'no', that of a question and not of a description",
        ),
    ],
)
def test_bad_files(amber, change, message):
    with pytest.raises(ValueError, match=message):
        data.load("amber", amber(**change))


def test_unknown_split(amber):
    with pytest.raises(ValueError, match="AMBER has no split 'val'; expected one of existence"):
        data.load("amber", amber(), "val")


def test_descriptions_by_hand(amber):
    (sample,) = data.load("amber", amber(), "generative")
    assert (sample.id, sample.prompt, sample.references) == ("1", "Describe this image.", ())
    assert sample.metadata["there"] == ("sky",) and sample.metadata["imagined"] == ("sun",)
    assert "label" not in sample.metadata


def test_bad_descriptions(amber):
    with pytest.raises(ValueError, match=r"\[0\]: 'type' is 'relation'; expected 'generative'"):
        data.load("amber", amber(truths=[TRUTHS[3] | {"id": 1}]), "generative")
    with pytest.raises(ValueError, match="'hallu' must be a list of strings"):
        data.load("amber", amber(truths=[TRUTHS[0] | {"hallu": [1]}]), "generative")


def test_word_lists(tmp_path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "relation.json"
    path.write_text('{"dog": ["puppy"], "sky": []}')
    with pytest.raises(FileNotFoundError, match=r"safe_words\.txt: no such file"):
        word_lists(tmp_path)
    (tmp_path / "data" / "safe_words.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"safe_words\.txt: byte 3: not UTF-8"):
        word_lists(tmp_path)
    (tmp_path / "data" / "safe_words.txt").write_text("orange \nlight\n\n", "utf-8-sig")
    lists = word_lists(tmp_path)
    assert lists.safe == ("orange", "light") and lists.words == {"dog", "puppy", "sky"}
    path.write_text('{"dog": "puppy"}')
    with pytest.raises(ValueError, match="expected an object of lists of words, as AMBER"):
        word_lists(tmp_path)
