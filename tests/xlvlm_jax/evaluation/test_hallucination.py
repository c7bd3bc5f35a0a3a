"""The hallucination bench: scores, paired tests and trials by hand, and what is refused."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from xlvlm_jax import evaluation
from xlvlm_jax.data import Sample
from xlvlm_jax.data.amber import WordLists
from xlvlm_jax.evaluation import (
    Captions,
    Condition,
    Descriptions,
    ObjectCaptions,
    Presence,
    Questions,
    hallucination,
    stage,
)


def question(number, label, negatives="random", **more) -> Sample:
    metadata = {"label": label, "answer": label, "answer_type": "yes/no", "negatives": negatives}
    return Sample(
        f"{negatives}/{number}",
        Path(f"{number}.jpg"),
        str(number),
        "?",
        (label,) * 10,
        metadata | more,
    )


def other(number, answer) -> Sample:
    metadata = {"answer": answer, "answer_type": "other"}
    return Sample(f"o{number}", Path(f"{number}.jpg"), str(number), "?", (answer,) * 10, metadata)


# Two pictures; of each a yes, a no of either kind, and another question.
SAMPLES = [
    *(question(1, "yes"), question(2, "yes")),
    *(question(1, "no"), question(2, "no")),
    *(question(1, "no", "popular"), question(2, "no", "popular")),
    *(other(1, "red"), other(2, "blue")),
]
PLAIN = ["yes", "yes", "yes", "no", "yes", "Yes.", "red", "blue"]
STEERED = ["yes", "no", "no", "NO", "no", "yes", "red", "blue"]


def test_presence_by_hand():
    measured = Presence().measure(SAMPLES, PLAIN, STEERED)
    # The official script reads "NO" as yes.
    assert measured["POPE"]["official"]["accuracy"] == 3 / 6
    assert measured["POPE"]["plain"]["accuracy"] == 4 / 6
    assert measured["POPE"]["plain"]["yes_share"] == 2 / 6
    assert measured["read differently"] == {"count": 1, "examples": ["NO"]}
    by = measured["POPE by negatives"]
    assert by["random"]["plain"]["accuracy"] == 3 / 4
    assert by["popular"]["plain"]["accuracy"] == 1 / 2
    assert measured["false yes"] == {"count": 1, "of": 4}
    assert measured["rest"]["accuracy"] == 3 / 4 and measured["rest"]["count"] == 4
    # Both pictures are drawn whole: three of four right, all, or half of the rest.
    assert measured["rest"]["interval"] == [0.5, 1.0]
    low, high = measured["POPE intervals"]["plain"]["accuracy"]
    assert low <= 4 / 6 <= high
    assert Presence().measure(SAMPLES, PLAIN, PLAIN)["false yes"] == {"count": 3, "of": 4}


ASKED = [
    question(1, "yes", question="Is there a dog in the image?"),
    question(2, "yes", question="Is there an airplane in the image?"),
    question(1, "no", question="Is there a hair drier in the image?"),
    question(2, "no", question="Is there a couch in the image?"),
]
DESCRIBED = [
    *("Two puppies on a beach.", "A sign."),
    *("A hair drier lies on the sand.", "A red sofa and a cup."),
]


def test_objects_of_descriptions_by_hand():
    """A puppy is a dog and a sofa a couch; the airplane is not named, the hair drier is absent."""
    task = evaluation.ObjectDescriptions()
    task.require(ASKED)
    shorter = ["A dog", "A plane", "Sand", "A couch"]
    measured = task.measure(ASKED, DESCRIBED, DESCRIBED)
    assert measured["false yes"] == {"count": 2, "of": 2}
    assert measured["rest"]["accuracy"] == 1 / 2
    assert (
        measured["POPE"]["plain"]["accuracy"] == measured["POPE"]["official"]["accuracy"] == 1 / 4
    )
    assert measured["words per description"] == (5 + 2 + 7 + 6) / 4
    assert task.judged(ASKED, DESCRIBED)["POPE, plain"] == [True, False, False, False]
    # One of two absent objects is no longer named, and one present object more is.
    trial = task.trial(ASKED, DESCRIBED, Condition(), shorter)
    assert (trial.effect, trial.cost) == (0.5, -50.0)


@pytest.mark.parametrize("asked", ["Is there a cloud in the image?", "What is in the image?", None])
def test_descriptions_need_questions_about_objects_of_coco(asked):
    samples = [question(1, "yes", question=asked), *ASKED]
    with pytest.raises(ValueError, match="expected a question of POPE about an object of COCO"):
        evaluation.ObjectDescriptions().require(samples)


def test_trials_of_presence_by_hand():
    trial = Presence().trial(SAMPLES, PLAIN, Condition(), STEERED)
    assert trial.effect == pytest.approx(2 / 3)  # three false yes, one left
    assert trial.cost == pytest.approx(100 / 4)  # one of four of the rest
    assert trial.off_target == 1 / 4
    good = ["yes", "yes", "no", "no", "no", "no", "red", "blue"]
    assert np.isnan(Presence().trial(SAMPLES, good, Condition(), STEERED).effect)


def test_paired_tests_by_hand():
    judged = {
        name: Presence().judged(SAMPLES, answers)
        for name, answers in {"plain": PLAIN, "a": STEERED, "instruction": PLAIN}.items()
    }
    assert judged["a"]["no false yes, plain"] == [True, True, True, False]
    assert judged["a"]["no false yes, official"] == [True, False, True, False]
    tests = hallucination.paired_tests(judged, ("plain", "instruction"))
    assert {(test["first"], test["second"]) for test in tests} == {
        *(("plain", "a"), ("plain", "instruction"), ("instruction", "a"))
    }
    by = {(t["first"], t["second"], t["what"]): (t["lost"], t["gained"]) for t in tests}
    assert by["plain", "a", "no false yes, plain"] == (0, 2)
    assert by["plain", "a", "POPE, plain"] == (1, 2)
    assert by["plain", "instruction", "answers"] == (0, 0)
    assert hallucination.paired_tests({"plain": judged["plain"]}, ("plain",)) == []


def test_copies_of_a_question_are_one_observation():
    """POPE's split `all` holds each question whose label is yes three times."""
    yes = [question(1, "yes", kind) for kind in ("random", "popular", "adversarial")]
    samples = [*yes, dataclasses.replace(question(1, "no"), prompt="??")]
    given = {"plain": ["no"] * 4, "steered": ["yes", "yes", "yes", "no"]}
    tests = stage._paired(Presence(), samples, given)["paired"]
    (found,) = (test for test in tests if test["what"] == "answers")
    assert (found["lost"], found["gained"], found["p_value"]) == (0, 1, 1)


def test_the_rest_may_be_unreadable():
    """Then its accuracy is undefined, and the others are still measured."""
    samples = [question(1, "no"), question(2, "no")]
    measured = Presence().measure(samples, ["yes", "no"], ["yes", "no"])
    assert measured["rest"] == {"accuracy": None, "interval": [None, None], "count": 0}
    assert measured["false yes"] == {"count": 1, "of": 2}


def test_questions_of_amber_have_their_own_score():
    samples = [question(i, label, amber_type="relation") for i, label in enumerate(("yes", "no"))]
    measured = Presence().measure(samples, ["Yes", "No"], ["Yes", "no"])
    assert measured["AMBER"]["official"]["accuracy"] == 0.5
    assert measured["AMBER"]["plain"]["accuracy"] == 1


def captioned(number, objects, *texts) -> Sample:
    metadata = {"objects": objects}
    return Sample(str(number), Path(f"{number}.jpg"), str(number), "?", texts, metadata)


def test_captions_by_hand():
    samples = [captioned(1, ["bus"], "a bus and a dog"), captioned(2, ["puppy"], "a dog")]
    plain = ["a bus and a dog near a boat", "a cat"]
    steered = ["a bus with a dog", "two dogs"]
    task = ObjectCaptions()
    measured = task.measure(samples, plain, plain)
    # A bus is none to the official script; the dog of the first picture is in people's caption.
    official, read = measured["CHAIR"]["official"], measured["CHAIR"]["plain"]
    assert official["chair_i"] == 2 / 3 and official["recall"] == 1 / 3
    assert read["chair_i"] == 2 / 4 and read["recall"] == 2 / 3
    assert official["chair_s"] == read["chair_s"] == 1
    assert official["length"] == read["length"] == 5
    assert measured["read differently"] == {"count": 1, "examples": [plain[0]]}
    assert measured["CHAIR intervals"]["plain"]["chair_s"] == [1, 1]
    trial = task.trial(samples, plain, Condition(), steered)
    assert trial.effect == 1 and trial.cost == pytest.approx(100 * (2 / 3 - 1))
    assert task.judged(samples, plain)["no absent object, plain"] == [False, False]
    assert task.judged(samples, steered)["no absent object, official"] == [True, True]


def described(number, there, imagined) -> Sample:
    metadata = {"there": there, "imagined": imagined}
    return Sample(str(number), Path(f"{number}.jpg"), str(number), "?", (), metadata)


def test_descriptions_by_hand(monkeypatch):
    task = Descriptions(lists=WordLists({"dog": ["puppy"], "sea": [], "boat": [], "sky": []}))
    monkeypatch.setattr(Descriptions, "protocols", ("plain",))
    samples = [described(1, ("dog", "sea"), ("boat",)), described(2, ("sky",), ("boat",))]
    plain = ["Puppies by the sea and a boat.", "A boat."]
    steered = ["A dog by the sea.", "The sky, a boat."]
    task.require(samples)
    measured = task.measure(samples, plain, plain)
    assert measured["AMBER"]["plain"] == {
        **{"chair": 2 / 4, "cover": 2 / 3, "hal": 1, "cog": 1, "length": 4.5}
    }
    assert measured["AMBER intervals"]["plain"]["hal"] == [1, 1]
    trial = task.trial(samples, plain, Condition(), steered)
    assert trial.effect == pytest.approx(1 - (1 / 4) / (2 / 4))
    assert trial.cost == pytest.approx(100 * (2 / 3 - 1)) and trial.off_target == 1
    assert task.judged(samples, steered) == {"nothing absent, plain": [True, False]}
    with pytest.raises(ValueError, match="expected AMBER's split 'generative'"):
        task.require([captioned(1, ["dog"])])


def test_captions_of_scenes_know_their_contents():
    task = ObjectCaptions(vocabulary="scenes")
    samples = [captioned(1, ["rabbit"], "a rabbit and a boat"), captioned(2, ["dog"], "a dog")]
    measured = task.measure(samples, [], ["a bunny near a boat", "a dog"])
    assert list(measured["CHAIR"]) == ["scenes"]
    # What people claim is not there for that.
    assert measured["CHAIR"]["scenes"]["chair_i"] == 1 / 3
    assert task.judged(samples, ["a bunny", "a car"]) == {"no absent object, scenes": [True, False]}


def test_the_bench_needs_what_it_measures():
    with pytest.raises(ValueError, match="no labels yes and no; --task pope needs questions of"):
        Presence().require([other(1, "red")])
    with pytest.raises(ValueError, match="no labels yes and no"):
        Presence().require([question(1, "no")])
    Presence().require(SAMPLES)
    with pytest.raises(ValueError, match="objects in the pictures are unknown; --task chair needs"):
        ObjectCaptions().require([other(1, "red")])
    with pytest.raises(ValueError, match="'lion' is not an object of COCO"):
        evaluation.chair_figures([captioned(1, ["lion"])], ["a lion"])


def test_descriptions_are_refused_before_a_model_has_written_them(monkeypatch):
    monkeypatch.setattr(Descriptions, "protocols", ("plain",))
    task = Descriptions(lists=WordLists({"dog": []}))
    task.require([described(1, ("dog",), ())])
    with pytest.raises(ValueError, match="'lion' is not in AMBER's list of words"):
        task.require([described(1, ("dog",), ()), described(2, ("lion",), ())])

    def no_data(_):
        raise ValueError("nltk has no data")

    monkeypatch.setattr(hallucination, "nltk_nouns", no_data)
    monkeypatch.setattr(Descriptions, "protocols", ("plain", "official"))
    with pytest.raises(ValueError, match="nltk has no data"):
        task.require([described(1, ("dog",), ())])
    task.require_trial([described(1, ("dog",), ())])  # by the plain protocol
    with pytest.raises(ValueError, match="'lion' is not in AMBER's list of words"):
        task.require_trial([described(1, ("lion",), ())])


def test_what_only_fails_is_found_before_answers(monkeypatch):
    captions = [captioned(1, ["dog"], "a dog"), captioned(2, ["cat"])]
    for task in (Captions(), ObjectCaptions()):
        with pytest.raises(ValueError, match="image number 1 has no references"):
            task.require(captions)
    with pytest.raises(ValueError, match="no words to choose by"):
        Captions().require_trial(captions[:1])
    with pytest.raises(ValueError, match="have no references, which the cost of steering"):
        Captions(("dog",)).require_trial(captions[1:])
    ObjectCaptions().require_trial(captions)  # CHAIR needs no references
    with pytest.raises(ValueError, match="objects in the pictures are unknown"):
        ObjectCaptions().require_trial(SAMPLES[:1])
    with pytest.raises(ValueError, match="no answers to choose by; give --source"):
        Questions().require_trial(SAMPLES)
    Presence(("zebra",), ("gnu",), without="yesno").require_trial(SAMPLES)
    with pytest.raises(ValueError, match="no labels yes and no"):
        Presence().require_trial(SAMPLES[-2:])
    with pytest.raises(ValueError, match="expected a question of POPE about an object of COCO"):
        evaluation.ObjectDescriptions().require_trial(SAMPLES)
    Questions(("yes",), ("no",), without="yesno").require_trial(SAMPLES)
    with pytest.raises(ValueError, match=r"type 'yesno'; expected one of .*yes/no"):
        Questions(without="yesno").require(SAMPLES)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pycocoevalcap, which is not installed"):
        Captions().require(captions[:1])
    ObjectCaptions().require_trial(captions)


@pytest.mark.parametrize("word", ["", "A", ","])
def test_words_that_are_empty_once_normalised(word):
    with pytest.raises(ValueError, match=r"the target word .* is empty once normalised"):
        Questions(("yes",), ("no", word))
    # An empty answer is neither a source nor a target answer.
    changes = evaluation.answer_changes(["yes", ""], ["", "yes"], ["yes"], [word], [None, None])
    assert (changes.target_after, changes.moved, changes.others) == (0, 0, 1)


def test_each_task_says_what_it_needs():
    samples = [captioned(1, ["dog"])]
    with pytest.raises(ValueError, match="no labels yes and no; --task descriptions needs POPE's"):
        evaluation.ObjectDescriptions().require(samples)
    with pytest.raises(ValueError, match="--task pope needs questions of --dataset pope, amber"):
        Presence().require(samples)
