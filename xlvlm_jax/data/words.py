"""Words: classes that select samples and tokens, and patterns that find words in texts.

The lists have single lower-case words, with British and American spellings side by side.
"""

import difflib
import re
import unicodedata
from collections.abc import Iterable
from functools import cache

from xlvlm_jax.data import xl_vlms_words
from xlvlm_jax.data.word_rules import (  # their place in version 0.1
    concept_words as concept_words,
)
from xlvlm_jax.data.word_rules import english_words as english_words
from xlvlm_jax.data.word_rules import is_concept_word as is_concept_word
from xlvlm_jax.data.word_rules import lemma
from xlvlm_jax.data.word_rules import stop_words as stop_words


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

POSITIVE_SENTIMENTS = _words(
    """
    amused beautiful brave calm cheerful comfortable confident content cozy cute delighted eager
    excited friendly funny gentle good grateful great happy hopeful joyful lovely nice peaceful
    playful pleasant pleased proud relaxed wonderful
    """
)
NEGATIVE_SENTIMENTS = _words(
    """
    afraid angry annoyed anxious awful bad bored confused depressed disappointed disgusted
    embarrassed fearful frightened frustrated furious gloomy grumpy horrible lonely mad miserable
    nervous sad scared scary terrible tired ugly unhappy upset worried
    """
)
# Neither good nor bad by themselves.
_MOODS = _words("amazed curious serious shy sleepy surprised")
SENTIMENTS = tuple(sorted((*POSITIVE_SENTIMENTS, *NEGATIVE_SENTIMENTS, *_MOODS)))

CLASSES = {
    "colours": COLOURS,
    "places": PLACES,
    "sentiments": SENTIMENTS,
    "positive_sentiments": POSITIVE_SENTIMENTS,
    "negative_sentiments": NEGATIVE_SENTIMENTS,
}
_ALIASES = {"colors": "colours"}


def class_words(name: str) -> tuple[str, ...]:
    """Returns the words of a class, one of CLASSES; "colors" is "colours" too.

    "xl-vlms:colors" and so on are the lists of XL-VLMs, which have other words.
    "scenes:colour", "scenes:place" and "scenes:mood" are the words that captions of drawn scenes
    use, some rarer than in real captions. Words separated by commas make a class too: "cup, mug,
    glass".

    Raises:
        ValueError: a single name is not a class.
    """
    name = _ALIASES.get(name, name)
    if name.startswith("xl-vlms:"):
        return _of_xl_vlms(name.removeprefix("xl-vlms:"))
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


def _of_xl_vlms(name: str) -> tuple[str, ...]:
    if name not in xl_vlms_words.CLASSES:
        known = ", ".join(f"xl-vlms:{key}" for key in xl_vlms_words.CLASSES)
        raise ValueError(f"unknown word class 'xl-vlms:{name}'; expected one of {known}")
    return xl_vlms_words.CLASSES[name]


def named_words(text: str) -> tuple[str, ...]:
    """Returns the words of a class, words separated by commas, or one word.

    Args:
        text: the name of a class, or words.

    Raises:
        ValueError: there is no word; or a word is nearly the name of a class, such as "color".

    Examples:
        >>> from xlvlm_jax.data.words import named_words
        >>> named_words("dog"), named_words("cup, mug")
        (('dog',), ('cup', 'mug'))
    """
    name = text.strip()
    if is_class(name) or "," in name:
        words = class_words(name)
    elif near := difflib.get_close_matches(name.lower(), (*CLASSES, *_ALIASES), 1, 0.8):
        raise ValueError(
            f"{name!r} is nearly the class of words {near[0]!r}; write that, or '{name},' for the "
            "word itself"
        )
    else:
        words = tuple(filter(None, (name,)))
    if not words:
        raise ValueError(
            f"got no words in {text!r}; expected a word, words separated by commas, or one of "
            f"{', '.join(CLASSES)}"
        )
    return words


def is_class(name: str) -> bool:
    """Returns whether `class_words` knows a class of this name."""
    return _ALIASES.get(name, name) in CLASSES or name.startswith(("scenes:", "xl-vlms:"))


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


_TOKEN = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")


def has_inflected(text: str, words: Iterable[str]) -> bool:
    """Returns whether a text has one of the words, in any inflected form: "dogs" for "dog".

    Args:
        text: the text.
        words: words or phrases; the last word of a phrase may be inflected. A form must begin like
            the word, with a capital or not.
    """
    spoken = [found.group() for found in _TOKEN.finditer(text)]
    for word in words:
        *before, last = word.split() or [""]
        if not _TOKEN.fullmatch(last):
            continue  # a word with signs has no other forms
        for i in range(len(before), len(spoken)):
            if spoken[i - len(before) : i] == before and _inflects(spoken[i], last):
                return True
    return False


def _inflects(spoken: str, word: str) -> bool:
    spoken = re.sub("['\u2019]s?$", "", spoken)
    if spoken[:1] != word[:1]:
        return False
    return spoken == word or lemma(spoken.lower()).lower() in {
        word.lower(),
        lemma(word.lower()).lower(),
    }
