"""Stability: whether another seed finds the same concepts. K concepts, D width."""

from collections.abc import Sequence
from itertools import combinations

import jax
import numpy as np
from jaxtyping import Float

from xlvlm_jax.solvers.matching import matched_cosines

AnyArray = jax.Array | np.ndarray


def stability(dictionaries: Sequence[Float[AnyArray, "K D"]]) -> float:
    """Returns the mean cosine of matched concepts over all pairs of dictionaries.

    The concepts of two dictionaries are matched one to one for the highest total cosine (the
    Hungarian method).

    Args:
        dictionaries: two or more float[K, D]; a concept of zeros has cosine 0 with all.

    Returns:
        a number in [-1, 1]; 1 if each is a permutation of the other.

    Raises:
        ValueError: there are fewer than two dictionaries, or their shapes differ.
    """
    if len(dictionaries) < 2:
        raise ValueError(f"stability compares two dictionaries or more, got {len(dictionaries)}")
    pairs = combinations(dictionaries, 2)
    return float(np.mean([matched_cosines(a, b) for a, b in pairs]))
