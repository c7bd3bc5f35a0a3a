"""Scores captions against human ones: CIDEr, BLEU and ROUGE-L; and finds words of a class in them.

The scores are those of the COCO evaluation (Chen et al. 2015) in the package pycocoevalcap, on the
words of `caption_words`. Its METEOR and SPICE are Java programs, and only run if Java is installed.
"""

import importlib.util
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from xlvlm_jax.metrics.caption_tokenizer import caption_words


class CaptionScores(NamedTuple):
    """How well N captions agree with human ones."""

    values: dict[str, float]  # by metric; see `caption_scores` for the range of CIDEr
    cider: Float[np.ndarray, " N"]  # of each caption
    left_out: dict[str, str]  # metric -> why it was not computed


def caption_scores(
    captions: Sequence[str], references: Sequence[Sequence[str]], *, java: bool = False
) -> CaptionScores:
    """Returns CIDEr, BLEU-1 to BLEU-4 and ROUGE-L of captions; with `java`, also METEOR and SPICE.

    CIDEr weights words by their rarity in the references of all images: for a single image it is 0,
    and values for different sets of images are not comparable. It is the mean over sequences of one
    to four words, each 10 if a caption and all its references agree, and 0 if the caption has none.
    A caption that equals all its references scores 10 with four or more words, 7.5 with three, 5
    with two, and 2.5 with one (less if no sequence of some length is rare). ROUGE-L takes the best
    precision and the best recall over an image's references, as pycocoevalcap does, so it can be
    above that of any single reference.

    Args:
        captions: one per image.
        references: human captions of each image.
        java: run METEOR and SPICE; if Java or SPICE's models are missing, they are listed as left
            out.

    Raises:
        ValueError: there are no captions, the numbers of captions and references differ, an image
            has no references, or pycocoevalcap is not installed.
    """
    if not captions or len(captions) != len(references):
        raise ValueError(
            f"there are {len(captions)} captions and references of {len(references)} images; "
            "expected one caption per image"
        )
    require_scorable(references)
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    given, people = _for_package(captions, references)
    mean, each = Cider().compute_score(people, given)
    bleu = Bleu(4).compute_score(people, given, verbose=0)[0]
    values = {"CIDEr": mean, **{f"BLEU-{n}": value for n, value in enumerate(bleu, start=1)}}
    values["ROUGE-L"] = Rouge().compute_score(people, given)[0]
    left_out = {}
    for name in ("METEOR", "SPICE"):
        reason = _obstacle(name) if java else "not requested"
        if reason is None:
            try:
                values[name] = _run_java(name, people, given)
            except (OSError, ValueError, subprocess.CalledProcessError) as error:
                reason = f"its Java program failed ({type(error).__name__})"
        if reason is not None:
            left_out[name] = reason
    return CaptionScores({k: float(v) for k, v in values.items()}, np.asarray(each), left_out)


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns the mean CIDEr of captions alone, see `caption_scores`.

    Args:
        captions: one per image.
        references: human captions of each image.

    Raises:
        ValueError: an image has no references, or pycocoevalcap is not installed.
    """
    require_scorable(references)
    from pycocoevalcap.cider.cider import Cider

    return float(Cider().compute_score(*reversed(_for_package(captions, references)))[0])


def _for_package(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Returns captions and references as pycocoevalcap takes them, split into words."""
    given = {i: [" ".join(caption_words(caption))] for i, caption in enumerate(captions)}
    people = {
        i: [" ".join(caption_words(text)) for text in texts] for i, texts in enumerate(references)
    }
    return given, people


def require_scorable(references: Sequence[Sequence[str]]) -> None:
    """Checks that captions of images can be scored, before there are any.

    Args:
        references: human captions of each image.

    Raises:
        ValueError: an image has no references, or pycocoevalcap is not installed.
    """
    if bare := [number for number, texts in enumerate(references) if not texts]:
        raise ValueError(f"image number {bare[0]} has no references; evaluate on captioned images")
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise ValueError(
            "captions are scored by pycocoevalcap, which is not installed; "
            "pip install 'xlvlm-jax[captions]'"
        )


def _obstacle(name: str) -> str | None:
    """Returns why a metric's Java program can't run here; None if it can."""
    if shutil.which("java") is None:
        return "Java is not installed"
    from pycocoevalcap.spice import get_stanford_models

    models = Path(get_stanford_models.__file__).parent / "lib" / "stanford-corenlp-3.6.0-models.jar"
    if name == "SPICE" and not models.is_file():
        return (
            "its models are not installed; pycocoevalcap.spice.get_stanford_models downloads them"
        )
    return None


def _run_java(name: str, people: dict[int, list[str]], given: dict[int, list[str]]) -> float:
    if name == "SPICE":
        from pycocoevalcap.spice.spice import Spice

        return float(Spice().compute_score(people, given)[0])
    from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    try:
        return meteor.compute_score(people, given)[0]
    finally:
        # A program that ended too early leaves it locked, and the destructor would wait forever.
        if meteor.lock.locked():
            meteor.lock.release()


def holding(captions: Iterable[str], words: Iterable[str]) -> Bool[np.ndarray, " N"]:
    """Returns which captions have one of the words.

    Args:
        captions: N captions.
        words: words or phrases, which match as a whole in any case.

    Returns:
        bool[N].

    Raises:
        ValueError: there are no words.
    """
    return count_words(captions, words) > 0


def count_words(captions: Iterable[str], words: Iterable[str]) -> Int[np.ndarray, " N"]:
    """Returns how often the words occur in each caption.

    Args:
        captions: N captions.
        words: words or phrases, which match as a whole in any case.

    Returns:
        int[N].

    Raises:
        ValueError: there are no words.
    """
    phrases = phrases_of(words)
    return np.array([sum(1 for _ in occurrences(text, phrases)) for text in captions], int)


def occurrences(caption: str, phrases: Set[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Yields each occurrence of phrases in a caption.

    Args:
        caption: a text.
        phrases: what `phrases_of` returns.
    """
    said = caption_words(caption)
    for n in {len(phrase) for phrase in phrases}:
        grams = (tuple(said[i : i + n]) for i in range(len(said) - n + 1))
        yield from (gram for gram in grams if gram in phrases)


def phrases_of(words: Iterable[str]) -> set[tuple[str, ...]]:
    """Returns words or phrases as `caption_words` splits them.

    Raises:
        ValueError: there are no words.
    """
    phrases = {tuple(caption_words(word)) for word in words} - {()}
    if not phrases:
        raise ValueError("there are no words to look for in captions; name some, or a class")
    return phrases


def describe(scores: CaptionScores) -> dict[str, Any]:
    """Returns the scores as JSON values."""
    return {**scores.values, "left out": scores.left_out}
