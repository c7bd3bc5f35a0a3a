"""Attributes of the samples known from the data set, and how well concepts predict them."""

from collections.abc import Mapping

import numpy as np

from xlvlm_jax.concepts.decomposition import project
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.features.reader import Features, choose_site, site_of
from xlvlm_jax.features.samples import unplaced
from xlvlm_jax.metrics import AttributeScore, attribute_scores
from xlvlm_jax.metrics.labels import Labels, factorise_each


def known_attributes(features: Features) -> dict[str, Labels]:
    """Returns {attribute: its value at each row} for the attributes that the data set provides."""
    described = (sample.get("attributes") or {} for sample in unplaced(features.samples))
    of_samples = factorise_each(described, len(features.samples))
    rows = {name: labels.take(features.sample_rows) for name, labels in of_samples.items()}
    # An attribute that all rows share (the kind, if the token of interest names it) is
    # uninformative.
    return {name: labels for name, labels in rows.items() if np.count_nonzero(labels.counts()) > 1}


def score_attributes(concepts: Concepts, features: Features) -> dict[str, AttributeScore]:
    """Returns how well the most active concept predicts each attribute.

    Args:
        concepts: the concepts to score.
        features: the features they were learnt on, or others of the same site.
    """
    site = site_of(concepts.source, features)
    activations = None
    if concepts.source.get("features") == str(features.path.resolve()):
        activations = concepts.activations
    if activations is None:  # of other rows, or left out
        activations = project(features.matrix(choose_site(features, site)), concepts)
    return attribute_scores(np.asarray(activations), known_attributes(features))


def as_json(scores: Mapping[str, AttributeScore]) -> dict[str, dict[str, float]]:
    """Returns the scores in the form that the report reads."""
    return {
        name: {"concepts": round(score.nmi, 4), "random": round(score.random_mean, 4)}
        for name, score in scores.items()
    }
