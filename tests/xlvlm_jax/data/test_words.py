"""Words and classes of words in texts."""

import pytest

from xlvlm_jax.data import words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a traffic\nlight", ["traffic\nlight"]),
        ("traffic lights", ["traffic"]),
        ("Traffic light", []),
        ("3 of 30, 3.5, 1,3 and 3.", ["3", "3"]),
        ("3D 3rd -3", ["3"]),
        ("x$5 $5", ["$5"]),
        ("狗的dog狗", ["狗", "dog", "狗"]),
        ("cafe cafe\u0301 e\u0301dog", ["cafe"]),  # accents as characters of their own
        ("काल काला", ["काल"]),
        ("dog\ufe0f", ["dog"]),
        ("don't don\u2019t", ["don't", "don\u2019t"]),
        ("dog_house dogs Dog's dog's", ["dog"]),
    ],
)
def test_a_word_in_a_text_is_a_whole_one(text, found):
    listed = ["traffic", "traffic light", "3", "$5", "dog", "狗", " ", "cafe", "काल", "don't"]
    assert words.word_pattern(listed).findall(text) == found
    assert not words.word_pattern([]).search(text)


@pytest.mark.parametrize("word", ["caf\u00e9", "cafe\u0301"], ids=["one", "two"])
def test_a_letter_and_its_accent_are_one_character_or_two(word):
    text = "cafe caf\u00e9s caf\u00e9 cafe\u0301s cafe\u0301 cafe\u0301\u0327"
    spans = [found.span() for found in words.word_pattern([word]).finditer(text)]
    assert spans == [(11, 15), (23, 28)]


def test_classes_are_lists_of_different_lower_case_words():
    for name, members in words.CLASSES.items():
        assert len(set(members)) == len(members) >= 15, name
        assert all(word == word.lower() and word.isalpha() for word in members), name
    assert {"gray", "grey"} <= set(words.COLOURS)
    assert len(words.PLACES) >= 60 and len(words.SENTIMENTS) >= 60


def test_classes_do_not_overlap():
    classes = [set(words.CLASSES[name]) for name in ("colours", "places", "sentiments")]
    assert sum(map(len, classes)) == len(set.union(*classes))


def test_class_words_accepts_a_name_an_alias_or_a_list_of_words():
    assert words.class_words("colors") == words.class_words("colours") == words.COLOURS
    assert words.class_words("cup, mug,, cup") == ("cup", "mug")


def test_words_of_drawn_scenes():
    assert {"blue", "crimson", "ivory"} <= set(words.class_words("scenes:colour"))
    assert {"sad", "smiling"} <= set(words.class_words("scenes:mood"))
    with pytest.raises(
        ValueError, match="unknown word class 'scenes:smell'; expected one of scenes:"
    ):
        words.class_words("scenes:smell")


def test_words_by_name_or_as_they_are():
    assert words.named_words("dog") == ("dog",)
    assert words.named_words("cup, mug") == ("cup", "mug")
    assert words.named_words("color,") == ("color",)
    for name in ("colours", "colors", "xl-vlms:colors", "scenes:mood"):
        assert words.named_words(name) == words.class_words(name)
    with pytest.raises(ValueError, match="'sentiment' is nearly the class of words 'sentiments'"):
        words.named_words("sentiment")
    with pytest.raises(ValueError, match="got no words in ' , '; expected a word, words"):
        words.named_words(" , ")


def test_class_words_names_the_classes():
    with pytest.raises(
        ValueError, match="unknown word class 'fruit'; expected one of colours, places"
    ):
        words.class_words("fruit")


def test_sentiments_are_positive_negative_or_neither():
    positive, negative = words.POSITIVE_SENTIMENTS, words.NEGATIVE_SENTIMENTS
    assert not set(positive) & set(negative)
    assert {*positive, *negative} < set(words.SENTIMENTS) and len(words.SENTIMENTS) == 69
    assert words.class_words("negative_sentiments") == negative


def test_classes_of_xl_vlms():
    assert "charcoal" in words.class_words("xl-vlms:colors")
    assert len(words.class_words("xl-vlms:places")) == 48
    assert len(words.class_words("xl-vlms:sentiments")) == 145
    assert "facial expression" in words.class_words("xl-vlms:sentiments")
    with pytest.raises(ValueError, match="unknown word class 'xl-vlms:moods'; expected one of xl"):
        words.class_words("xl-vlms:moods")


def test_inflected_forms_of_words():
    assert words.has_inflected("two dogs", ["dog"])
    assert words.has_inflected("the women\u2019s feet", ["woman"])
    assert not words.has_inflected("Dogs", ["dog"]) and words.has_inflected("Dogs", ["Dog"])
    assert not words.has_inflected("a dogma", ["dog"])
    assert not words.has_inflected("a c book", ["c++", ""])
