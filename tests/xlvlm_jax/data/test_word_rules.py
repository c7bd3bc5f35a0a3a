"""Which words may name a concept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlvlm_jax.data import coco_objects, word_rules, words
from xlvlm_jax.data.word_rules import RULES, concept_words, is_concept_word, stop_words


@pytest.mark.parametrize(
    ("word", "default", "xl_vlms"),
    [
        ("dog", True, True),
        ("cats", True, False),  # web2 has no plurals
        ("women", True, False),
        ("7", True, True),
        ("2014", True, True),
        ("-1.5", False, True),  # what `float` reads
        ("1e5", False, True),
        ("the", False, False),
        ("mug", True, False),  # a stop word there
        ("fire", True, False),
        ("front", True, False),
        ("system", True, False),
        ("thick", True, True),
        ("quickly", True, False),
        ("laptop", True, False),
        ("tv", False, False),  # too short
        ("skateboards", True, False),
        ("smartphone", True, False),
        ("john", False, False),
        ("jessica", False, False),
        ("ox", False, False),
        ("zzxy", False, False),
        ("", False, False),
        ("7th", False, False),
        ("\u2581dog", False, False),
    ],
)
def test_words_by_hand(word, default, xl_vlms):
    assert is_concept_word(word) == default
    assert is_concept_word(word, "xl-vlms") == xl_vlms


def test_everyday_nouns_and_their_plurals_are_words():
    single = {w.lower() for listed in coco_objects.WORDS.values() for w in listed if " " not in w}
    assert not {word for word in single if len(word) > 2 and not is_concept_word(word)}
    # Among the most frequent objects of Visual Genome.
    objects = """
        window shirt fence leaf sneaker sunglasses windshield backpack crosswalk wetsuit sidewalk
        minivan motorbike nightstand tabletop ponytail hoodie headlight snowboarder sailboat
        wristband t-shirt streetlight cellphone cupcake smartphone trashcan
        windows leaves sneakers jeans crosswalks motorbikes ponytails knives buses"""
    assert not [word for word in objects.split() if not is_concept_word(word)]


def test_names_of_people_are_not_words():
    names = "john michael robert david james christopher patricia jessica germany chicago"
    assert not [name for name in names.split() if is_concept_word(name)]
    # But names that are words too.
    assert all(map(is_concept_word, ["rose", "frank", "jack", "turkey"]))


def test_stop_words_are_function_words():
    assert {"the", "of", "because", "eleven", "themselves"} <= stop_words()
    assert not {"fire", "side", "front", "top", "system", "bill", "mill"} & stop_words()
    assert {"fire", "side", "front", "top", "system", "mug"} <= stop_words("xl-vlms")
    assert not {"thick", "fifty"} & stop_words("xl-vlms")


def test_repeats_count_once_or_stay():
    candidates = ["\u2581", " Dog", "the", "dog", "beach", "3", "xq", " GRASS ", "tree"]
    assert concept_words(candidates, 4) == ["dog", "beach", "3", "grass"]
    assert concept_words(candidates, 99) == ["dog", "beach", "3", "grass", "tree"]
    assert concept_words(candidates, 4, "xl-vlms") == ["dog", "dog", "beach", "3"]
    assert words.concept_words is concept_words  # its place in version 0.1


@pytest.mark.parametrize("rules", RULES)
@given(st.lists(st.sampled_from(["dog", "Dog ", "the", "x", "7", "john", "trees"])))
def test_what_is_kept_is_a_word_in_its_order(rules, candidates):
    kept = concept_words(candidates, 3, rules)
    assert len(kept) <= 3 and all(is_concept_word(word, rules) for word in kept)
    said = iter(text.lower().strip() for text in candidates)
    assert all(word in said for word in kept)


@pytest.mark.wrong_types
def test_rules_that_do_not_exist():
    with pytest.raises(ValueError, match="unknown word rules 'mine'; expected default or xl-vlms"):
        word_rules.concept_words(["dog"], 1, "mine")
