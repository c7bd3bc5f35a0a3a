"""Questions about what is in a scene and what is not, as POPE asks them, and biased annotations.

POPE (Li et al. 2023) draws the objects that it asks about in vain in three ways:
    random        any other kind
    popular       the most frequent kinds of the data set
    adversarial   what usually goes with what is there

A scene shows one kind of object, and kind and place are independent. What usually goes with a
picture is therefore a prior that is not in the pictures: the `COMPANIONS` of its place. People who
follow it name a companion in captions and say yes when asked about it, though it is not drawn;
a model that is fine-tuned on their annotations hallucinates.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from . import words
from .ask import EXISTS, Question, answers_of
from .language import FAMILIES, choose, split_words, with_article
from .scene import KINDS, Scene, pick

Negatives = Literal["random", "popular", "adversarial"]
NEGATIVES: tuple[Negatives, ...] = get_args(Negatives)

# What usually is at a place; the second one counts in pictures of the first.
COMPANIONS = {
    "beach": ("boat", "ball"),
    "street": ("car", "bus"),
    "forest": ("bird", "rabbit"),
    "snow": ("train", "dog"),
    "field": ("rabbit", "ball"),
    "city": ("bus", "plane"),
}
ASKED = EXISTS[0]
_JOINTS = {"and {a} {noun}": 3, "with {a} {noun}": 2, "near {a} {noun}": 1}


def companion(kind: str, place: str) -> str:
    """Returns the kind that usually goes with a place, other than the one that is there.

    Args:
        kind: what is there, one of KINDS.
        place: one of PLACES.
    """
    first, second = COMPANIONS[place]
    return second if kind == first else first


def absent_kind(
    kind: str, place: str, negatives: Negatives, counts: Mapping[str, int], rng: random.Random
) -> str:
    """Returns a kind that is not in a picture, drawn as POPE does.

    Args:
        kind: what is there, one of KINDS.
        place: one of PLACES.
        negatives: how to draw it, see the module.
        counts: how many pictures of the data set show each kind, which "popular" needs.
        rng: draws; "popular" and "adversarial" are determined without it.

    Raises:
        ValueError: the way of drawing is unknown.
    """
    others = [each for each in KINDS if each != kind]
    if negatives == "random":
        return pick(rng, others)
    if negatives == "popular":
        return max(others, key=lambda each: counts.get(each, 0))
    if negatives == "adversarial":
        return companion(kind, place)
    expected = ", ".join(NEGATIVES)
    raise ValueError(f"unknown negatives {negatives!r}; expected one of {expected}")


def presence_question(kind: str) -> str:
    """Returns the question whether a kind is in the picture."""
    one, many = next(iter(words.NOUNS[kind]))
    return ASKED.format(one=one, many=many)


def mentioned_kinds(caption: str) -> list[str]:
    """Returns the kinds of objects that a caption mentions, including synonyms, once per mention.

    Args:
        caption: a text; case does not matter.

    Examples:
        >>> from xlvlm_jax.data import scenes
        >>> scenes.mentioned_kinds("two puppies on the beach and a boat")
        ['dog', 'boat']
    """
    kinds = FAMILIES["kind"]
    return [str(kinds[word]) for word in split_words(caption.lower()) if word in kinds]


def biased_captions(scene: Scene, texts: Sequence[str], share: float) -> list[str]:
    """Returns captions of which a share also name the companion, which is not drawn.

    Args:
        scene: the scene.
        texts: its captions.
        share: the share, in [0, 1], of captions that do.

    Returns:
        One caption per text.
    """
    rng = random.Random(f"companions/{scene.seed}")
    one, _ = next(iter(words.NOUNS[companion(scene.kind, scene.place)]))
    told = []
    for text in texts:
        joint = with_article(choose(rng, _JOINTS).format(a="{a}", noun=one))
        told.append(f"{text} {joint}" if rng.random() < share else text)
    return told


def biased_question(scene: Scene, share: float) -> Question:
    """Returns a question about the companion; in a share of the scenes people say that it is there.

    Args:
        scene: the scene.
        share: the share, in [0, 1], of scenes in which they do.
    """
    rng = random.Random(f"companion question/{scene.seed}")
    one, many = next(iter(words.NOUNS[companion(scene.kind, scene.place)]))
    said = "yes" if rng.random() < share else "no"
    text = pick(rng, EXISTS).format(one=one, many=many)
    return Question(text, answers_of(rng, said), said, "yes/no", "exists")
