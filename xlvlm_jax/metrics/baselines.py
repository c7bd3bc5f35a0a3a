"""Baselines for words: random words, and noise images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from xlvlm_jax.data.word_rules import Rules, concept_words


def vocabulary_words(tokenizer: Any, rules: Rules = "default") -> list[str]:
    """Returns the words of a vocabulary that can represent a concept, in the order of their ids.

    Each is a single token: the words that a concept could be read as with this tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        rules: which tokens count as words, see `xlvlm_jax.data.word_rules`.
    """
    ids = sorted(tokenizer.get_vocab().values())
    texts = tokenizer.batch_decode([[i] for i in ids], skip_special_tokens=True)
    return concept_words(texts, len(texts), rules)


def random_words(
    words: Sequence[Sequence[str]], vocabulary: Sequence[str], *, seed: int = 0
) -> list[list[str]]:
    """Draws as many random words per concept as it has.

    Args:
        words: the words of each concept.
        vocabulary: words to draw from, without replacement within a concept.
        seed: random seed.

    Raises:
        ValueError: the vocabulary is too small.
    """
    most = max(map(len, words), default=0)
    if len(vocabulary) < most:
        raise ValueError(
            f"a concept has {most} words but the vocabulary has {len(vocabulary)} to draw from; "
            "ground with fewer words"
        )
    # One shuffle per concept, so that its first words do not depend on how many there are.
    rng = np.random.default_rng(seed)
    shuffled = (rng.permutation(len(vocabulary)) for _ in words)
    return [
        [vocabulary[int(i)] for i in order[: len(concept)]]
        for concept, order in zip(words, shuffled, strict=True)
    ]


def noise_images(count: int, side: int, *, seed: int = 0) -> list[Image.Image]:
    """Returns square RGB images of independent uniform pixels.

    Args:
        count: number of images.
        side: pixels per side.
        seed: random seed.
    """
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, side, side, 3), np.uint8)
    return [Image.fromarray(image) for image in pixels]
