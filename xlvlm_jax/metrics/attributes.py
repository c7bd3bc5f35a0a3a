"""Attributes: how well concepts separate what is known of the samples.

Each sample is assigned to its most activated concept; the score is the normalised mutual
information of that assignment with an attribute, NMI = I(concept; attribute) / mean of their
entropies. It is 1 where each tells the other, and near 0 where they are independent; but above 0
for few samples and many concepts, how much above is what shuffled assignments get.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float


class AttributeScore(NamedTuple):
    """How one attribute is separated."""

    nmi: float  # in [0, 1]
    random_mean: float  # of shuffled assignments, whose concepts are as large as the real ones
    random_std: float
    num_samples: int  # those of which the attribute is known


def attribute_scores(
    activations: Float[jax.Array | np.ndarray, "N K"],
    attributes: Mapping[str, Sequence[Any]],
    *,
    num_random: int = 20,
    seed: int = 0,
) -> dict[str, AttributeScore]:
    """The score of each attribute, {name: AttributeScore}.

    Args:
        activations: float[N, K].
        attributes: {name: N values}; None where a sample has no such attribute: it is left out.
        num_random: how many shuffled assignments the baseline is the mean of.

    Raises ValueError when an attribute has not N values, or is known of no sample.
    """
    from sklearn.metrics import normalized_mutual_info_score

    rng = np.random.default_rng(seed)
    assignment = np.argmax(np.asarray(activations), axis=1)
    scores = {}
    for name, values in attributes.items():
        if len(values) != len(assignment):
            raise ValueError(
                f"attribute {name!r} has {len(values)} values, expected {len(assignment)},"
                " one a sample"
            )
        known = np.array([value is not None for value in values], bool)
        if not known.any():
            raise ValueError(f"attribute {name!r} is known of no sample; leave it out")
        labels = [str(value) for value in values if value is not None]
        concepts = assignment[known]
        random = [
            normalized_mutual_info_score(labels, rng.permutation(concepts))
            for _ in range(num_random)
        ]
        scores[name] = AttributeScore(
            nmi=float(normalized_mutual_info_score(labels, concepts)),
            random_mean=float(np.mean(random)),
            random_std=float(np.std(random)),
            num_samples=len(labels),
        )
    return scores
