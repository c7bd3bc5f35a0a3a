"""From features to vectors: which samples' states go into a coarse or a fine vector, and which
samples a learnt one learns from.

N samples, D width, K concepts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ports.messages import few
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.metrics.vqa import normalise_answer
from xlvlm_jax.samples import columns
from xlvlm_jax.steering.vectors import FineVectors, SteeringVector, fine_vectors, steering_vector
from xlvlm_jax.store import Features
from xlvlm_jax.words import word_pattern

MATCHES = ("equals", "contains")


def fit_coarse(
    features: Features,
    site: str,
    source: Sequence[str] | None,
    target: Sequence[str],
    *,
    key: str = "prediction",
    match: str = "equals",
    target_features: Features | None = None,
    where: Any = "all",
) -> SteeringVector:
    """The coarse vector from samples answered with the source words to those with the target's.

    Runs on the host: it does not trace.

    Args:
        features: states of the samples' answers or captions.
        site: whose.
        source, target: words. source None: the samples without a target word.
        key: where a sample's answer is: "prediction", or "answer" for that of people.
        match: "equals": the answer, normalised, is one of the words; "contains": one of its words
            is, as it is for captions.
        target_features: where the target's states are, if elsewhere; of the same model.
        where: the positions that the vector is meant for; kept with it.

    Raises ValueError for a site that is not there, features of different models, samples without
    that key, or words that no sample was answered with.
    """
    others = features if target_features is None else target_features
    require_same_model(features, others)
    of_target = _matching(others, target, key, match)
    if source is None:
        of_source = ~_matching(features, target, key, match)
    else:
        of_source = _matching(features, source, key, match)
    for chosen, of, what, words in (
        (of_source, features, "source", source),
        (of_target, others, "target", target),
    ):
        if not chosen.any():
            raise ValueError(_none_of(_answers(of, key), key, what, words))
    described = {
        **_origin(features, key),
        "method": "coarse",
        "target features": str(others.path.resolve()),
        "match": match,
        "source": None if source is None else list(source),
        "target": list(target),
        "source rows": int(of_source.sum()),
        "target rows": int(of_target.sum()),
    }
    vector = steering_vector(features.matrix(site)[of_source], others.matrix(site)[of_target])
    return SteeringVector(np.asarray(vector, np.float32), site, described, where)


def fit_fine(
    features: Features,
    site: str,
    num_concepts: int,
    source: Sequence[str] | None = None,
    *,
    key: str = "prediction",
    match: str = "equals",
    pairs: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
    where: Any = "all",
) -> tuple[list[SteeringVector], FineVectors]:
    """The fine vectors i -> j of a k-means on the source states, each with its samples.

    Runs on the host: it does not trace.

    Args:
        features: states of the samples' answers or captions.
        site: whose.
        num_concepts: K.
        source: words that choose the samples, as for `fit_coarse`; None: all samples.
        key, match, where: as for `fit_coarse`.
        pairs: the (i, j) to keep; None: every pair of different concepts.
        seed: of the k-means.

    Returns:
        The vectors, whose `source["samples"]` are the ids of the samples that activate i, and the
        clustering they come from.

    Raises ValueError as `fit_coarse` and `decompose` do, and for a pair of no two concepts.
    """
    chosen = np.ones(len(features.tokens), bool)
    if source is not None:
        chosen = _matching(features, source, key, match)
        if not chosen.any():
            raise ValueError(_none_of(_answers(features, key), key, "source", source))
    every = [(i, j) for i in range(num_concepts) for j in range(num_concepts) if i != j]
    for pair in pairs or ():
        if tuple(pair) not in every:
            raise ValueError(
                f"the pair {pair[0]}:{pair[1]} is no pair of different concepts of "
                f"0 to {num_concepts - 1}"
            )
    Z = features.matrix(site)[chosen]
    fine = fine_vectors(Z, num_concepts, key=jax.random.key(seed))
    samples = features.sample_rows[chosen]
    common = {
        **_origin(features, key),
        "method": "fine",
        "source": None if source is None else list(source),
        "match": match,
        "concepts": num_concepts,
        "seed": seed,
    }
    vectors = []
    for i, j in every if pairs is None else pairs:
        ids = dict.fromkeys(features.samples[row]["id"] for row in samples[fine.samples(i)])
        described = {**common, "from": i, "to": j, "samples": list(ids)}
        vector = np.asarray(fine.vectors[i, j], np.float32)
        vectors.append(SteeringVector(vector, site, described, where))
    return vectors, fine


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
    answers = _answers(features, key)
    chosen = _words_match(answers, source, match)
    if not chosen.any():
        raise ValueError(_none_of(answers, key, "source", source))
    rng = np.random.default_rng(seed)
    steered = rng.permutation(np.flatnonzero(chosen & readable))[:num_samples]
    others = rng.permutation(np.flatnonzero(~chosen & readable))[: round(keep * len(steered))]
    rows = [*steered, *others]
    taken = [features.samples[row] for row in rows]
    given = [str(sample[key]) for sample in taken]
    wanted = [target] * len(steered) + given[len(steered) :]
    return Lesson([_sample(kept) for kept in taken], given, wanted)


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
    answers = _answers(features, key)
    is_target = _words_match(answers, target, "equals")
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


def samples_of(features: Features) -> list[Sample]:
    """The samples that features were extracted from, as the readers of data give them.

    Runs on the host: it does not trace.
    """
    return [_sample(kept) for kept in features.samples]


def _sample(kept: Mapping[str, Any]) -> Sample:
    own = ("id", "image", "image_id", "prompt", "references")
    return Sample(
        id=kept["id"],
        image=Path(kept["image"]),
        image_id=kept["image_id"],
        prompt=kept["prompt"],
        references=tuple(kept["references"]),
        metadata={name: value for name, value in kept.items() if name not in own},
    )


def require_same_model(features: Features, others: Features) -> None:
    """ValueError if two features come from different models."""
    both = [each.manifest.get("fingerprint") for each in (features, others)]
    names = [each.manifest.get("model") for each in (features, others)]
    if both[0] != both[1] or names[0] != names[1]:
        raise ValueError(
            f"source and target states come from different models: {features.path} from "
            f"{names[0]!r} ({both[0]}), {others.path} from {names[1]!r} ({both[1]}); extract both "
            "from one"
        )


def _matching(features: Features, words: Sequence[str], key: str, match: str) -> np.ndarray:
    """bool[N]: the rows whose sample was answered with one of the words."""
    return _words_match(_answers(features, key), words, match)[features.sample_rows]


def _words_match(answers: Sequence[str], words: Sequence[str], match: str) -> np.ndarray:
    """Which of the normalised answers are, or contain, one of the words."""
    if match not in MATCHES:
        raise ValueError(f"match is {match!r}; expected {' or '.join(MATCHES)}")
    wanted = {normalise_answer(word) for word in words} - {""}
    if match == "equals":
        return np.array([answer in wanted for answer in answers], bool)
    pattern = word_pattern(wanted)
    return np.array([bool(pattern.search(answer)) for answer in answers], bool)


def _none_of(answers: Sequence[str], key: str, what: str, words: Sequence[str] | None) -> str:
    named = f"{what} words {few(words)}" if words else "answers without a target word"
    words, numbers = np.unique(list(answers), return_counts=True)
    frequent = [str(word) for word in words[np.argsort(-numbers, kind="stable")][:5]]
    return (
        f"none of {len(answers)} samples has a {key} among the {named}; "
        f"frequent are {', '.join(frequent)}"
    )


def _answers(features: Features, key: str) -> list[str]:
    answers = []
    for sample in features.samples:
        if key not in sample and "error" not in sample:
            raise ValueError(
                f"{features.path}: its samples have no {key!r}; extract from questions"
            )
        answers.append(normalise_answer(str(sample.get(key, ""))))
    return answers


def _origin(features: Features, key: str) -> dict[str, Any]:
    names = ("model", "fingerprint", "selection", "source")
    known = {f"data {n}" if n == "source" else n: features.manifest.get(n) for n in names}
    return {"features": str(features.path.resolve()), "key": key, **known}
