"""Stability: whether another seed finds the same concepts. K concepts, D width."""

from collections.abc import Sequence
from itertools import combinations

import jax
import numpy as np
from jaxtyping import Float

from xlvlm_jax.shift import match

AnyArray = jax.Array | np.ndarray


def stability(dictionaries: Sequence[Float[AnyArray, "K D"]]) -> float:
    """Mean cosine of matched concepts over all pairs of dictionaries, in [-1, 1].

    The concepts of two dictionaries are matched one to one for the highest total cosine (the
    Hungarian method). 1 where each is a permutation of the other; a concept that is zero has
    cosine 0 with all.

    Raises ValueError for fewer than two dictionaries, or other numbers of concepts or widths.
    """
    if len(dictionaries) < 2:
        raise ValueError(f"stability compares two dictionaries or more, got {len(dictionaries)}")
    units = []
    for components in dictionaries:
        rows = np.asarray(components, np.float64)
        norms = np.linalg.norm(rows, axis=-1, keepdims=True)
        units.append(rows / np.where(norms > 0, norms, 1))
    return float(np.mean([np.sum(a * b[match(a, b)], axis=1) for a, b in combinations(units, 2)]))
