"""Explains one sample by the concepts that are most active in it (CoX-LMM, NeurIPS 2024, 4.3), and
by those that its answer depends on most.

K concepts, T positions, D width, h x w cells of a picture.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ports import VLM
from ports.inputs.patch_layout import PatchLayout
from xlvlm_jax.concepts import maps
from xlvlm_jax.concepts.decomposition import project
from xlvlm_jax.concepts.picture_maps import concept_site, picture_layouts
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.concepts.removal import answers_without, concept_directions, removal_effects
from xlvlm_jax.data.batches import make_batch
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.features.reader import (
    Features,
    choose_site,
    require_states,
    sample_of,
    site_of,
)
from xlvlm_jax.features.samples import columns, name_of
from xlvlm_jax.storage.same_model import require_model

MOST_REMOVED = 256  # concepts that are removed one by one, in 33 passes of the model


class ActiveConcept(NamedTuple):
    """A concept that is active in a sample."""

    concept: int
    activation: float
    words: list[str]
    images: list[str]  # files
    # Only where the model ran:
    effect: float | None = None  # change of the answer's log-probability when it is removed
    answer_without: str | None = None  # what the model answers then
    map: np.ndarray | None = None  # float32[h, w], its activation in each cell of the picture


class SampleExplanation(NamedTuple):
    """What a sample is, and its most active concepts, the strongest first."""

    sample: str
    image: str | None
    prediction: str | None
    concepts: list[ActiveConcept]
    # Only where the model ran:
    prompt: str | None = None
    log_probability: float | None = None  # of the answer
    layout: PatchLayout | None = None  # the cells of the maps
    num_removed: int | None = None  # how many concepts were removed, the most active ones


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
        ValueError: there is no such sample, it has no rows, or the concepts are of another site,
            model or width.
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
    at = choose_site(features, site or site_of(concepts.source, features))
    require_states(concepts.source, features, at, "explained", named=site is not None)
    states = np.asarray(features.stored(at).take(rows), np.float32)
    activations = np.asarray(project(states, concepts)).mean(axis=0)
    strongest = np.argsort(-activations, kind="stable")[:num_concepts]
    described = features.samples[number]
    return SampleExplanation(
        sample=name_of(number, described.get("id")),
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


def explain_picture(
    vlm: VLM,
    concepts: Concepts,
    sample: Sample,
    *,
    num_concepts: int = 3,
    site: str | None = None,
    of_image: bool = False,
    max_new_tokens: int = 20,
    progress: Callable[[int, int], None] | None = None,
) -> SampleExplanation:
    """Runs a model on a picture, and explains its answer by concepts.

    Args:
        vlm: the model that the concepts were learnt on.
        concepts: concepts, grounded in words.
        sample: picture and prompt.
        num_concepts: number of concepts with the highest activations, and of those whose removal
            lowers the answer's probability most, to return. Of more than 256 concepts only so many
            are removed, those with the highest activations.
        site: the site of the concepts, where they do not name it.
        of_image: whether the concepts were learnt on image tokens: their activation is the highest
            in a cell of the picture. Otherwise it is the mean over the states that predicted the
            tokens of the answer.
        max_new_tokens: maximum number of tokens of an answer.
        progress: called with (concepts removed, number to remove) after every few of them.

    Returns:
        The concepts by activation, the strongest first, each with its map over the picture, its
        effect, and the answer without it (`concept_directions` says what is removed).

    Raises:
        ValueError: the concepts are of another site, width or model, have no words, or are a single
            centroid, which has no direction; the answer is empty; the model's image tokens have no
            place; or a picture that is too long has no cells, `of_image`.
        OSError: the picture can't be read.
    """
    if num_concepts < 1:
        raise ValueError(f"num_concepts must be at least 1, got {num_concepts}")
    if concepts.words is None or not any(concepts.words):
        raise ValueError("the concepts have no words; ground them first with `xlvlm ground`")
    concepts.require_one_site("an explanation by effects")
    directions = concept_directions(concepts)
    require_model(concepts.source, vlm, "the concepts were learnt on the states of")
    site = concept_site(vlm, site, concepts)
    batch = make_batch(vlm, [sample], 1, strict=True)
    (inputs,) = batch.inputs
    ((layout,),) = layouts = picture_layouts(vlm, inputs, batch.sizes)
    if of_image and not layout.positions.size:
        raise ValueError(
            f"the picture {sample.image} is so long that none of its cells is left; crop it"
        )
    prompt_states = np.asarray(vlm.states(inputs, sites=[site])[site], np.float32)
    drawn = maps.concept_maps(prompt_states, concepts, layouts)[0][0]
    made = vlm.generate(inputs, max_new_tokens=max_new_tokens, sites=[site])
    tokens = np.asarray(made.tokens[0])
    (text,) = vlm.decode(tokens[None])
    answer = text.strip()
    if of_image:
        activations = np.nanmax(drawn, axis=(1, 2))
    else:
        ended = np.isin(tokens, vlm.eos_tokens)
        length = int(np.argmax(ended)) if ended.any() else len(tokens)
        states = np.asarray(made.states[site][0, :length], np.float32)
        activations = np.asarray(project(states, concepts)).mean(axis=0)
    by_activation = np.argsort(-activations, kind="stable")
    removed = np.sort(by_activation[: max(MOST_REMOVED, num_concepts)])
    log_probability, changes = removal_effects(
        vlm, sample, answer, site, directions[removed], progress=progress
    )
    effects = dict(zip(removed.tolist(), changes.tolist(), strict=True))
    by_effect = sorted(effects, key=effects.__getitem__)[:num_concepts]
    chosen = list(dict.fromkeys([*by_activation[:num_concepts].tolist(), *by_effect]))
    chosen.sort(key=lambda k: -activations[k])
    without = answers_without(vlm, sample, site, directions[chosen], max_new_tokens=max_new_tokens)
    return SampleExplanation(
        sample=sample.id,
        image=str(sample.image),
        prediction=answer,
        concepts=[
            ActiveConcept(
                concept=k,
                activation=float(activations[k]),
                words=list(concepts.words[k]),
                images=[] if concepts.images is None else list(concepts.images[k]),
                effect=effects[k],
                answer_without=said,
                map=drawn[k],
            )
            for k, said in zip(chosen, without, strict=True)
        ],
        prompt=sample.prompt,
        log_probability=log_probability,
        layout=layout,
        num_removed=len(removed),
    )


def stored_sample(features: Features, sample: str) -> Sample:
    """Returns a sample of some features, to run a model on it again.

    Args:
        features: the features.
        sample: the ID of the sample, or the name of its image file.

    Raises:
        ValueError: there is no such sample.
    """
    number = _number_of(features, sample)
    return sample_of(features.samples[number], number)


def _number_of(features: Features, sample: str) -> int:
    ids, images = columns(features.samples, "id", "image")
    names = [name_of(number, given) for number, given in enumerate(ids)]
    for number, (name, image) in enumerate(zip(names, images, strict=True)):
        if sample in (name, str(image), str(image).rsplit("/", 1)[-1]):
            return number
    raise ValueError(
        f"no sample {sample!r} in {features.path}; expected an ID such as {', '.join(names[:3])}, "
        "or the name of an image file"
    )
