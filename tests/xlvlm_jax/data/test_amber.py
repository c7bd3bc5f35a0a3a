"""AMBER's questions: by hand, and messages."""

import json

import pytest

from xlvlm_jax import data

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
