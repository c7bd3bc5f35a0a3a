"""What a data set knows of the samples, and how well concepts tell it."""

from collections.abc import Mapping

import numpy as np

from xlvlm_jax.concepts.decomposition import project
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.features.reader import Features, choose_site
from xlvlm_jax.features.samples import unplaced
from xlvlm_jax.metrics import AttributeScore, attribute_scores
from xlvlm_jax.metrics.labels import Labels, factorise_each


def known_attributes(features: Features) -> dict[str, Labels]:
    """{attribute: its value at each row}, of the attributes that the data set keeps of samples."""
    described = (sample.get("attributes") or {} for sample in unplaced(features.samples))
    of_samples = factorise_each(described, len(features.samples))
    rows = {name: labels.take(features.sample_rows) for name, labels in of_samples.items()}
    # What all rows share (the kind, when the token of interest names it) tells nothing.
    return {name: labels for name, labels in rows.items() if np.count_nonzero(labels.counts()) > 1}


def score_attributes(concepts: Concepts, features: Features) -> dict[str, AttributeScore]:
    """How well the most activated concept tells the attributes, on learnt or on other features."""
    site = concepts.source.get("site")
    if concepts.source.get("features") == str(features.path.resolve()):
        activations = concepts.activations
    else:
        activations = project(features.matrix(choose_site(features, site)), concepts)
    return attribute_scores(np.asarray(activations), known_attributes(features))


def as_json(scores: Mapping[str, AttributeScore]) -> dict[str, dict[str, float]]:
    """Scores as the report reads them."""
    return {
        name: {"concepts": round(score.nmi, 4), "random": round(score.random_mean, 4)}
        for name, score in scores.items()
    }
