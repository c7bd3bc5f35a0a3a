"""Overlap: how many of their words concepts share (CoX-LMM, NeurIPS 2024, section 4.1)."""

import collections
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def word_overlap(words: Sequence[Sequence[str]]) -> float:
    """Returns the mean over ordered pairs k != l of |words_k in words_l| / |words_k|.

    Args:
        words: the words of each concept; a concept without words shares none.

    Returns:
        a number in [0, 1]; 0, the best value, if no two concepts share a word.

    Raises:
        ValueError: there are fewer than two concepts.
    """
    if len(words) < 2:
        raise ValueError(f"overlap needs the words of two concepts or more, got {len(words)}")
    # How many concepts have a word gives all pairs at once: of thousands there are millions.
    having = collections.Counter(word for concept in words for word in set(concept))
    K = len(words)
    shares = (sum(having[w] - 1 for w in own) / len(own) for own in words if own)
    return sum(shares) / (K * (K - 1))


def overlap_matrix(words: Sequence[Sequence[str]]) -> Float[np.ndarray, "K K"]:
    """Returns the share of the words of concept k that concept l has too.

    Args:
        words: the words of each concept; repeats count as often as they are there.

    Returns:
        float64[K, K], row k and column l; the row of a concept without words is 0.
    """
    sets = [set(concept) for concept in words]

    def share(own: Sequence[str], other: set[str]) -> float:
        return sum(word in other for word in own) / len(own) if own else 0.0

    return np.array([[share(own, other) for other in sets] for own in words])
