"""AMBER's descriptions: by hand, against the official script, properties, and messages."""

import importlib
import random
import sys
import types
import warnings
from typing import Any

import numpy as np
import pytest

from xlvlm_jax.metrics import (
    WordLists,
    amber_counts,
    amber_descriptions,
    listed_words,
    nltk_nouns,
    spacy_alike,
)

module = importlib.import_module("xlvlm_jax.metrics.amber_descriptions")
LISTS = WordLists(
    {
        **{"sky": [], "sea": ["water", "wave"], "person": ["people", "man", "woman"]},
        **{"tree": ["forest", "leave"], "forest": ["tree", "bush"], "sun": ["sunshine"]},
        **{"boat": ["ship"], "bird": [], "cloud": [], "dog": ["puppy"], "flower": ["plant"]},
        **{"plane": [], "light": ["lamp"]},
    },
    ("orange", "light"),
)


def test_by_hand():
    nouns = [["sky", "puppy", "boat", "light", "table"], ["forest", "bird"]]
    there, imagined = [["sky", "dog", "sea"], ["tree"]], [["boat", "sun"], ["cloud"]]
    # "light" is never wrong, "table" is no mention, and "forest" stands for a tree.
    counts = amber_counts(nouns, there, imagined, LISTS)
    assert counts.tolist() == [[4, 1, 2, 3, 1, 1, 1, 2], [2, 1, 1, 1, 1, 1, 0, 1]]
    assert amber_descriptions(nouns, there, imagined, LISTS) == (2 / 6, 3 / 4, 1, 1 / 3)


def test_alike_to_what_is_there_is_not_wrong_though_imagined():
    there, imagined = [["person"]], [["plane"]]
    assert amber_counts([["plane"]], there, imagined, LISTS)[0, 1] == 1
    alike = amber_counts([["plane"]], there, imagined, LISTS, alike=lambda a, b: a[0] == b[0])
    # Not wrong, and the person is covered; Cog counts the plane nevertheless.
    assert alike.tolist() == [[1, 0, 1, 1, 0, 1, 1, 1]]


def test_an_object_annotated_twice_is_covered_once():
    counts = amber_counts([["boat", "ship", "boat"]], [["boat", "boat"]], [["sun"]], LISTS)
    assert counts[0, 2:4].tolist() == [1, 2]


def fixture(seed: int, count: int) -> Any:
    """Draws nouns, what is there and what is imagined."""
    rng = random.Random(seed)
    words = [*sorted(LISTS.words), "orange", "Dog", "table", "cat"]
    objects, drawn = list(LISTS.associations), []
    for _ in range(count):
        there = [rng.choice(objects) for _ in range(rng.randint(1, 5))]
        imagined = [rng.choice(objects) for _ in range(rng.randint(1, 4))]
        drawn.append(([rng.choice(words) for _ in range(rng.randint(0, 7))], there, imagined))
    return tuple(map(list, zip(*drawn, strict=True)))


@pytest.mark.parametrize(
    ("seed", "count", "script"),
    [
        (0, 40, (70.2, 21.6, 72.5, 20.8)),
        (1, 40, (72.1, 18.3, 70.0, 13.3)),
        (2, 200, (72.1, 20.7, 76.5, 13.5)),
    ],
)
def test_as_the_official_script(seed, count, script):
    """Values of AMBER's inference.py at 534babf: CHAIR, Cover, Hal and Cog of these descriptions.

    It was given stand-ins for nltk and spaCy: every word is a noun and its own lemma, and words
    with the same first two letters have a cosine of 0.9, others of 0.1.
    """
    nouns, there, imagined = fixture(seed, count)
    ours = amber_descriptions(nouns, there, imagined, LISTS, alike=lambda a, b: a[:2] == b[:2])
    np.testing.assert_allclose(100 * np.array(ours), script, atol=0.0501)  # it rounds to one digit


def test_plain_words_in_any_case_and_number():
    lists = WordLists({"TV": [], "glass": [], "leave": [], "person": ["people"]})
    text = "Two TVs, glasses and LEAVES; people e-mail a person."
    assert listed_words(text, lists) == ["TV", "glass", "leave", "people", "person"]
    assert listed_words("", lists) == []


def test_order_and_repetition_of_descriptions_do_not_matter():
    nouns, there, imagined = fixture(3, 30)
    whole = amber_descriptions(nouns, there, imagined, LISTS)
    turned = amber_descriptions(nouns[::-1] * 2, there[::-1] * 2, imagined[::-1] * 2, LISTS)
    np.testing.assert_allclose(turned, whole)
    right = amber_descriptions(there, there, [["sun"]] * 30, WordLists(LISTS.associations))
    assert right.chair == 0 and right.hal == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], []), "there are no descriptions"),
        (([["sky"]], [], []), "nouns of 1 descriptions and objects of 0 and 0 images"),
        (([["sky"]], [["lion"]], [["sun"]]), "'lion' is not in AMBER's list of words; expected re"),
    ],
)
def test_bad_input(arguments, message):
    nouns, there, imagined = arguments
    with pytest.raises(ValueError, match=message):
        amber_descriptions(nouns, there, imagined, LISTS)


class Doc(str):
    """A text whose likeness to another is the share of letters that they have in common."""

    def similarity(self, other):
        return len({*self} & {*other}) / len({*self} | {*other})


def test_nouns_and_likeness_as_the_script_asks_nltk_and_spacy(monkeypatch):
    modules: list[Any] = [types.ModuleType(name) for name in ("nltk", "nltk.stem", "spacy")]
    nltk, stem, spacy = modules
    nltk.word_tokenize = str.split
    nltk.pos_tag = lambda words: [(w, "NNS" if w.endswith("s") else "VB") for w in words]
    lemmatizer = types.SimpleNamespace(lemmatize=lambda word: word.removesuffix("s"))
    stem.WordNetLemmatizer = lambda: lemmatizer
    spacy.load = {"en_core_web_lg": Doc}.__getitem__
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert nltk_nouns("dogs run Trees") == ["dog", "Tree"]
    spacy_alike.cache_clear()
    alike = spacy_alike()
    assert spacy_alike() is alike  # its vectors are read once
    assert alike("abcde", "edcba") and not alike("abcde", "abcd")  # 0.8 is not enough

    def missing(*_):
        raise LookupError("Resource wordnet not found.")

    def no_model(_):
        raise OSError("[E050] Can't find model")

    nltk.word_tokenize, spacy.load = missing, no_model
    spacy_alike.cache_clear()
    with pytest.raises(ValueError, match="nltk has no data to find nouns with; run: python -m nl"):
        nltk_nouns("dogs")
    with pytest.raises(ValueError, match="spaCy has no word vectors; run: python -m spacy downl"):
        spacy_alike()


def test_the_official_protocol_needs_its_data(monkeypatch):
    """The packages alone made descriptions impossible to score, also by the plain protocol."""

    def no_data(_):
        raise ValueError("nltk has no data")

    def no_package():
        raise ModuleNotFoundError("No module named 'spacy'")

    monkeypatch.setattr(module, "nltk_nouns", no_data)
    monkeypatch.setattr(module, "spacy_alike", no_package)
    module.can_read_officially.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not module.can_read_officially()
    monkeypatch.setattr(module, "spacy_alike", lambda: str.__eq__)
    module.can_read_officially.cache_clear()
    with pytest.warns(UserWarning, match="official protocol is left out: nltk has no data"):
        assert not module.can_read_officially()
    monkeypatch.setattr(module, "nltk_nouns", lambda text: [text])
    module.can_read_officially.cache_clear()
    assert module.can_read_officially()
    module.can_read_officially.cache_clear()
