"""Words: classes that select samples and tokens, patterns that find words in texts, and filters for
concept words.

The lists have single lower-case words, with British and American spellings side by side.
"""

import re
import unicodedata
from collections.abc import Iterable
from functools import cache


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COLOURS = _words(
    """
    red orange yellow green blue purple violet pink brown black white gray grey gold silver
    beige tan turquoise
    """
)

PLACES = _words(
    """
    airport alley apartment barn bathroom beach bedroom bridge building cafe campground church
    city classroom coast corner countryside court desert dock driveway farm field forest garage
    garden grass gym harbor harbour highway hill home hotel house island kitchen lake lawn
    library market meadow mountain museum ocean office park path pasture pier playground pool
    porch restaurant river road room school sea shop shore sidewalk sky snow stadium station
    store street theater theatre town village yard zoo
    """
)

SENTIMENTS = _words(
    """
    afraid amazed amused angry annoyed anxious awful bad beautiful bored brave calm cheerful
    comfortable confident confused content cozy curious cute delighted depressed disappointed
    disgusted eager embarrassed excited fearful friendly frightened frustrated funny furious
    gentle gloomy good grateful great grumpy happy hopeful horrible joyful lonely lovely mad
    miserable nervous nice peaceful playful pleasant pleased proud relaxed sad scared scary
    serious shy sleepy surprised terrible tired ugly unhappy upset wonderful worried
    """
)

CLASSES = {"colours": COLOURS, "places": PLACES, "sentiments": SENTIMENTS}
_ALIASES = {"colors": "colours"}


def class_words(name: str) -> tuple[str, ...]:
    """Returns the words of a class: "colours" (or "colors"), "places", "sentiments".

    "scenes:colour", "scenes:place" and "scenes:mood" are the words that captions of drawn scenes
    use, some rarer than in real captions. Words separated by commas make a class too: "cup, mug,
    glass".

    Raises:
        ValueError: a single name is not a class.
    """
    name = _ALIASES.get(name, name)
    if name.startswith("scenes:"):
        from xlvlm_jax.data.scenes.language import FAMILIES

        attribute = name.removeprefix("scenes:")
        if attribute not in FAMILIES:
            known = ", ".join(f"scenes:{key}" for key in FAMILIES)
            raise ValueError(f"unknown word class {name!r}; expected one of {known}")
        return tuple(FAMILIES[attribute])
    if "," in name:
        return tuple(dict.fromkeys(word for part in name.split(",") if (word := part.strip())))
    if name not in CLASSES:
        raise ValueError(
            f"unknown word class {name!r}; expected one of {', '.join(CLASSES)}, or your own "
            "words separated by commas"
        )
    return CLASSES[name]


# Thai, Lao, Myanmar, Khmer, kana and Han are written without spaces between words.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003134f"
)
_LETTER = rf"[^\W{_UNSPACED}]"
# Variation selectors are not part of words.
_PLANES = (range(0x300, 0xFE00), range(0xFE10, 0x20000))


@cache
def _mark() -> str:
    """Returns a class of combining accents and vowel signs, which are not letters to `re`."""
    points = (chr(point) for plane in _PLANES for point in plane)
    marks = "".join(point for point in points if unicodedata.category(point) in ("Mn", "Mc"))
    return f"[{re.sub(f'[{_UNSPACED}]', '', marks)}]"


def _normal_forms(word: str) -> tuple[str, str]:
    """Returns the word with each accented letter as one character, and as several."""
    return unicodedata.normalize("NFC", word), unicodedata.normalize("NFD", word)


def word_pattern(words: Iterable[str]) -> re.Pattern[str]:
    r"""Returns a pattern that finds any of the words in a text, each as a whole word.

    A word ends where no letter, digit or underscore follows: "dog" matches in "dog's" and in
    "hot-dog", but not in "dogs" or "dog_house". A number also continues through a point or a comma
    between digits: 3 does not match in "3.5" or "3,000". Marks belong to their letter: an "e"
    followed by a combining accent is not an "e". In scripts without spaces only the characters
    count. A space in a word matches any white space, and "'" matches "\u2019" too. A letter and its
    accent may be one character or two, in the word and in the text.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    stripped = filter(None, (word.strip() for word in words))
    written = dict.fromkeys(w for word in stripped for w in (word, *_normal_forms(word)))
    for word in sorted(written, key=len, reverse=True):  # longest first, for common starts
        before = "" if re.match(f"[{_UNSPACED}]", word) else f"(?<!{_LETTER})(?<!{_mark()})"
        after = "" if re.search(f"[{_UNSPACED}]$", word) else f"(?!{_LETTER}|{_mark()})"
        before += r"(?<!\d[.,])" if word[0].isdecimal() else ""
        after += r"(?![.,]\d)" if word[-1].isdecimal() else ""
        form = r"\s+".join(map(re.escape, word.split())).replace("'", "['\u2019]")
        groups.setdefault((before, after), []).append(form)
    alternatives = (f"{a}(?:{'|'.join(forms)}){b}" for (a, b), forms in groups.items())
    return re.compile("|".join(alternatives) or r"(?!)")  # matches nothing


@cache
def stop_words() -> frozenset[str]:
    """Returns English stop words (scikit-learn's list)."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return ENGLISH_STOP_WORDS


@cache
def english_words() -> frozenset[str]:
    """Returns Webster's second edition ("web2"), lower-cased, as the papers filter with."""
    from english_words import get_english_words_set

    return frozenset(get_english_words_set(["web2"], lower=True))


def is_concept_word(word: str) -> bool:
    """Returns whether a lower-case, stripped word can represent a concept.

    It can if it is a number, or an English word of more than two letters and not a stop word.
    """
    if word.isdecimal():
        return True
    return len(word) > 2 and word in english_words() and word not in stop_words()


def concept_words(candidates: Iterable[str], limit: int) -> list[str]:
    """Returns the first words that can represent a concept.

    Args:
        candidates: texts, lower-cased and stripped before the test.
        limit: maximum number of words, each of which counts once.
    """
    words = dict.fromkeys(text.lower().strip() for text in candidates)
    return [word for word in words if is_concept_word(word)][:limit]
