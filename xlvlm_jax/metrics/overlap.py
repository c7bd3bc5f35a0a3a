"""Overlap: how many of their words concepts share (CoX-LMM, NeurIPS 2024, section 4.1)."""

from collections.abc import Sequence
from itertools import permutations


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
    sets = [set(concept) for concept in words]
    shares = [len(a & b) / len(a) if a else 0.0 for a, b in permutations(sets, 2)]
    return sum(shares) / len(shares)
