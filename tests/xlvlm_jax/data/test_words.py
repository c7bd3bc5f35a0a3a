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
    classes = [set(members) for members in words.CLASSES.values()]
    assert sum(map(len, classes)) == len(set.union(*classes))


def test_class_words_takes_a_name_an_alias_or_words_of_ones_own():
    assert words.class_words("colors") == words.class_words("colours") == words.COLOURS
    assert words.class_words("cup, mug,, cup") == ("cup", "mug")


def test_words_of_drawn_scenes():
    assert {"blue", "crimson", "ivory"} <= set(words.class_words("scenes:colour"))
    assert {"sad", "smiling"} <= set(words.class_words("scenes:mood"))
    with pytest.raises(
        ValueError, match="unknown word class 'scenes:smell'; expected one of scenes:"
    ):
        words.class_words("scenes:smell")


def test_class_words_names_the_classes():
    with pytest.raises(
        ValueError, match="unknown word class 'fruit'; expected one of colours, places"
    ):
        words.class_words("fruit")


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("dog", True),
        ("7", True),
        ("2014", True),
        ("the", False),  # a stop word
        ("ox", False),  # English, and too short
        ("zzxy", False),
        ("", False),
        ("7th", False),
        ("▁dog", False),
    ],
)
def test_concept_words_are_english_or_numbers(word, kept):
    assert words.is_concept_word(word) == kept


def test_concept_words_come_once_in_the_order_of_the_candidates():
    candidates = ["▁", " Dog", "the", "dog", "beach", "3", "xq", " GRASS ", "tree"]
    assert words.concept_words(candidates, 4) == ["dog", "beach", "3", "grass"]
    assert words.concept_words(candidates, 99) == ["dog", "beach", "3", "grass", "tree"]
