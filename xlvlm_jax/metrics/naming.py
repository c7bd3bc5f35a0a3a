"""Naming accuracy: do the words of a concept name what it stands for?

For each value of an attribute, its best concept is named right if one of the concept's words names
the value. Against it stands the share of all concepts whose words name the value, which is what
words that are shuffled among concepts reach on average.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Naming(NamedTuple):
    """How many values are named right, in [0, 1].

    Attributes:
        accuracy: share of the values that the words of their concept name.
        shuffled: the mean over all ways to shuffle the words among concepts.
    """

    accuracy: float
    shuffled: float


def naming_accuracy(
    words: Sequence[Sequence[str]],
    best: Int[np.ndarray, " V"],
    names: Sequence[AbstractSet[str]],
) -> Naming:
    """Returns the share of values that the words of their best concepts name.

    Args:
        words: for each of K concepts its words; a concept may have none.
        best: int[V], the concept of each value.
        names: for each value the words that name it.

    Raises:
        ValueError: there are no values, the numbers differ, or there is no such concept.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import metrics
        >>> words, best = [["red", "ruby"], ["sea"]], np.array([0, 1])
        >>> metrics.naming_accuracy(words, best, [{"red", "crimson"}, {"dog"}])
        Naming(accuracy=0.5, shuffled=0.25)
    """
    if not len(best) or len(best) != len(names):
        raise ValueError(
            f"{len(best)} values have a concept and {len(names)} have names; expected the same, "
            "one or more"
        )
    if best.min() < 0 or best.max() >= len(words):
        raise ValueError(
            f"concepts {best.min()} to {best.max()} are asked for; expected 0 to {len(words) - 1}"
        )
    named = np.array([[bool(known & set(said)) for said in words] for known in names])
    return Naming(float(named[np.arange(len(best)), best].mean()), float(named.mean()))
