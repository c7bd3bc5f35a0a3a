"""What words are held against: words drawn at random, and images of noise."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from xlvlm_jax.data.words import concept_words


def vocabulary_words(tokenizer: Any) -> list[str]:
    """The words of a vocabulary that may stand for a concept: those that a concept could be read
    as, were it read with this tokenizer. Each is one token; in order of their ids.
    """
    ids = sorted(tokenizer.get_vocab().values())
    texts = tokenizer.batch_decode([[i] for i in ids], skip_special_tokens=True)
    return concept_words(texts, len(texts))


def random_words(
    words: Sequence[Sequence[str]], vocabulary: Sequence[str], *, seed: int = 0
) -> list[list[str]]:
    """As many words for each concept as it has, drawn from the vocabulary without replacement.

    The same seed gives the same words. Raises ValueError for a vocabulary that is too small.
    """
    most = max(map(len, words), default=0)
    if len(vocabulary) < most:
        raise ValueError(
            f"a concept has {most} words, the vocabulary {len(vocabulary)} to draw from; "
            "ground with fewer words"
        )
    # A shuffle a concept, so that its first words do not depend on how many there are.
    rng = np.random.default_rng(seed)
    shuffled = (rng.permutation(len(vocabulary)) for _ in words)
    return [
        [vocabulary[int(i)] for i in order[: len(concept)]]
        for concept, order in zip(words, shuffled, strict=True)
    ]


def noise_images(count: int, side: int, *, seed: int = 0) -> list[Image.Image]:
    """Square RGB images of independent uniform pixels, the same for the same seed."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, side, side, 3), np.uint8)
    return [Image.fromarray(image) for image in pixels]
