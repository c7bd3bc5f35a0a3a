"""The numbers of a card, by hand."""

import numpy as np
import pytest

from xlvlm_jax.metrics.labels import factorise
from xlvlm_jax.report.cards import count_attributes, typical_attributes
from xlvlm_jax.report.numbers import number, percent


def typical(own, attributes):
    """Returns activations of a concept with the rows `own`, and of another with the other rows."""
    labels = {name: factorise(values) for name, values in attributes.items()}
    return typical_attributes(0, count_attributes(np.where(own, 0, 1), 2, labels))


def test_attributes_that_stand_out():
    # 30 of 100 rows are the concept's. It has all 20 red ones (p = 2/3, q = 1/5, lift 10/3), the
    # share of large ones that all have, and every row is a dog.
    own = np.arange(100) < 30
    colours = ["red"] * 20 + ["blue"] * 80
    sizes = ["large" if i % 2 else "small" for i in range(100)]
    found = typical(own, {"colour": colours, "size": sizes, "kind": ["dog"] * 100})
    assert [(a.name, a.value) for a in found] == [("colour", "red")]
    assert found[0].share == pytest.approx(2 / 3)
    assert found[0].base == pytest.approx(1 / 5)
    assert found[0].lift == pytest.approx(10 / 3)


def test_unknown_attributes_are_not_counted():
    own = np.arange(40) < 20
    moods = ["happy"] * 10 + [None] * 10 + ["sad"] * 10 + [None] * 10
    (happy,) = typical(own, {"mood": moods})
    assert (happy.value, happy.share, happy.base) == ("happy", 1.0, 0.5)
    assert typical(own, {"mood": [None] * 40}) == []
    assert typical(own & False, {"mood": moods}) == []


def test_numbers_as_written():
    narrow = "\N{NARROW NO-BREAK SPACE}"
    assert [number(x) for x in (0.0, 12, 0.12345, 1e-6, 123.456, 3056.4)] == [
        "0", "12", "0.123", "1.0e-06", "123", f"3{narrow}056",
    ]  # fmt: skip
    shares = (0.0, 1e-5, 0.001, 0.0039, 0.0125, 0.05, 0.0949, 0.0951, 0.126, 0.5, 1.0)
    texts = ("0", "<0.01", "0.1", "0.39", "1.2", "5", "9.5", "10", "13", "50", "100")
    assert [percent(x) for x in shares] == [f"{text}{narrow}%" for text in texts]
