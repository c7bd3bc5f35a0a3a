"""The tasks to evaluate: questions and captions, each with the same methods.

describe   returns the task as JSON values
measure    returns scores and counts of one set of answers as JSON values
trial      returns effect and cost of a condition, which `choose` compares
judged     returns which answers are right, for tests of paired answers
require    checks, before anything is computed, that the words occur in the data set
require_trial   checks, before anything is computed, that `trial` can compare conditions

`effect` and `cost` say what these are in a trial.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ports.messages import few
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.evaluation import answer_effects, answer_types, hallucination
from xlvlm_jax.evaluation import caption_effects as caption_changes
from xlvlm_jax.evaluation.predict import Condition
from xlvlm_jax.evaluation.safety import deference_figures
from xlvlm_jax.evaluation.sweep import Quantity, Trial, finite
from xlvlm_jax.metrics.captions import caption_scores, cider, count_words, require_scorable
from xlvlm_jax.metrics.captions import describe as describe_captions
from xlvlm_jax.metrics.pope import PROTOCOLS as POPE_PROTOCOLS
from xlvlm_jax.metrics.pope import read_answer
from xlvlm_jax.metrics.vqa import PROTOCOLS, Protocol, normalise_answer

NUM_COUNTED = 30  # number of answers, or words of captions, whose counts are stored


@dataclasses.dataclass(frozen=True)
class Questions:
    """Answers to questions, steered from source to target answers.

    Attributes:
        source, target: words to steer from and to; empty if nothing is steered.
        wanted: the wanted effect, the share of source answers that become target answers.
        max_cost: the maximum cost, in points of accuracy that another answer type loses.
        protocol: how accuracy is computed where one number counts, see `metrics.vqa_accuracy`; all
            protocols are stored.
        without: an answer type to leave out of a further mean of accuracies.
        types: answers by type, see `read_types`, to count the types of answers by.

    Raises:
        ValueError: the protocol is unknown, or a word is empty once normalised.
    """

    source: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    wanted: float = 0.95
    max_cost: float = 5.0
    protocol: Protocol = "official"
    without: str | None = None
    types: Mapping[str, answer_types.TypeOf] | None = None
    max_new_tokens = 10
    effect = Quantity("source answers moved", "%", 100)
    cost = Quantity("largest loss of accuracy of another type", "points")

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            expected = ", ".join(PROTOCOLS)
            raise ValueError(f"unknown protocol {self.protocol!r}; expected one of {expected}")
        for name, words in (("source", self.source), ("target", self.target)):
            if empty := [word for word in words if not normalise_answer(word)]:
                raise ValueError(
                    f"the {name} word {empty[0]!r} is empty once normalised, as articles and "
                    "punctuation are; omit it, or choose other words"
                )

    def describe(self) -> dict[str, Any]:
        """Returns the task as JSON values."""
        words = {"source": list(self.source), "target": list(self.target)}
        return {"kind": "vqa", "protocol": self.protocol, **words}

    def require(self, samples: Sequence[Sample]) -> None:
        """Checks that the samples are questions, some with a source and some with a target answer.

        Raises:
            ValueError: the samples have no answers, or no question has one of the words as answer.
        """
        self._require_answered(samples)
        if self.source or self.target:
            answer_effects.require_answers(samples, self.source, self.target)
        if self.without is not None:
            answer_effects.require_type(samples, self.without)

    def require_trial(self, samples: Sequence[Sample]) -> None:
        """Checks that some questions have a source and some a target answer, to choose by.

        Raises:
            ValueError: none has, or the samples have no answers.
        """
        self._require_answered(samples)
        if not self.source:
            raise ValueError("there are no answers to choose by; give --source and --target")
        answer_effects.require_answers(samples, self.source, self.target)

    def _require_answered(self, samples: Sequence[Sample]) -> None:
        """Checks what both an evaluation and a trial need."""
        if samples and not any(truth is not None for truth in answer_effects.truths(samples)):
            raise ValueError("the samples have no answers; evaluate questions on --dataset vqav2")

    def measure(
        self, samples: Sequence[Sample], plain: Sequence[str], answers: Sequence[str]
    ) -> dict[str, Any]:
        """Returns accuracies, counts and changes from the plain answers as JSON values.

        Raises:
            ValueError: a sample has no answers, or the numbers of samples and answers differ.
        """
        counts = answer_effects.count_answers(answers)
        measured: dict[str, Any] = {
            "scores": answer_effects.describe(
                answer_effects.vqa_scores(samples, answers, without=self.without)
            ),
            "question types": answer_effects.describe(
                answer_effects.question_type_scores(samples, answers)
            ),
            "answers": dict(list(counts.items())[:NUM_COUNTED]),
            "answers by type": answer_effects.count_by_type(samples, answers),
            "answer types": answer_effects.count_types(answers),
        }
        if self.types is not None:
            measured["listed types"] = answer_types.count_listed_types(answers, self.types)
        if samples and all("label" in sample.metadata for sample in samples):
            measured |= hallucination.pope_figures(samples, answers)
        if self.source and self.target:
            changes = answer_effects.answer_changes(
                plain, answers, self.source, self.target, answer_effects.truths(samples)
            )
            measured["changes"] = {
                **changes._asdict(),
                "moved_share": finite(changes.moved_share),
                "others_changed_share": finite(changes.others_changed_share),
            }
            measured["XL-VLMs counts"] = answer_effects.substring_counts(
                samples, plain, answers, self.source, self.target
            )._asdict() | {
                "token_of_interest_accuracy": answer_types.token_of_interest_accuracy(
                    samples, answers, self.target[0]
                )
            }
        return measured

    def judged(self, samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, list[bool]]:
        """Returns whether each answer is the data set's most frequent one.

        Of questions with a label, as POPE's, also whether each protocol reads the answer as it, and
        whether answers to questions about what is not there avoid a false yes.

        Raises:
            ValueError: the numbers of samples and answers differ.
        """
        judged = {
            "answers": [
                truth is not None and normalise_answer(answer) == normalise_answer(truth)
                for answer, truth in zip(answers, answer_effects.truths(samples), strict=True)
            ]
        }
        for protocol in POPE_PROTOCOLS:
            labelled = [
                (read_answer(answer, protocol), sample.metadata["label"])
                for answer, sample in zip(answers, samples, strict=True)
                if "label" in sample.metadata
            ]
            if labelled:
                judged[f"POPE, {protocol}"] = [said == label for said, label in labelled]
                judged[f"no false yes, {protocol}"] = [
                    said != "yes" for said, label in labelled if label == "no"
                ]
        return judged

    def trial(
        self,
        samples: Sequence[Sample],
        plain: Sequence[str],
        condition: Condition,
        answers: Sequence[str],
    ) -> Trial:
        """Returns how a condition moved source answers and how much other answer types lost.

        Raises:
            ValueError: as for `require` and `measure`.
        """
        own = answer_effects.require_answers(samples, self.source, self.target)
        changes = answer_effects.answer_changes(
            plain, answers, self.source, self.target, answer_effects.truths(samples)
        )
        falls = answer_effects.fall_of_others(
            answer_effects.vqa_scores(samples, plain),
            answer_effects.vqa_scores(samples, answers),
            own,
            self.protocol,
        )
        cost = max(falls.values(), default=0.0)
        return Trial(condition, changes.moved_share, cost, changes.others_changed_share)


@functools.lru_cache(2)
def _cider(captions: tuple[str, ...], references: tuple[tuple[str, ...], ...]) -> float:
    """Returns the mean CIDEr; that of the plain captions is kept from trial to trial."""
    return cider(captions, references)


@dataclasses.dataclass(frozen=True)
class Captions:
    """Captions and other free texts, steered towards words of a class.

    Of samples without references, only the words are counted.

    Attributes:
        words: the words to steer towards; empty if nothing is steered.
        java: whether to compute the metrics that need Java.
        vocabulary: whose words name the objects that CHAIR counts: "coco" or "scenes".
        wanted: the wanted effect, the increase in the share of captions with one of the words.
        max_cost: the maximum cost, as the share of CIDEr that is lost.
    """

    words: tuple[str, ...] = ()
    java: bool = False
    vocabulary: hallucination.Vocabulary = "coco"
    wanted: float = 0.5
    max_cost: float = 0.25
    max_new_tokens = 32
    effect = Quantity("more captions with class words", "points", 100)
    cost = Quantity("CIDEr lost", "%", 100)

    def describe(self) -> dict[str, Any]:
        """Returns the task as JSON values."""
        return {"kind": "captions", "words": list(self.words)}

    def require(self, samples: Sequence[Sample]) -> None:
        """Checks that the samples have captions that contain one of the words.

        Raises:
            ValueError: none of the captions contains one of the words, there are neither captions
                nor words, some samples have none, or pycocoevalcap is not installed.
        """
        texts = [text for sample in samples for text in sample.references]
        if samples and not texts and not self.words:
            raise ValueError(
                "the samples have no captions; evaluate captions on --dataset coco, or give "
                "--words to count"
            )
        if texts and self.words and not count_words(texts, self.words).any():
            raise ValueError(
                f"none of {len(texts)} captions contains one of the words {few(self.words)}; give "
                "--words, or a class of words, that occur in this data set"
            )
        if texts:
            require_scorable([sample.references for sample in samples])

    def require_trial(self, samples: Sequence[Sample]) -> None:
        """Checks that steered captions can be compared: there are words and references.

        Raises:
            ValueError: they can't, or as `require`.
        """
        self.require(samples)
        if not self.words:
            raise ValueError("there are no words to choose by; give --words, or a class of words")
        if not any(sample.references for sample in samples):
            raise ValueError(
                "the samples have no references, which the cost of steering is measured by; choose "
                "on other samples"
            )

    def measure(
        self, samples: Sequence[Sample], plain: Sequence[str], answers: Sequence[str]
    ) -> dict[str, Any]:
        """Returns scores, word counts and changes from the plain captions as JSON values.

        Raises:
            ValueError: a sample has no captions, the numbers of samples and answers differ, or
                pycocoevalcap is not installed.
        """
        references = [sample.references for sample in samples]
        said = caption_changes.count_said(answers)
        scores: dict[str, Any] = {"left out": {"CIDEr and others": "there are no references"}}
        if any(references):
            scores = describe_captions(caption_scores(answers, references, java=self.java))
        measured: dict[str, Any] = {
            "scores": scores,
            "words": dict(list(said.items())[:NUM_COUNTED]),
            "all words": said,
            "valid words": caption_changes.count_valid(answers),
        }
        if samples and all("objects" in sample.metadata for sample in samples):
            measured |= hallucination.chair_figures(samples, answers, self.vocabulary)
        if samples and all("scenario" in sample.metadata for sample in samples):
            measured |= deference_figures(samples, answers)
        if self.words:
            changes = caption_changes.caption_changes(plain, answers, self.words)
            measured["changes"] = {**changes._asdict(), "gain": changes.gain}
            measured["class words"] = dict(
                caption_changes.count_each(answers, self.words).most_common(NUM_COUNTED)
            )
        return measured

    def judged(self, samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, list[bool]]:
        """Returns whether each caption names only objects that are there; {} if they are unknown.

        Args:
            samples: captioned images, with `objects` in their metadata.
            answers: a caption per image.

        Raises:
            ValueError: an object is not in the vocabulary.
        """
        if not samples or not all("objects" in sample.metadata for sample in samples):
            return {}
        return {
            f"no absent object, {protocol}": hallucination.without_absent(
                samples, answers, self.vocabulary, protocol
            )
            for protocol in hallucination.READERS[self.vocabulary]
        }

    def trial(
        self,
        samples: Sequence[Sample],
        plain: Sequence[str],
        condition: Condition,
        answers: Sequence[str],
    ) -> Trial:
        """Returns how many more captions contain one of the words, and the cost in CIDEr.

        Raises:
            ValueError: the samples have no references, there are no words, or as for `measure`.
        """
        self.require_trial(samples)
        references = tuple(tuple(sample.references) for sample in samples)
        before, after = (_cider(tuple(texts), references) for texts in (plain, answers))
        changes = caption_changes.caption_changes(plain, answers, self.words)
        cost = 1 - after / before if before else math.nan
        return Trial(condition, changes.gain, cost, changes.changed / changes.samples)


Task = Questions | Captions
