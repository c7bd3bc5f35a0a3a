"""VQA accuracy: by hand, against the official script and XL-VLMs, properties, messages."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlvlm_jax import metrics
from xlvlm_jax.metrics.vqa import PROTOCOLS

# What both programs gave for made-up answers; its first line says which versions.
KNOWN = json.loads((Path(__file__).parents[2] / "data" / "vqa_accuracies.json").read_text())[
    "cases"
]


@pytest.mark.parametrize(
    ("matches", "official", "xl_vlms"),
    [(0, 0, 0), (1, 0.3, 1 / 3), (2, 0.6, 2 / 3), (3, 0.9, 1), (4, 1, 1), (10, 1, 1)],
)
def test_by_hand(matches, official, xl_vlms):
    answers = ["dog"] * matches + [f"animal {i}" for i in range(10 - matches)]
    assert metrics.vqa_accuracy("dog", answers) == pytest.approx(official)
    assert metrics.vqa_accuracy("dog", answers, protocol="normalised") == pytest.approx(official)
    assert metrics.vqa_accuracy("dog", answers, protocol="xl-vlms") == pytest.approx(xl_vlms)


def test_the_originals_values():
    assert len(KNOWN) > 300
    for prediction, people, official, xl_vlms in KNOWN:
        answers = [answer for answer, count in people.items() for _ in range(count)]
        assert len(answers) == 10
        assert metrics.vqa_accuracy(prediction, answers) == pytest.approx(official, abs=1e-6)
        given = metrics.vqa_accuracy(prediction, answers, protocol="xl-vlms")
        assert given == pytest.approx(xl_vlms, abs=1e-6), prediction


@pytest.mark.parametrize(
    ("prediction", "answers", "official", "normalised", "xl_vlms"),
    [
        # Nothing is normalised where all agree.
        ("Yes", ["yes"] * 10, 0, 1, 1),
        ("Yes", ["yes"] * 9 + ["no"], 1, 1, 1),
        (" yes\n", ["yes"] * 10, 1, 1, 1),
        # People's answers keep their marks in XL-VLMs.
        ("t-shirt", ["t-shirt"] * 10, 1, 1, 0),
        ("t shirt", ["t-shirt"] * 9 + ["shirt"], 1, 1, 0),
        ("2", ["two"] * 9 + ["2"], 1, 1, 1),
        # "'s" is a word of its own in its predictions.
        ("he's", ["he's"] * 9 + ["she"], 1, 1, 0),
        ("hes", ["he's"] * 9 + ["she"], 1, 1, 1),
        ("redwhite1000", ["red/white,1,000"] * 9 + ["no"], 1, 0, 0),
    ],
)
def test_where_the_protocols_differ(prediction, answers, official, normalised, xl_vlms):
    for protocol, value in zip(PROTOCOLS, (official, normalised, xl_vlms), strict=True):
        assert metrics.vqa_accuracy(prediction, answers, protocol=protocol) == value, protocol


@pytest.mark.parametrize("protocol", PROTOCOLS)
@given(st.lists(st.sampled_from(["red", "blue", "a dog", "three"]), min_size=1, max_size=12))
def test_the_order_of_people_does_not_matter_and_agreement_does_not_hurt(protocol, answers):
    value = metrics.vqa_accuracy("red", answers, protocol)
    assert 0 <= value <= 1
    assert value == pytest.approx(metrics.vqa_accuracy("red", answers[::-1], protocol))
    turned = ["red" if answer == "blue" else answer for answer in answers]
    assert metrics.vqa_accuracy("red", turned, protocol) >= value - 1e-9


@pytest.mark.wrong_types
def test_messages():
    with pytest.raises(ValueError, match="protocol is 'mine'; expected one of 'official', 'norm"):
        metrics.vqa_accuracy("a", ["a"], protocol="mine")
    with pytest.raises(ValueError, match=r"answers is \[\]; expected a list"):
        metrics.vqa_accuracy("a", [])
    with pytest.raises(ValueError, match="answers is 'yes'"):
        metrics.vqa_accuracy("a", "yes")
