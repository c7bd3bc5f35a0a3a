"""POPE: answers as the authors' script reads them, scores by hand and against scikit-learn."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from xlvlm_jax import metrics


@pytest.mark.parametrize(
    ("answer", "official", "plain"),
    [
        ("Yes", "yes", "yes"),
        ("No", "no", "no"),
        ("", "yes", ""),
        ("Nope", "yes", "no"),
        ("None", "yes", "no"),
        ("There isn't any", "yes", "no"),
        ("I don\u2019t see one", "yes", "no"),
        ("It cannot be seen", "yes", "no"),
        ("False", "yes", "no"),
        ("NO", "yes", "no"),
        ("Not sure", "yes", "no"),
        ("not sure", "no", "no"),
        ("No!", "yes", "no"),
        ("**No**", "yes", "no"),
        ("no,there is none", "yes", "no"),
        ("No,No", "yes", "no"),
        ("No, there is not", "no", "no"),
        ("No\n", "yes", "no"),
        ("no\u00a0dog", "yes", "no"),
        ("The image shows a street. There is no dog.", "yes", "no"),
        ("At 3.30 there is no dog", "yes", "no"),
        ("No. Yes, actually.", "no", "no"),
        ("Yes, no doubt", "no", "yes"),
        ("Yes, the dog is not moving.", "no", "yes"),
        ("There is a dog.", "yes", "yes"),
        ("That is not true.", "no", "no"),
        ("That's not correct.", "no", "no"),
        ("That isn't correct! There is a cat.", "yes", "no"),
        ("There is indeed no dog.", "no", "no"),
        ("It is not true that there is a dog.", "no", "no"),
        ("None of this is correct", "yes", "no"),
        ("That is untrue", "yes", "no"),
        ("Indeed, yes, no doubt", "no", "yes"),
        ("That is correct. It does not move.", "yes", "yes"),
        ("True", "yes", "yes"),
        ("Indeed, there is a man without a hat.", "yes", "yes"),
        ("Indeed, the dog is not moving.", "no", "yes"),
        ("Indeed, there is not a dog.", "no", "no"),
        ("Indeed, I don\u2019t see one", "yes", "no"),
        ("That is correct, there isn't one.", "yes", "no"),
        ("There is indeed not a dog.", "no", "no"),
        ("There indeed isn't a dog.", "yes", "no"),
        ("There is not, indeed, a dog.", "no", "no"),
        ("There isn't a dog, that's true.", "yes", "no"),
        ("There isn't a dog and it is correct", "yes", "no"),
        ("It is not a cat, it is indeed a dog.", "no", "yes"),
        ("It is true that there is not a dog.", "no", "no"),
        ("It is true that the dog does not move.", "no", "yes"),
        ("It isn't moving, but it is true that there is a dog.", "yes", "yes"),
        ("There is a dog and that's correct, isn't it", "yes", "yes"),
        ("There is a dog, isn't there?", "yes", "yes"),
        ("The dog isn't there.", "yes", "no"),
        ("It is not incorrect.", "no", "yes"),
        ("That isn't false.", "yes", "yes"),
        ("False, there is not a dog.", "no", "no"),
        ("That is not true, it is false.", "no", "no"),
        ("?", "yes", ""),
        ("!!!! 1", "yes", ""),
        ("It is nowhere to be seen", "yes", "no"),
        ("Zero dogs are there", "yes", "no"),
        ("Nobody is there", "yes", "no"),
        ("A dog is absent", "yes", "no"),
        ("There isnt one", "yes", "no"),
        ("I cant see one", "yes", "no"),
        ("Indeed, there isnt one", "yes", "no"),
        ("There is a dog, isnt it?", "yes", "yes"),
        ("An ant is there, as I want", "yes", "yes"),
        ("There is n't a dog in the image", "yes", "no"),
        ("I do n\u2019t see one", "yes", "no"),
        ("Indeed, there is n't one", "yes", "no"),
        ("There is a dog, is n't it?", "yes", "yes"),
        ("Zero-calorie drink is on the table", "yes", "yes"),
        ("There is zero-calorie drink", "yes", "yes"),
        ("The zero is visible on the clock", "yes", "yes"),
        ("A zero was painted on the wall", "yes", "yes"),
        ("I see zero dogs", "yes", "no"),
        ("There are zero", "yes", "no"),
        ("A street. Zero.", "yes", "no"),
        ("Indeed, there are zero dogs", "yes", "no"),
        ("An absent-minded man is there", "yes", "yes"),
        ("Dogs are absent from it", "yes", "no"),
    ],
)
def test_how_answers_are_read(answer, official, plain):
    assert metrics.read_answer(answer) == official
    assert metrics.read_answer(answer, "plain") == plain


def test_by_hand():
    predictions = ["yes", "yes", "no", "no", "Nope"]
    labels = ["yes", "no", "yes", "no", "no"]
    assert metrics.pope(predictions, labels) == (2 / 5, 1 / 3, 1 / 2, 2 / 5, 3 / 5)
    assert metrics.pope(predictions, labels, "plain") == (3 / 5, 1 / 2, 1 / 2, 1 / 2, 2 / 5)
    # An answer that says nothing is wrong, whatever the label.
    assert metrics.pope(["", ""], ["yes", "no"], "plain")[0] == 0


def test_undefined_shares_are_nan():
    score = metrics.pope(["no", "no"], ["no", "no"])
    assert score.accuracy == 1 and score.yes_share == 0
    assert all(math.isnan(value) for value in (score.precision, score.recall, score.f1))


def test_f1_is_zero_without_a_right_yes():
    """It was undefined, so that draws without one did not count in its interval."""
    assert metrics.pope(["yes", "no"], ["no", "yes"]).f1 == 0
    assert metrics.pope(["no", "no"], ["no", "yes"]).f1 == 0
    counts = metrics.pope_counts(["yes", "no", "no"], ["yes", "yes", "yes"])
    interval = metrics.bootstrap(counts, list("abc"), metrics.pope_scores)["f1"]
    assert interval.low == 0


@given(st.lists(st.tuples(*[st.sampled_from(["yes", "no"])] * 2), min_size=1, max_size=20))
def test_against_scikit_learn(pairs):
    said, labels = zip(("yes", "yes"), *pairs, strict=True)
    score = metrics.pope(said, labels)
    named = {"pos_label": "yes"}
    assert score.accuracy == pytest.approx(accuracy_score(labels, said))
    assert score.precision == pytest.approx(precision_score(labels, said, **named))
    assert score.recall == pytest.approx(recall_score(labels, said, **named))
    assert score.f1 == pytest.approx(f1_score(labels, said, **named))


def test_labels_at_the_start_against_scikit_learn():
    answers = ["Yes, it is.", "There is no", "YES", "The image shows no", "I do not know", "no"]
    labels = ["yes", "no", "no", "no", "no", "yes"]
    # "The image shows" is 15 characters long; "not" holds "no".
    held = [True, True, False, False, True, False]
    score = metrics.label_at_start(answers, labels)
    assert score.accuracy == 0.5
    assert score.f1 == pytest.approx(f1_score([True] * 6, held))
    assert metrics.label_at_start(["maybe"], ["no"]) == (0, 0)
    with pytest.raises(ValueError, match="there are 1 answers and 0 labels"):
        metrics.label_at_start(["yes"], [])


@pytest.mark.wrong_types
def test_messages():
    with pytest.raises(ValueError, match="there are 2 answers and 1 labels"):
        metrics.pope(["yes", "no"], ["yes"])
    with pytest.raises(ValueError, match="a label is 'No'; expected 'yes' or 'no'"):
        metrics.pope(["yes"], ["No"])
    with pytest.raises(ValueError, match="protocol is 'mine'; expected 'official' or 'plain'"):
        metrics.pope(["yes"], ["no"], "mine")


def test_as_the_official_script():
    """Values that POPE's evaluate.py at 3df3ba1 prints for these answers."""
    forms = ["Yes", "No", "NO", "Nope", "", "I see a street. No dog is there."]
    forms += ["No, there is not.", "not sure", "Yes, no doubt", "There isn't any"]
    rng = random.Random(11)
    labels = [rng.choice(["yes", "no"]) for _ in range(300)]
    answers = [rng.choice(forms) if rng.random() < 0.5 else x.capitalize() for x in labels]
    assert metrics.pope(answers, labels) == pytest.approx(
        (
            0.7533333333333333,
            0.7430167597765364,
            0.8260869565217391,
            0.7823529411764706,
            0.5966666666666667,
        ),
        abs=1e-12,
    )
    counts = metrics.pope_counts(answers, labels).sum(0)
    assert counts.tolist() == [133 + 93, 133 + 46, 133, 133 + 28, 300]
