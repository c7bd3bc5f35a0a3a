"""Lessons: the prompts and answers on which learned steering and L2S are fitted."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ports.messages import few
from xlvlm_jax.data import files
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.features.reader import Features, sample_of
from xlvlm_jax.features.samples import columns, name_of
from xlvlm_jax.steering.fit import OUTCOME, answers_of, none_of, words_match

_OPPOSITE = {"yes": "no", "no": "yes"}


class Lesson(NamedTuple):
    """Samples to learn from, with the given and the wanted answer to each.

    Attributes:
        samples: N samples.
        given: the model's answers.
        wanted: the answers to learn; equal to the given one for a sample that must stay.
    """

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
    """Chooses samples to steer (answered with a source word) and samples that must stay.

    Runs on the host and cannot be traced.

    Args:
        features: provides samples and answers; its states are not read.
        source: words to steer from.
        target: the answer wanted instead.
        key, match: as for `answer_states`.
        num_samples: maximum number of samples to steer.
        keep: number of samples that must stay, per sample to steer.
        seed: random seed of the choice.

    Returns:
        The samples with their given and wanted answers, those to steer first.

    Raises:
        ValueError: no sample was answered with a source word, or `keep` is negative.
    """
    if not keep >= 0:
        raise ValueError(f"keep is {keep}; expected at least 0 samples per sample to steer")
    problems, said = columns(features.samples, "error", "prediction" if key == OUTCOME else key)
    # An empty answer can't be forced, so that such a sample can neither change nor stay.
    readable = np.array(
        [p is None and bool(str(t).strip()) for p, t in zip(problems, said, strict=True)]
    )
    answers = answers_of(features, key)
    chosen = words_match(answers, source, match) & readable
    if not chosen.any():
        raise ValueError(none_of(answers, key, "source", source))
    rng = np.random.default_rng(seed)
    steered = rng.permutation(np.flatnonzero(chosen))[:num_samples]
    others = rng.permutation(np.flatnonzero(~chosen & readable))[: round(keep * len(steered))]
    rows = [*steered, *others]
    taken = [features.samples[row] for row in rows]
    given = [str(sample["prediction" if key == OUTCOME else key]) for sample in taken]
    wanted = [target] * len(steered) + given[len(steered) :]
    samples = [sample_of(kept, int(row)) for kept, row in zip(taken, rows, strict=True)]
    return Lesson(samples, given, wanted)


class Contrast(NamedTuple):
    """Two answers to force on samples, in contrast to each other.

    Attributes:
        positive: the beginning of the wanted answer.
        negative: the beginning of the unwanted answer.
        prompt: what they answer, see `asked_with`; None for the sample's prompt.
    """

    positive: str
    negative: str
    prompt: str | None = None


def read_contrasts(path: str | os.PathLike[str]) -> dict[str, Contrast]:
    """Reads the answers to force on the samples of each scenario.

    Runs on the host and cannot be traced.

    Args:
        path: a JSON file, {scenario: {"positive": "...", "negative": "...", "prompt": "..."}}. "*"
            stands for all other scenarios, and for samples without one. The prompt, which may be
            left out, has {question} in place of a sample's question.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has another form.
    """
    content = files.read_json(Path(path))
    known, needed = set(Contrast._fields), {"positive", "negative"}
    for name, given in content.items() if isinstance(content, dict) else [(None, None)]:
        if (
            not isinstance(given, dict)
            or not needed <= set(given) <= known
            or not all(isinstance(text, str) and text.strip() for text in given.values())
        ):
            where = "" if name is None else f" for {name!r}"
            raise ValueError(
                f'{path}: expected {{"scenario": {{"positive": "...", "negative": "...", '
                f'"prompt": "..."}}}} with texts{where}; the prompt may be left out'
            )
    return {name: Contrast(**given) for name, given in content.items()}


def asked_with(sample: Sample, prompt: str | None) -> str:
    """Returns a prompt in place of a sample's own.

    Args:
        sample: the sample.
        prompt: the prompt, with {question} in place of the sample's question, or another text for
            all samples; None for the sample's own.

    Raises:
        ValueError: the prompt asks for a question, and the sample has none.
    """
    if prompt is None:
        return sample.prompt
    question = sample.metadata.get("question")
    if "{question}" in prompt and question is None:
        raise ValueError(
            f"sample {sample.id} has no question to put into the prompt {prompt!r:.80}; "
            "omit {question}"
        )
    return prompt.replace("{question}", str(question))


def _contrast_of(kept: Mapping[str, Any], contrasts: Mapping[str, Contrast]) -> Contrast:
    scenario = kept.get("scenario")
    found = contrasts.get(str(scenario), contrasts.get("*"))
    if found is None:
        raise ValueError(
            f"there is no contrast for scenario {scenario!r} of sample {kept['id']}, only for "
            f"{few(contrasts)}; add it, or '*' for all others"
        )
    return found


def readable(
    features: Features, num_samples: int | None = None, seed: int = 0
) -> list[Mapping[str, Any]]:
    """Returns the stored samples whose pictures could be read, in their order.

    Runs on the host and cannot be traced.

    Args:
        features: provides the samples.
        num_samples: maximum number of samples, drawn at random; None for all.
        seed: random seed of the choice.
    """
    rows = np.array([i for i, kept in enumerate(features.samples) if "error" not in kept], int)
    if num_samples is not None:
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:num_samples])
    found = ((int(row), features.samples[row]) for row in rows)
    return [{**kept, "id": name_of(row, kept.get("id"))} for row, kept in found]


def forced_answers(
    features: Features,
    positive: str | None = None,
    negative: str | None = None,
    *,
    contrasts: Mapping[str, Contrast] | None = None,
    num_samples: int | None = None,
    seed: int = 0,
) -> tuple[list[Sample], list[str], list[str]]:
    """Returns samples with an answer to force on each in contrast to another.

    Runs on the host and cannot be traced.

    Args:
        features: provides the samples; their states and answers are not read.
        positive, negative: the beginning of the wanted and of the unwanted answer. None for "Yes,
            the image" and "No, the image", whichever of them the sample's label makes right
            ("label" of POPE, or "answer"), as XL-VLMs forces.
        contrasts: instead of one pair of answers, a prompt and a pair of answers for each scenario,
            see `read_contrasts`; samples are returned with these prompts.
        num_samples: maximum number of samples; None for all.
        seed: random seed of the choice.

    Returns:
        (samples, positive, negative), lists of the same length.

    Raises:
        ValueError: only one of the two texts is given, or they and contrasts; without them a
            sample's label is neither yes nor no; or a sample's scenario has no contrast.
    """
    if (positive is None) != (negative is None):
        raise ValueError("give both the positive and the negative answer to force, or neither")
    if contrasts is not None and positive is not None:
        raise ValueError("give contrasts or one positive and negative answer, not both")
    kept = readable(features, num_samples, seed)
    samples = [sample_of(each) for each in kept]
    if contrasts is not None:
        found = [_contrast_of(each, contrasts) for each in kept]
        asked = [
            dataclasses.replace(sample, prompt=asked_with(sample, contrast.prompt))
            for sample, contrast in zip(samples, found, strict=True)
        ]
        return asked, [each.positive for each in found], [each.negative for each in found]
    if positive is not None and negative is not None:
        return samples, [positive] * len(kept), [negative] * len(kept)
    labels = [str(each.get("label", each.get("answer"))) for each in kept]
    if wrong := [label for label in labels if label not in _OPPOSITE]:
        raise ValueError(
            f"a sample's answer is {wrong[0]!r}, neither yes nor no; give the positive and the "
            "negative answer to force"
        )
    forced = {label: f"{label.capitalize()}, the image" for label in _OPPOSITE}
    return samples, [forced[x] for x in labels], [forced[_OPPOSITE[x]] for x in labels]


def _image_of(sample: Sample) -> str:
    """Returns what tells images apart: the ID, or the file of an image without one."""
    return sample.image_id or str(sample.image)


def contrast_prompts(
    features: Features, lesson: Lesson, target: Sequence[str], *, key: str = "prediction"
) -> tuple[list[Sample], list[str], list[str]]:
    """Finds the contrasting prompts that `fit_l2s(contrast="prompt")` learns from.

    Runs on the host and cannot be traced.

    The positive counterpart of a prompt to steer is another prompt about the same image that was
    answered with a target word; the negative one is the prompt itself. A prompt that must stay is
    its own counterpart. Prompts without a counterpart are left out.

    Args:
        features: provides the prompts and answers about the images.
        lesson: the samples to learn from.
        target: words to steer to.
        key: as for `answer_states`.

    Returns:
        (samples, positive, negative), lists of the same length.

    Raises:
        ValueError: no prompt to steer has a counterpart.
    """
    answers = answers_of(features, key)
    is_target = words_match(answers, target, "equals")
    by_image: dict[str, list[str]] = {}
    for row in np.flatnonzero(is_target):
        sample = sample_of(features.samples[row], int(row))
        by_image.setdefault(_image_of(sample), []).append(sample.prompt)
    samples, positive = [], []
    for number, (sample, given, wanted) in enumerate(zip(*lesson, strict=True)):
        others = by_image.get(_image_of(sample), [])
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


def contrast_labels(
    samples: Sequence[Sample], *, among: Sequence[Sample] | None = None
) -> tuple[list[str], list[str]]:
    """Contrasts a question of each image whose label is a sample's own with one of the other label.

    What tells the two apart is whether the object is there, not how it is asked about. A sample
    without a label, or about whose image no question has the other label, is its own counterpart
    on both sides and must stay.

    Runs on the host and cannot be traced.

    Args:
        samples: N questions, some with the label yes or no, as POPE's.
        among: the questions to choose counterparts from; default: the samples.

    Returns:
        (positive, negative), N prompts each, for `fit_l2s(contrast="prompt")` and the like. The
        positive one is another question than the sample's own if there is one.

    Raises:
        ValueError: no sample has a counterpart.
    """
    asked: dict[str, dict[str, list[str]]] = {}
    for each in samples if among is None else among:
        if (label := str(each.metadata.get("label"))) in _OPPOSITE:
            asked.setdefault(_image_of(each), {}).setdefault(label, []).append(each.prompt)
    positive, negative = [], []
    for sample in samples:
        label = str(sample.metadata.get("label"))
        of_image = asked.get(_image_of(sample), {})
        opposite = of_image.get(_OPPOSITE.get(label, ""), [])
        others = [text for text in of_image.get(label, []) if text != sample.prompt]
        positive.append(others[0] if opposite and others else sample.prompt)
        negative.append(opposite[0] if opposite else sample.prompt)
    if positive == negative:
        raise ValueError(
            "no image has a question whose label is yes and one whose label is no; expected "
            "questions such as POPE's, or contrast completions instead"
        )
    return positive, negative
