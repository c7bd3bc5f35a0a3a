"""Attribute scores: how well concepts separate known attributes of the samples.

Each sample is assigned to its most active concept, those that activate none to a class of their
own. The score is the normalised mutual information
of that assignment with an attribute, NMI = I(concept; attribute) / mean of their entropies. It is 1
if each determines the other, and near 0 if they are independent; with few samples and many concepts
it exceeds 0 by chance, and shuffled assignments show by how much.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from xlvlm_jax.metrics.labels import UNKNOWN, Labels, factorise
from xlvlm_jax.metrics.most_activated import NONE, strongest_concept


class AttributeScore(NamedTuple):
    """How well one attribute is separated.

    Attributes:
        nmi: normalised mutual information of the most active concept and the attribute, in [0, 1].
        random_mean: mean over shuffled assignments, with the same concept sizes as the real ones.
        random_std: their standard deviation.
        num_samples: number of samples whose attribute is known.
    """

    nmi: float
    random_mean: float
    random_std: float
    num_samples: int


def attribute_scores(
    activations: Float[jax.Array | np.ndarray, "N K"],
    attributes: Mapping[str, Sequence[Any] | Labels],
    *,
    num_random: int = 20,
    seed: int = 0,
) -> dict[str, AttributeScore]:
    """Returns the score of each attribute, {name: AttributeScore}.

    Args:
        activations: float[N, K].
        attributes: {name: N values, or `Labels`}; samples with None are left out.
        num_random: number of shuffled assignments that the baseline averages.
        seed: random seed of the shuffles.

    Raises:
        ValueError: an attribute does not have N values, or is unknown for all samples.
    """
    rng = np.random.default_rng(seed)
    assignment, K = strongest_concept(np.asarray(activations)), activations.shape[1]
    assignment = np.where(assignment == NONE, K, assignment)
    scores = {}
    for name, values in attributes.items():
        labels = values if isinstance(values, Labels) else factorise(values)
        if len(labels.codes) != len(assignment):
            raise ValueError(
                f"attribute {name!r} has {len(labels.codes)} values, expected {len(assignment)}, "
                "one per sample"
            )
        known = labels.codes != UNKNOWN
        if not known.any():
            raise ValueError(f"attribute {name!r} is unknown for all samples; omit it")
        labels, concepts = labels.take(known), assignment[known]
        random = [
            _mutual_information(labels.counts_by(rng.permutation(concepts), K + 1))
            for _ in range(num_random)
        ]
        scores[name] = AttributeScore(
            nmi=_mutual_information(labels.counts_by(concepts, K + 1)),
            random_mean=float(np.mean(random)),
            random_std=float(np.std(random)),
            num_samples=len(concepts),
        )
    return scores


def _mutual_information(counts: Int[np.ndarray, "K V"]) -> float:
    """Returns the normalised mutual information of rows and columns, from their joint counts."""
    from scipy.stats import entropy
    from sklearn.metrics import mutual_info_score

    used = counts[counts.any(axis=1)][:, counts.any(axis=0)]
    if used.shape == (1, 1):  # neither varies, so they are the same
        return 1.0
    entropies = [entropy(used.sum(axis=axis)) for axis in (0, 1)]
    shared = mutual_info_score(None, None, contingency=used)
    return float(shared / np.mean(entropies)) if shared > np.finfo(float).eps else 0.0
