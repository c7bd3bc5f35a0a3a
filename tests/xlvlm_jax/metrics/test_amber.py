"""AMBER's scores: by hand, against scikit-learn, and messages."""

import random

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from xlvlm_jax.metrics import amber

LABELS = ["yes", "yes", "no", "no", "no", "yes"]
ANSWERS = ["Yes", "yes", "No", "No.", "Yes", "No"]


def test_by_hand():
    # Only "Yes" and "No", exactly, are answers: numbers 1, 3, 5, and 6, of which 1 and 3 are right.
    accuracy, precision, recall, f1 = amber(ANSWERS, LABELS)
    assert (accuracy, precision, recall) == (2 / 6, 1 / 2, 1 / 3)
    assert f1 == pytest.approx(2 / 5)
    assert amber(ANSWERS, LABELS, "plain") == (4 / 6, 2 / 3, 2 / 3, 2 / 3)


def test_against_scikit_learn():
    rng = np.random.default_rng(0)
    said, labels = (rng.choice(["yes", "no"], 200).tolist() for _ in range(2))
    theirs = precision_recall_fscore_support(labels, said, pos_label="no", average="binary")[:3]
    ours = amber([each.capitalize() for each in said], labels)
    np.testing.assert_allclose(ours[1:], theirs)


def test_nothing_said():
    accuracy, precision, recall, f1 = amber(["maybe"], ["no"])
    assert (accuracy, recall, f1) == (0, 0, 0) and np.isnan(precision)
    assert np.isnan(amber(["maybe"], ["yes"]).f1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["Yes"], []), "there are 1 answers and 0 labels"),
        ((["Yes"], ["Yes"]), "a label is 'Yes'; expected 'yes' or 'no'"),
        ((["Yes"], ["yes"], "xl"), "protocol is 'xl'"),
    ],
)
@pytest.mark.wrong_types
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        amber(*arguments)


def test_as_the_official_script():
    """Values of AMBER's inference.py at 534babf on these answers, in percent to one digit."""
    forms = ["Yes", "No", "yes", "no", "Yes.", "No, there is not.", "", "YES", "No"]
    rng = random.Random(7)
    labels = [rng.choice(["yes", "no"]) for _ in range(240)]
    answers = [rng.choice(forms) if rng.random() < 0.4 else x.capitalize() for x in labels]
    script = [
        (slice(None), (63.3, 85.9, 64.0, 73.3)),
        (slice(0, None, 6), (67.5, 92.9, 59.1, 72.2)),  # existence
        (slice(1, None, 6), (62.5, 78.6, 68.7, 73.3)),  # state
        (slice(2, None, 6), (60.0, 92.3, 52.2, 66.7)),  # number
        (slice(3, None, 6), (67.5, 85.0, 85.0, 85.0)),  # action
    ]
    for rows, expected in script:
        # It rounds, takes F1 of rounded numbers, and adds 0.001 to denominators.
        ours = 100 * np.array(amber(answers[rows], labels[rows]))
        np.testing.assert_allclose(ours, expected, atol=0.1)
