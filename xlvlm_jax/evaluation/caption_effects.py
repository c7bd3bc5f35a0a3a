"""Compares captions before and after steering towards words of a class."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from xlvlm_jax.data.word_rules import is_concept_word
from xlvlm_jax.metrics.caption_tokenizer import caption_words
from xlvlm_jax.metrics.captions import count_words, occurrences, phrases_of


class CaptionChanges(NamedTuple):
    """What steering towards words of a class changed, as numbers of captions unless noted."""

    samples: int
    changed: int  # captions that differ
    holding_before: int  # captions with one of the words
    holding_after: int
    gained: int  # captions that had none of the words before and have one now
    lost: int  # captions that had one of the words before and have none now
    words_before: int  # occurrences of the words
    words_after: int
    length_before: float  # mean number of words per caption
    length_after: float

    @property
    def gain(self) -> float:
        """The increase in the share of captions with one of the words, in [-1, 1]."""
        return (self.holding_after - self.holding_before) / self.samples


def caption_changes(
    before: Sequence[str], after: Sequence[str], words: Sequence[str]
) -> CaptionChanges:
    """Compares captions of the same images.

    Args:
        before, after: the model's captions.
        words: the words to count, as whole words, ignoring case.

    Returns:
        The changes.

    Raises:
        ValueError: the lists are empty or of different lengths, or there are no words.
    """
    if len(before) != len(after) or not before:
        raise ValueError(
            f"there are {len(before)} captions before and {len(after)} after; expected the same "
            "number, at least one"
        )
    old, new = (count_words(captions, words) for captions in (before, after))
    lengths = [np.mean([len(caption_words(text)) for text in texts]) for texts in (before, after)]
    return CaptionChanges(
        samples=len(before),
        changed=sum(a != b for a, b in zip(before, after, strict=True)),
        holding_before=int((old > 0).sum()),
        holding_after=int((new > 0).sum()),
        gained=int(((old == 0) & (new > 0)).sum()),
        lost=int(((old > 0) & (new == 0)).sum()),
        words_before=int(old.sum()),
        words_after=int(new.sum()),
        length_before=float(lengths[0]),
        length_after=float(lengths[1]),
    )


def count_each(captions: Sequence[str], words: Sequence[str]) -> Counter[str]:
    """Counts how often each word or phrase occurs in captions, of those that do.

    Args:
        captions: the model's captions.
        words: words or phrases, which match as a whole in any case; counted by the form in which
            captions are read ("T-shirt" as "t-shirt").

    Raises:
        ValueError: there are no words.
    """
    return Counter(
        " ".join(phrase) for text in captions for phrase in occurrences(text, phrases_of(words))
    )


def count_said(captions: Sequence[str]) -> dict[str, int]:
    """Counts the words of all captions, the most frequent first."""
    return dict(Counter(word for text in captions for word in caption_words(text)).most_common())


def count_valid(captions: Sequence[str]) -> dict[str, int]:
    """Counts the words of all captions that XL-VLMs counts as valid, the most frequent first.

    XL-VLMs splits at single spaces, so that a word with a mark ("dog.") is not valid.

    Args:
        captions: the model's captions.
    """
    said = (word.lower().strip() for text in captions for word in text.split(" "))
    valid = (word for word in said if is_concept_word(word, "xl-vlms"))
    return dict(Counter(valid).most_common())
