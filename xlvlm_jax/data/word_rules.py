"""Rules for words of concepts: which decoded tokens may name a concept.

default    A number, or an English word of more than two letters and not a stop word; each once.
           English words are those that web2 or gcide (english-words) list in lower case, the
           dictionary words of simplemma and their inflected forms, and the words for COCO's
           objects; not names, which these lists write with a capital. Stop words are the function
           words of scikit-learn's list.
xl-vlms    As XL-VLMs filters (metrics/utils.py at a599fe9): web2 as it is, where names have a
           capital and match nothing, but without plurals and recent words; its own stop words,
           among them fire, side, front, top and system; whatever `float` reads; repeats stay.
"""

import re
from collections.abc import Iterable
from functools import cache
from typing import Literal, get_args

from xlvlm_jax.data import coco_objects, xl_vlms_words

Rules = Literal["default", "xl-vlms"]
RULES: tuple[Rules, ...] = get_args(Rules)

# In scikit-learn's list, but names of things, actions and qualities that a concept may be about.
_NO_FUNCTION_WORDS = """
    amount bill bottom call con cry describe detail empty fill find fire found front full give go
    interest keep made mill move name part put see serious show side sincere system take thick thin
    top whole"""


@cache
def stop_words(rules: Rules = "default") -> frozenset[str]:
    """Returns English stop words; by default the function words of scikit-learn's list.

    Args:
        rules: whose stop words, see the module.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    if rules == "xl-vlms":
        return (ENGLISH_STOP_WORDS - xl_vlms_words.NO_STOP_WORDS) | xl_vlms_words.FURTHER_STOP_WORDS
    return ENGLISH_STOP_WORDS.difference(_NO_FUNCTION_WORDS.split())


@cache
def english_words(rules: Rules = "default") -> frozenset[str]:
    """Returns the listed English words; by default those in lower case in web2 or gcide.

    Args:
        rules: "xl-vlms" for Webster's second edition ("web2") alone, names in upper case.
    """
    from english_words import get_english_words_set

    if rules == "xl-vlms":
        return frozenset(get_english_words_set(["web2"], alpha=False))
    listed = get_english_words_set(["web2", "gcide"], alpha=False)
    return frozenset(word for word in listed if word == word.lower())


@cache
def _names() -> frozenset[str]:
    """Returns what web2 lists with a capital, in lower case: names of people and places."""
    from english_words import get_english_words_set

    listed = get_english_words_set(["web2"], alpha=False)
    return frozenset(word.lower() for word in listed if word != word.lower())


@cache
def _objects() -> frozenset[str]:
    """Returns the single words for COCO's objects."""
    named = (word.lower().split() for words in coco_objects.WORDS.values() for word in words)
    return frozenset(word for words in named for word in words)


@cache
def lemma(word: str) -> str:
    """Returns the dictionary form of an English word; the word itself if it is unknown.

    Args:
        word: a word in lower case; the form of a name begins with a capital.
    """
    import simplemma

    return simplemma.lemmatize(word, lang="en")


@cache
def is_english(word: str) -> bool:
    """Returns whether a lower-case word is English and no name, by the default rules."""
    import simplemma

    form = lemma(word)
    if word in _objects() or form in _objects():
        return True
    if re.search(r"[\d_]", word):
        return False
    # Two of three witnesses: that web2 has it as a word, as a name, that simplemma has it as one.
    listed, is_name = word in english_words(), form != form.lower()
    if word in _names() or is_name:
        return listed and not (word in _names() and is_name)
    return listed or form in english_words() or simplemma.is_known(word, "en")


def is_concept_word(word: str, rules: Rules = "default") -> bool:
    """Returns whether a lower-case, stripped word can represent a concept.

    Args:
        word: the word.
        rules: the rules, see the module.

    Raises:
        ValueError: there are no such rules.
    """
    if rules == "default":
        listed, number = is_english, word.isdecimal()
    elif rules == "xl-vlms":
        listed, number = english_words(rules).__contains__, _is_number(word)
    else:
        raise ValueError(f"unknown word rules {rules!r}; expected {' or '.join(RULES)}")
    return number or (len(word) > 2 and word not in stop_words(rules) and listed(word))


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def concept_words(candidates: Iterable[str], limit: int, rules: Rules = "default") -> list[str]:
    """Returns the first words that can represent a concept.

    Args:
        candidates: texts, lower-cased and stripped before the test.
        limit: maximum number of words, each of which counts once; by the rules of XL-VLMs repeats
            stay and count.
        rules: the rules, see the module.

    Raises:
        ValueError: there are no such rules.
    """
    words: Iterable[str] = (text.lower().strip() for text in candidates)
    if rules != "xl-vlms":
        words = dict.fromkeys(words)
    return [word for word in words if is_concept_word(word, rules)][:limit]
