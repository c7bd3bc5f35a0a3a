"""Lessons: the prompts and answers that learned steering and L2S are fitted on."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ports.messages import few
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.features.reader import Features, sample_of
from xlvlm_jax.features.samples import columns
from xlvlm_jax.steering.fit import answers_of, none_of, words_match


class Lesson(NamedTuple):
    """What is to be learnt from: prompts, how they are answered, and how they are to be."""

    samples: list[Sample]
    given: list[str]
    wanted: list[str]


def lesson(
    features: Features,
    source: Sequence[str],
    target: str,
    *,
    key: str = "prediction",
    match: str = "equals",
    num_samples: int = 128,
    keep: float = 1.5,
    seed: int = 0,
) -> Lesson:
    """Samples answered with a source word, which want the target, and others, which stay.

    Runs on the host: it does not trace.

    Args:
        features: whose samples and answers; states are not read.
        source: words to steer from.
        target: the answer wanted instead.
        key, match: as for `fit_coarse`.
        num_samples: of those to be steered, at most.
        keep: for each of these, so many of the others.
        seed: of the choice.

    Raises ValueError if no sample was answered with a source word.
    """
    (problems,) = columns(features.samples, "error")
    readable = np.array([problem is None for problem in problems], bool)
    answers = answers_of(features, key)
    chosen = words_match(answers, source, match)
    if not chosen.any():
        raise ValueError(none_of(answers, key, "source", source))
    rng = np.random.default_rng(seed)
    steered = rng.permutation(np.flatnonzero(chosen & readable))[:num_samples]
    others = rng.permutation(np.flatnonzero(~chosen & readable))[: round(keep * len(steered))]
    rows = [*steered, *others]
    taken = [features.samples[row] for row in rows]
    given = [str(sample[key]) for sample in taken]
    wanted = [target] * len(steered) + given[len(steered) :]
    return Lesson([sample_of(kept) for kept in taken], given, wanted)


def contrast_prompts(
    features: Features, lesson: Lesson, target: Sequence[str], *, key: str = "prediction"
) -> tuple[list[Sample], list[str], list[str]]:
    """What `fit_l2s` learns from with prompts as contrast: (samples, positive, negative).

    Runs on the host: it does not trace.

    The positive counterpart of a prompt that wants the target is another prompt about the same
    image, answered with a target word; the negative one is the prompt itself. Prompts that stay
    are their own counterparts; those without a counterpart are left out.

    Raises ValueError if none has one.
    """
    answers = answers_of(features, key)
    is_target = words_match(answers, target, "equals")
    by_image: dict[str, list[str]] = {}
    for row in np.flatnonzero(is_target):
        sample = features.samples[row]
        by_image.setdefault(sample["image_id"], []).append(sample["prompt"])
    samples, positive = [], []
    for number, (sample, given, wanted) in enumerate(zip(*lesson, strict=True)):
        others = by_image.get(sample.image_id, [])
        if given == wanted or others:
            samples.append(sample)
            positive.append(sample.prompt if given == wanted else others[number % len(others)])
    negative = [sample.prompt for sample in samples]
    if positive == negative:
        raise ValueError(
            f"no image of {features.path} has a prompt answered with a source word and one "
            f"answered with {few(target)}; contrast completions instead"
        )
    return samples, positive, negative
