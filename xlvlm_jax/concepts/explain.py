"""Explains one sample by the concepts that are most active in it (CoX-LMM, NeurIPS 2024, 4.3)."""

from typing import NamedTuple

import numpy as np

from xlvlm_jax.concepts.decomposition import project
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.features.reader import Features, choose_site
from xlvlm_jax.features.samples import columns


class ActiveConcept(NamedTuple):
    """A concept that is active in a sample."""

    concept: int
    activation: float
    words: list[str]
    images: list[str]  # files


class SampleExplanation(NamedTuple):
    """What a sample is, and its most active concepts, the strongest first."""

    sample: str
    image: str | None
    prediction: str | None
    concepts: list[ActiveConcept]


def explain_sample(
    features: Features,
    concepts: Concepts,
    sample: str,
    *,
    num_concepts: int = 3,
    site: str | None = None,
) -> SampleExplanation:
    """Returns the concepts that are most active in a sample, with their words and images.

    Args:
        features: features that hold the sample, such as those of a test split.
        concepts: concepts of the same site and model; their words and images are those that
            grounding found.
        sample: the ID of the sample, or the name of its image file.
        num_concepts: maximum number of concepts; those that are not active at all are left out.
        site: the site of the states; None for that of the concepts.

    Raises:
        ValueError: there is no such sample, it has no rows, or the widths differ.
    """
    if num_concepts < 1:
        raise ValueError(f"num_concepts must be at least 1, got {num_concepts}")
    number = _number_of(features, sample)
    rows = np.flatnonzero(features.sample_rows == number)
    if not len(rows):
        raise ValueError(
            f"sample {sample!r} has no states in {features.path}: the token was not found, or it "
            "could not be read; choose another"
        )
    site = choose_site(features, site or concepts.source.get("site"))
    states = np.asarray(features.stored(site).take(rows), np.float32)
    activations = np.asarray(project(states, concepts)).mean(axis=0)
    strongest = np.argsort(-activations, kind="stable")[:num_concepts]
    described = features.samples[number]
    return SampleExplanation(
        sample=str(described.get("id", number)),
        image=described.get("image"),
        prediction=described.get("prediction"),
        concepts=[
            ActiveConcept(
                concept=int(k),
                activation=float(activations[k]),
                words=[] if concepts.words is None else list(concepts.words[k]),
                images=[] if concepts.images is None else list(concepts.images[k]),
            )
            for k in strongest
            if activations[k] > 0
        ],
    )


def _number_of(features: Features, sample: str) -> int:
    ids, images = columns(features.samples, "id", "image")
    for number, (name, image) in enumerate(zip(ids, images, strict=True)):
        if sample in (str(name), str(image), str(image).rsplit("/", 1)[-1]):
            return number
    some = ", ".join(map(str, ids[:3]))
    raise ValueError(
        f"no sample {sample!r} in {features.path}; expected an ID such as {some}, or the name of "
        "an image file"
    )
