"""Counts of XL-VLMs: types of answers by a dictionary, and the token of interest."""

import json
from pathlib import Path

import pytest

from xlvlm_jax import evaluation
from xlvlm_jax.data.sample import Sample

LISTED = {
    "answer_type": {"yes/no": ["yes", "no"], "number": ["2", "2", "red"], "other": ["red", "2"]},
    "question_type": {"how many": ["2"], "what color is the": ["red"], "is the": ["yes", "red"]},
}


@pytest.fixture
def types(tmp_path):
    (tmp_path / "types.json").write_text(json.dumps(LISTED))
    return evaluation.read_types(tmp_path / "types.json")


def test_a_dictionary_by_hand(types):
    # The type that lists an answer most often; of equals, the first.
    assert types["answer_type"] == {"yes": "yes/no", "no": "yes/no", "2": "number", "red": "number"}
    assert types["question_type"]["red"] == "what color is the"
    counts = evaluation.count_listed_types(["Yes.", "two", "7", "a horse", "Yes"], types)
    assert counts == {
        "answer_type": {"yes/no": 2, "number": 2, "unrecognized": 1},
        "question_type": {"is the": 2, "unrecognized": 2, "how many": 1},
    }


def test_the_token_of_interest_by_hand():
    def asked(kind):
        return Sample("1", Path("x"), "1", "?", ("yes",) * 10, {"answer_type": kind})

    samples = [asked("yes/no"), asked("yes/no"), asked("number")]
    scores = evaluation.token_of_interest_accuracy(samples, ["No.", "yes", "2"], "no")
    assert scores == pytest.approx({"yes/no": 1 / 6, "number": 0, "overall": 1 / 12})
    task = evaluation.Questions(("yes",), ("no",), types=None)
    counts = task.measure(samples, ["yes"] * 3, ["No.", "yes", "2"])["XL-VLMs counts"]
    assert counts["token_of_interest_accuracy"] == scores


def test_counts_are_stored(types):
    samples = [Sample("1", Path("x"), "1", "?", ("2",) * 10, {"answer": "2"})]
    measured = evaluation.Questions(types=types).measure(samples, ["2"], ["2"])
    assert measured["listed types"]["question_type"] == {"how many": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"answer_type": {}}, "key 'question_type' missing"),
        ({"answer_type": {"other": "red"}}, "answer_type: 'other' must be a list of answers"),
    ],
)
def test_messages(tmp_path, content, message):
    (tmp_path / "types.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        evaluation.read_types(tmp_path / "types.json")
