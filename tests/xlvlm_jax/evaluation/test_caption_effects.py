"""Captions before and after, by hand."""

from pathlib import Path

import pytest

from xlvlm_jax.data.sample import Sample
from xlvlm_jax.evaluation import PLAIN, Captions, caption_changes, count_said, count_valid
from xlvlm_jax.evaluation.caption_effects import count_each
from xlvlm_jax.metrics.captions import count_words


def test_changes_by_hand():
    before = ["a dog", "a red dog", "a red red cat", "a cat"]
    after = ["a Blue dog", "a red dog", "the cat", "a big cat"]
    changes = caption_changes(before, after, ["red", "blue"])
    assert changes == (4, 3, 2, 2, 1, 1, 3, 2, pytest.approx(11 / 4), pytest.approx(11 / 4))
    assert changes.gain == 0
    assert caption_changes(before[:1], after[:1], ["red", "blue"]).gain == 1


def test_words_are_counted_over_all_captions():
    assert count_said(["a dog, a cat.", "A cat"]) == {"a": 3, "cat": 2, "dog": 1}


def test_valid_words_as_in_xl_vlms():
    # Stop words (the), names (Paris), plurals (dogs) and words with a mark (cat.) do not count.
    assert count_valid(["The dog in Paris", "a Dog and 2 dogs, a cat."]) == {"dog": 2, "2": 1}


def test_hallucination_where_the_objects_are_known():
    def captioned(objects):
        known = {} if objects is None else {"objects": objects}
        return Sample("1", Path("x"), "1", "?", ("A dog on a bench",), known)

    def measure(*samples):
        texts = ["a dog and a cat", "a bus"][: len(samples)]
        return Captions().measure(list(samples), texts, texts)

    # The bench counts as there, because a person names it. "bus" is no object to the official one.
    scores = measure(captioned(["dog"]), captioned(["bus"]))["CHAIR"]
    assert scores["official"] == pytest.approx(
        {"chair_i": 0.5, "chair_s": 0.5, "recall": 1 / 5, "length": 3.5}
    )
    assert scores["plain"] == pytest.approx(
        {"chair_i": 1 / 3, "chair_s": 0.5, "recall": 2 / 5, "length": 3.5}
    )
    assert "CHAIR" not in measure(captioned(None))


def test_texts_without_references():
    samples = [Sample(str(i), Path("x"), "1", "?") for i in range(3)]
    task = Captions(("harmful", "not safe"))
    task.require(samples)
    before, after = ["Sure."] * 3, ["That is harmful.", "It is not safe!", "Sure."]
    measured = task.measure(samples, before, after)
    assert measured["changes"]["holding_after"] == 2
    assert list(measured["scores"]) == ["left out"]
    with pytest.raises(ValueError, match="no captions; evaluate captions on --dataset coco, or gi"):
        Captions().require(samples)
    with pytest.raises(ValueError, match="no references, which the cost of steering is measured"):
        task.trial(samples, before, PLAIN, after)


def test_messages():
    with pytest.raises(ValueError, match="1 captions before and 2 after"):
        caption_changes(["a"], ["a", "b"], ["a"])
    with pytest.raises(ValueError, match="no words to look for"):
        caption_changes(["a"], ["a"], [])


def test_phrases_are_counted_as_words_are():
    """A phrase was left out of the class words."""
    captions = ["A traffic light, a Dog", "traffic light by a traffic-light", "no lights"]
    found = count_each(captions, ["traffic light", "dog", "cat"])
    assert found == {"traffic light": 2, "dog": 1}
    assert sum(found.values()) == count_words(captions, ["traffic light", "dog", "cat"]).sum()
