"""Normal forms of answers, by hand and by properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlvlm_jax.metrics.answer_text import (
    OFFICIAL_CONTRACTIONS,
    normalise_answer,
    official_answer,
    xl_vlms_answer,
)


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
def test_normalised(said, meant):
    assert normalise_answer(said) == meant


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("red/white", "red white"),
        ("red/white,1,000", "redwhite1000"),
        ("t-shirt - red", "tshirt red"),
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("." * 33, "."),
        ("3.5 is .5", "3.5 is .5"),
        ("hed itd twas whered oughtnt notve", "he'd it'd 'twas where'd oughtn't not've"),
        ("im ive shes lets", "im ive shes lets"),
        ("somebody'd", "somebodyd"),
        ("y'alld've yall'd've y'all'dve", "y'all'd've y'all'd've y'all'd've"),
        ("The Ten", "10"),
        ("none\tof\nthe", "0 of"),
    ],
)
def test_official(said, meant):
    assert official_answer(said) == meant


def test_official_contractions_omit_one_apostrophe():
    assert len(OFFICIAL_CONTRACTIONS) == 114
    reversed_one = OFFICIAL_CONTRACTIONS["somebody'd"]
    for short, full in OFFICIAL_CONTRACTIONS.items():
        if full != reversed_one:
            assert short.replace("'", "") == full.replace("'", "") and len(full) == len(short) + 1


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("Red, white?", "red white"),
        ("1,000", "1000"),
        ("the dog's bed", "dog 's bed"),
        ("red/white", "red white"),
        ("Two.", "2"),
        # In Python 3 the digits of every script hold back a full stop.
        ("3.\u0663", "3.\u0663"),
    ],
)
def test_xl_vlms(said, meant):
    assert xl_vlms_answer(said) == meant


@given(st.text())
def test_normalising_twice_is_normalising_once(text):
    once = normalise_answer(text)
    assert normalise_answer(once) == once


@given(st.text())
def test_xl_vlms_answers_are_in_lower_case_without_marks(text):
    assert not set(xl_vlms_answer(text)) & set(";/[](),?!\n\t")
