"""Scores and counts answers to questions, and compares them before and after steering."""

import functools
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ports.messages import counted, few
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.metrics.vqa import PROTOCOLS, Protocol, normalise_answer, vqa_accuracy

FEW_ANSWERS = 4  # from so many on, a prediction that matches all has accuracy 1
MEAN_OVER_TYPES = "mean over types"
MEAN_WITHOUT = "mean without "  # and an answer type
_MEANS = ("all", MEAN_OVER_TYPES)


class Accuracy(NamedTuple):
    """Mean accuracies over questions by each protocol, in [0, 1]; see `metrics.vqa_accuracy`."""

    official: float
    normalised: float
    xl_vlms: float
    # Number of questions; replaces the method `tuple.count`.
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]

    def by(self, protocol: Protocol) -> float:
        """Returns the accuracy by a protocol."""
        return self[PROTOCOLS.index(protocol)]

    @property
    def reference(self) -> float:
        """The accuracy by XL-VLMs' protocol; its name in version 0.1."""
        return self.xl_vlms


def vqa_scores(
    samples: Sequence[Sample], predictions: Sequence[str], *, without: str | None = None
) -> dict[str, Accuracy]:
    """Returns accuracies over all samples, by answer type, and their mean over the types.

    Args:
        samples: questions.
        predictions: an answer per question.
        without: an answer type to leave out of a further mean, such as the one that is steered.

    Returns:
        {"all", each answer type, "mean over types", "mean without TYPE": accuracy}. A warning tells
        if a question has too few answers for an accuracy of 1.

    Raises:
        ValueError: a sample has no answers, the numbers of samples and predictions differ, or no
            sample is of the type to leave out.
    """
    if len(samples) != len(predictions):
        raise ValueError(
            f"{len(predictions)} predictions for {len(samples)} samples; expected one per sample"
        )
    if without is not None:
        require_type(samples, without)
    if samples and 0 < (fewest := min(len(sample.references) for sample in samples)) < FEW_ANSWERS:
        warnings.warn(
            f"a question has {counted(fewest, 'answer')}; with less than {FEW_ANSWERS}, the "
            "official and the normalised accuracy stay below 1 for a prediction that matches all, "
            "and are 0 with one (see metrics.vqa_accuracy)",
            stacklevel=2,
        )
    found: dict[str, list[list[float]]] = defaultdict(list)
    for sample, prediction in zip(samples, predictions, strict=True):
        if not sample.references:
            raise ValueError(f"sample {sample.id} has no answers; evaluate on questions")
        each = list(_accuracies(prediction, tuple(sample.references)))
        for name in ("all", sample.metadata.get("answer_type")):
            if name is not None:
                found[name].append(each)
    scores = {
        name: Accuracy(*np.mean(rows, axis=0).tolist(), count=len(rows))
        for name, rows in found.items()
    }
    types = [score for name, score in scores.items() if name != "all"]
    if types:
        scores[MEAN_OVER_TYPES] = _mean(types)
    others = [score for name, score in scores.items() if name not in (*_MEANS, without)]
    if without is not None and others:
        scores[f"{MEAN_WITHOUT}{without}"] = _mean(others)
    return scores


@functools.lru_cache(2**16)
def _accuracies(prediction: str, references: tuple[str, ...]) -> tuple[float, ...]:
    """Returns the accuracy by each protocol; kept, as trials of a sweep repeat most answers."""
    return tuple(vqa_accuracy(prediction, references, protocol) for protocol in PROTOCOLS)


def require_type(samples: Sequence[Sample], name: str) -> None:
    """Checks that some questions have an answer type.

    Args:
        samples: questions.
        name: the answer type.

    Raises:
        ValueError: none has.
    """
    types = {str(sample.metadata.get("answer_type")) for sample in samples} - {"None"}
    if name not in types:
        raise ValueError(
            f"no question has the answer type {name!r}; expected one of "
            f"{', '.join(sorted(types)) or 'none, as the questions have no types'}"
        )


def question_type_scores(
    samples: Sequence[Sample], predictions: Sequence[str]
) -> dict[str, Accuracy]:
    """Returns accuracies by type of question ("what color is the"), the most frequent first.

    Args:
        samples: questions.
        predictions: an answer per question.

    Returns:
        {question type: accuracy}; empty if the types are unknown.

    Raises:
        ValueError: a question has no answers, or the numbers of samples and predictions differ.
    """
    found: dict[str, list[list[float]]] = defaultdict(list)
    for sample, prediction in zip(samples, predictions, strict=True):
        if (kind := sample.metadata.get("question_type")) is not None:
            found[kind].append(list(_accuracies(prediction, tuple(sample.references))))
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return {
        kind: Accuracy(*np.mean(rows, axis=0).tolist(), count=len(rows)) for kind, rows in ordered
    }


def _mean(scores: Sequence[Accuracy]) -> Accuracy:
    """Returns the unweighted mean of accuracies."""
    means = np.mean([score[:-1] for score in scores], axis=0).tolist()
    return Accuracy(*means, count=sum(score.count for score in scores))


def answer_type(answer: str) -> str:
    """Returns the type of a predicted answer: "yes/no", "number" or "other", as in VQAv2."""
    words = normalise_answer(answer).split()
    if words in (["yes"], ["no"]):
        return "yes/no"
    return "number" if len(words) == 1 and words[0].replace(".", "").isdecimal() else "other"


def count_answers(answers: Sequence[str]) -> dict[str, int]:
    """Counts the normalised answers, the most frequent first."""
    return dict(Counter(map(normalise_answer, answers)).most_common())


def count_by_type(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, dict[str, int]]:
    """Counts the normalised answers to the questions of each answer type.

    Args:
        samples: questions.
        answers: an answer per question.

    Returns:
        {answer type of the data set: {answer: number}}, the most frequent answers first.
    """
    given: dict[str, list[str]] = defaultdict(list)
    for sample, answer in zip(samples, answers, strict=True):
        if (kind := sample.metadata.get("answer_type")) is not None:
            given[kind].append(answer)
    return {kind: count_answers(texts) for kind, texts in given.items()}


class SubstringCounts(NamedTuple):
    """What XL-VLMs counts of steering, as numbers of samples; words match anywhere in a text."""

    preds_with_toi: int  # answers that hold a target word
    preds_and_targets_with_toi: int  # of these, a person's answer holds a source word
    preds_and_baseline_preds_with_toi: int  # of these, the unsteered answer holds a source word
    preds_changed: int


def substring_counts(
    samples: Sequence[Sample],
    before: Sequence[str],
    after: Sequence[str],
    source: Sequence[str],
    target: Sequence[str],
) -> SubstringCounts:
    """Counts answers as XL-VLMs does (metrics/utils.py at a599fe9); see `answer_changes`.

    Args:
        samples: questions or captioned images.
        before, after: the model's answers before and after steering.
        source, target: the words to steer from and to; source words in lower case.

    Returns:
        The counts.
    """
    sources = [word.lower().strip() for word in source]
    held = targets = baselines = changed = 0
    for sample, old, new in zip(samples, before, after, strict=True):
        old, new = old.lower().strip(), new.lower().strip()
        changed += old != new
        if any(word in new for word in target):
            held += 1
            said = [text.lower().strip() for text in sample.references]
            targets += any(word in text for word in sources for text in said)
            baselines += any(word in old for word in sources)
    return SubstringCounts(held, targets, baselines, changed)


def count_types(answers: Sequence[str]) -> dict[str, int]:
    """Counts the answers of each type (see `answer_type`)."""
    counts = Counter(map(answer_type, answers))
    return {name: counts[name] for name in ("yes/no", "number", "other")}


class Changes(NamedTuple):
    """What steering from source to target answers changed, as numbers of samples.

    Attributes:
        samples: all samples.
        changed: answers that differ.
        source_before: source answers before steering.
        source_after: source answers after steering.
        target_before: target answers before steering.
        target_after: target answers after steering.
        moved: from a source answer to a target answer.
        gained: target answers that were not target answers before, including `moved`.
        gained_from_source_truth: of the gained, those whose true answer is a source word.
        lost: source answers that no longer are, including `moved`.
        lost_with_source_truth: of the lost, those whose true answer is a source word.
        others: answers that were neither source nor target.
        others_changed: of the others, those that differ.
    """

    samples: int
    changed: int
    source_before: int
    source_after: int
    target_before: int
    target_after: int
    moved: int
    gained: int
    gained_from_source_truth: int
    lost: int
    lost_with_source_truth: int
    others: int
    others_changed: int

    @property
    def moved_share(self) -> float:
        """The share of source answers that became target answers; NaN if there were none."""
        return self.moved / self.source_before if self.source_before else float("nan")

    @property
    def others_changed_share(self) -> float:
        """The share of the other answers that changed; NaN if there were none."""
        return self.others_changed / self.others if self.others else float("nan")


def answer_changes(
    before: Sequence[str],
    after: Sequence[str],
    source: Sequence[str],
    target: Sequence[str],
    truths: Sequence[str | None],
) -> Changes:
    """Compares answers before and after steering (Khayatan et al. 2025, section 5).

    Args:
        before, after: the model's answers to the same questions, compared after normalisation.
        source, target: the words to steer from and to.
        truths: the data set's most frequent answer to each question; None if unknown.

    Returns:
        The changes.

    Raises:
        ValueError: the lists have different lengths, or a word is both source and target.
    """
    if not len(before) == len(after) == len(truths):
        raise ValueError(
            f"there are {len(before)} answers before, {len(after)} after and {len(truths)} truths; "
            "expected the same number of each"
        )
    sources, targets = (
        {normalise_answer(word) for word in words} - {""} for words in (source, target)
    )
    if sources & targets:
        raise ValueError(
            f"{sorted(sources & targets)} are both source and target words; expected distinct words"
        )
    old, new = ([normalise_answer(answer) for answer in answers] for answers in (before, after))
    was_source = np.array([answer in sources for answer in old], bool)
    was_target = np.array([answer in targets for answer in old], bool)
    is_source = np.array([answer in sources for answer in new], bool)
    is_target = np.array([answer in targets for answer in new], bool)
    differ = np.array([a != b for a, b in zip(old, new, strict=True)], bool)
    truth = np.array([t is not None and normalise_answer(t) in sources for t in truths], bool)
    gained, lost = is_target & ~was_target, was_source & ~is_source
    other = ~was_source & ~was_target
    return Changes(
        samples=len(old),
        changed=int(differ.sum()),
        source_before=int(was_source.sum()),
        source_after=int(is_source.sum()),
        target_before=int(was_target.sum()),
        target_after=int(is_target.sum()),
        moved=int((was_source & is_target).sum()),
        gained=int(gained.sum()),
        gained_from_source_truth=int((gained & truth).sum()),
        lost=int(lost.sum()),
        lost_with_source_truth=int((lost & truth).sum()),
        others=int(other.sum()),
        others_changed=int((other & differ).sum()),
    )


def truths(samples: Sequence[Sample]) -> list[str | None]:
    """Returns the data set's most frequent answer to each question; None if unknown."""
    return [sample.metadata.get("answer") for sample in samples]


def require_answers(samples: Sequence[Sample], source: Sequence[str], target: Sequence[str]) -> str:
    """Checks that some questions have source and target words as their true answers.

    Args:
        samples: questions.
        source, target: the words to steer from and to.

    Returns:
        The most frequent answer type among questions whose true answer is a source word.

    Raises:
        ValueError: no question has one of the source, or target, words as its answer.
    """
    answered = [
        (normalise_answer(t), s) for s, t in zip(samples, truths(samples), strict=True) if t
    ]
    of_source: list[str] = []
    for what, words in (("source", source), ("target", target)):
        wanted = {normalise_answer(word) for word in words} - {""}
        types = [s.metadata.get("answer_type", "other") for t, s in answered if t in wanted]
        if not types:
            frequent = ", ".join(list(count_answers([t for t, _ in answered]))[:5])
            advice = f"choose frequent ones, such as {frequent}" if frequent else "use VQA samples"
            raise ValueError(
                f"none of {len(samples)} questions has one of the {what} words {few(words)} as "
                f"its answer; {advice}"
            )
        of_source = of_source or types
    return Counter(of_source).most_common(1)[0][0]


def fall_of_others(
    before: dict[str, Accuracy],
    after: dict[str, Accuracy],
    own: str,
    protocol: Protocol = "official",
) -> dict[str, float]:
    """Returns the points of accuracy that each answer type but `own` lost.

    Args:
        before, after: what `vqa_scores` returns before and after steering.
        own: the answer type to leave out.
        protocol: how accuracy is computed, see `metrics.vqa_accuracy`.

    Returns:
        {answer type: points}, negative for a gain.
    """
    return {
        name: 100 * (before[name].by(protocol) - after[name].by(protocol))
        for name in before
        if name not in (*_MEANS, own) and not name.startswith(MEAN_WITHOUT)
    }


def describe(scores: dict[str, Accuracy]) -> dict[str, dict[str, Any]]:
    """Returns the scores as JSON values."""
    return {name: score._asdict() for name, score in scores.items()}
