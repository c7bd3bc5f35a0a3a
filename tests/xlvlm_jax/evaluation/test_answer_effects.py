"""Scores, counts and changes of answers, by hand."""

from pathlib import Path

import pytest

from xlvlm_jax import evaluation
from xlvlm_jax.data.sample import Sample


def asked(number: int, answers: list[str], kind: str, answer: str | None = None) -> Sample:
    metadata = {"answer_type": kind, "answer": answer or (answers[0] if answers else None)}
    return Sample(str(number), Path("x"), str(number), "?", tuple(answers), metadata)


def test_scores_by_hand():
    samples = [
        asked(0, ["yes"] * 10, "yes/no"),
        asked(1, ["yes"] * 10, "yes/no"),
        asked(2, ["2"] * 2 + ["3"] * 8, "number"),
    ]
    scores = evaluation.vqa_scores(samples, ["Yes.", "no", "two"])
    assert scores["yes/no"] == pytest.approx((0.0, 0.5, 0.5, 2))
    assert scores["number"] == pytest.approx((0.6, 0.6, 2 / 3, 1))
    assert scores["all"] == pytest.approx((0.2, 1.6 / 3, 5 / 9, 3))
    assert scores[evaluation.MEAN_OVER_TYPES] == pytest.approx((0.3, 0.55, 7 / 12, 3))
    assert [scores["number"].by(name) for name in ("official", "normalised", "xl-vlms")] == list(
        scores["number"][:3]
    )
    assert scores["number"].reference == scores["number"].xl_vlms


def test_accuracy_without_a_type_and_by_type_of_question():
    samples = [asked(0, ["yes"] * 10, "yes/no"), asked(1, ["2"] * 10, "number")]
    samples += [asked(2, ["red"] * 10, "other"), asked(3, ["red"] * 10, "other")]
    for sample, kind in zip(samples, ["is", "how many", "what", "what"], strict=True):
        sample.metadata["question_type"] = kind
    answers = ["no", "2", "red", "blue"]
    scores = evaluation.vqa_scores(samples, answers, without="yes/no")
    assert scores["mean without yes/no"] == pytest.approx((0.75, 0.75, 0.75, 3))
    assert "mean without yes/no" not in evaluation.fall_of_others(scores, scores, "number")
    by_question = evaluation.question_type_scores(samples, answers)
    assert list(by_question) == ["what", "is", "how many"]
    assert by_question["what"] == pytest.approx((0.5, 0.5, 0.5, 2))
    assert evaluation.count_by_type(samples, answers) == {
        "yes/no": {"no": 1},
        "number": {"2": 1},
        "other": {"red": 1, "blue": 1},
    }


def test_counts_of_substrings_as_in_xl_vlms():
    samples = [asked(i, ["yes", "a yesterday"], "other") for i in range(3)] + [
        asked(3, ["red"], "other")
    ]
    before, after = ["Yes", "no", "red", "yes"], ["no ", "No", "snow", "not"]
    # "snow" and "not" hold "no"; "yesterday" holds "yes".
    counts = evaluation.substring_counts(samples, before, after, ["Yes"], ["no"])
    assert counts == (4, 3, 2, 3)


def test_changes_by_hand():
    before = ["yes", "Yes", "no", "red", "two", "yes"]
    after = ["no", "yes", "no", "no", "two", "maybe"]
    truths = ["yes", "yes", "no", "yes", None, "no"]
    changes = evaluation.answer_changes(before, after, ["yes"], ["no"], truths)
    assert changes == evaluation.Changes(
        samples=6,
        changed=3,
        source_before=3,
        source_after=1,
        target_before=1,
        target_after=3,
        moved=1,
        gained=2,
        gained_from_source_truth=2,
        lost=2,
        lost_with_source_truth=1,
        others=2,
        others_changed=1,
    )
    assert changes.moved_share == pytest.approx(1 / 3)
    assert changes.others_changed_share == 0.5


def test_nothing_changes_without_steering():
    answers = ["yes", "no", "red"]
    changes = evaluation.answer_changes(answers, answers, ["yes"], ["no"], answers)
    assert changes.changed == changes.moved == changes.gained == changes.lost == 0
    assert changes.others_changed == 0


def test_counts_of_answers_and_of_their_types():
    answers = ["Yes.", "yes", "no", "Two", "2", "3.5", "a red dog", "none", ""]
    assert evaluation.count_answers(answers)["yes"] == 2
    assert evaluation.count_answers(answers)["2"] == 2
    assert list(evaluation.count_answers(["a b", "c", "c"])) == ["c", "b"]
    # "none" is how people say 0.
    assert evaluation.count_types(answers) == {"yes/no": 3, "number": 4, "other": 2}


def test_the_decrease_of_the_other_types():
    samples = [asked(0, ["yes"] * 10, "yes/no"), asked(1, ["3"] * 10, "number")]
    samples += [asked(2, ["red"] * 10, "other"), asked(3, ["blue"] * 10, "other")]
    before = evaluation.vqa_scores(samples, ["yes", "2", "red", "blue"])
    after = evaluation.vqa_scores(samples, ["no", "3", "red", "no"])
    falls = evaluation.fall_of_others(before, after, "yes/no")
    assert falls == pytest.approx({"number": -100, "other": 50})


def test_words_must_be_answers_of_the_data_set():
    samples = [asked(0, ["yes"] * 10, "yes/no"), asked(1, ["3"] * 10, "number")]
    assert evaluation.require_answers(samples, ["Yes"], ["three"]) == "yes/no"
    with pytest.raises(
        ValueError, match="words purple as its answer; choose frequent ones, such as yes, 3"
    ):
        evaluation.require_answers(samples, ["purple"], ["yes"])
    with pytest.raises(ValueError, match="none of 2 questions has one of the target words"):
        evaluation.require_answers(samples, ["yes"], ["purple"])


def test_messages():
    with pytest.raises(ValueError, match="1 answers before, 2 after and 2 truths"):
        evaluation.answer_changes(["a"], ["a", "b"], ["a"], ["b"], ["a", "b"])
    with pytest.raises(ValueError, match="both source and target"):
        evaluation.answer_changes(["a"], ["a"], ["Yes"], ["yes"], ["a"])
    with pytest.raises(ValueError, match="1 predictions for 0 samples"):
        evaluation.vqa_scores([], ["a"])
    with pytest.raises(ValueError, match="sample 3 has no answers"):
        evaluation.vqa_scores([asked(3, [], "other")], ["a"])


def test_too_few_answers_are_told(recwarn):
    evaluation.vqa_scores([asked(0, ["cat"] * 4, "other")], ["cat"])
    assert not recwarn.list
    for count, official in ((1, 0), (2, 1 / 3), (3, 2 / 3)):
        samples = [asked(0, ["cat"] * count, "other")]
        with pytest.warns(UserWarning, match=f"a question has {count} answer"):
            assert evaluation.vqa_scores(samples, ["cat"])["all"].official == pytest.approx(
                official
            )
