"""VQA accuracy: by hand, properties, messages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlvlm_jax import metrics
from xlvlm_jax.metrics.vqa import normalise_answer


@pytest.mark.parametrize(
    ("matches", "official", "reference"),
    [(0, 0, 0), (1, 0.3, 1 / 3), (2, 0.6, 2 / 3), (3, 0.9, 1), (4, 1, 1), (10, 1, 1)],
)
def test_by_hand(matches, official, reference):
    answers = ["dog"] * matches + [f"animal {i}" for i in range(10 - matches)]
    assert metrics.vqa_accuracy("dog", answers) == pytest.approx(official)
    assert metrics.vqa_accuracy("dog", answers, protocol="xl-vlms") == pytest.approx(reference)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("The Dog.", "dog"),
        ("two dogs!", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("black/white", "black white"),
        ("on\tthe\n table", "on table"),
        ("t-shirt", "t shirt"),
        ("its", "its"),
        ("", ""),
    ],
)
def test_normalisation(said, meant):
    assert normalise_answer(said) == meant


def test_the_protocols_differ_in_punctuation():
    assert metrics.vqa_accuracy("Red.", ["red"] * 10) == 1
    assert metrics.vqa_accuracy("Red.", ["red"] * 10, protocol="xl-vlms") == 0
    assert metrics.vqa_accuracy(" RED ", ["red"] * 10, protocol="xl-vlms") == 1


@given(st.lists(st.sampled_from(["red", "blue", "a dog", "three"]), min_size=1, max_size=12))
def test_the_order_of_people_does_not_matter_and_more_agreement_is_no_worse(answers):
    value = metrics.vqa_accuracy("red", answers)
    assert 0 <= value <= 1
    assert value == pytest.approx(metrics.vqa_accuracy("red", answers[::-1]))
    turned = ["red" if answer == "blue" else answer for answer in answers]
    assert metrics.vqa_accuracy("red", turned) >= value


@given(st.text())
def test_normalising_twice_is_normalising_once(text):
    once = normalise_answer(text)
    assert normalise_answer(once) == once


@pytest.mark.wrong_types
def test_messages():
    with pytest.raises(ValueError, match="protocol is 'mine'; expected 'official' or 'xl-vlms'"):
        metrics.vqa_accuracy("a", ["a"], protocol="mine")
    with pytest.raises(ValueError, match=r"answers is \[\]; expected a list"):
        metrics.vqa_accuracy("a", [])
    with pytest.raises(ValueError, match="answers is 'yes'"):
        metrics.vqa_accuracy("a", "yes")
