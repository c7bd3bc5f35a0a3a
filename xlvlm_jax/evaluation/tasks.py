"""What is evaluated: answers to questions, or captions; each does the same four things.

describe   which task, as JSON values
measure    everything about one set of answers, as JSON values
trial      effect and cost of a condition, which `choose` compares
require    the words are of this data set, said before anything is computed
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from xlvlm_jax.data.sample import Sample
from xlvlm_jax.evaluation import answer_effects
from xlvlm_jax.evaluation import caption_effects as caption_changes
from xlvlm_jax.evaluation.predict import Condition
from xlvlm_jax.evaluation.sweep import Trial
from xlvlm_jax.metrics.captions import caption_scores, count_words
from xlvlm_jax.metrics.captions import describe as describe_captions

NUM_COUNTED = 30  # answers, or words of captions, whose counts are kept


@dataclasses.dataclass(frozen=True)
class Questions:
    """Answers to questions, steered from source to target answers.

    Attributes:
        source, target: words; none where nothing is steered.
        wanted: the share of source answers that is to become the target.
        max_cost: by how many points of accuracy another answer type may fall.
    """

    source: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    wanted: float = 0.95
    max_cost: float = 5.0
    max_new_tokens = 10

    def describe(self) -> dict[str, Any]:
        """As JSON values."""
        return {"kind": "vqa", "source": list(self.source), "target": list(self.target)}

    def require(self, samples: Sequence[Sample]) -> None:
        """ValueError for samples that are no questions, or words that answer none of them."""
        if samples and not any(truth is not None for truth in answer_effects.truths(samples)):
            raise ValueError("the samples have no answers; evaluate questions on --dataset vqav2")
        if self.source or self.target:
            answer_effects.require_answers(samples, self.source, self.target)

    def measure(
        self, samples: Sequence[Sample], plain: Sequence[str], answers: Sequence[str]
    ) -> dict[str, Any]:
        """Accuracies, counts, and changes from the plain answers."""
        counts = answer_effects.count_answers(answers)
        measured: dict[str, Any] = {
            "scores": answer_effects.describe(answer_effects.vqa_scores(samples, answers)),
            "answers": dict(list(counts.items())[:NUM_COUNTED]),
            "answer types": answer_effects.count_types(answers),
        }
        if self.source and self.target:
            changes = answer_effects.answer_changes(
                plain, answers, self.source, self.target, answer_effects.truths(samples)
            )
            measured["changes"] = {
                **changes._asdict(),
                "moved_share": _or_none(changes.moved_share),
                "others_changed_share": _or_none(changes.others_changed_share),
            }
        return measured

    def trial(
        self,
        samples: Sequence[Sample],
        plain: Sequence[str],
        condition: Condition,
        answers: Sequence[str],
    ) -> Trial:
        """How a condition moved source answers, and by how much it broke other answer types."""
        own = answer_effects.require_answers(samples, self.source, self.target)
        changes = answer_effects.answer_changes(
            plain, answers, self.source, self.target, answer_effects.truths(samples)
        )
        falls = answer_effects.fall_of_others(
            answer_effects.vqa_scores(samples, plain),
            answer_effects.vqa_scores(samples, answers),
            own,
        )
        cost = max(falls.values(), default=0.0)
        return Trial(condition, changes.moved_share, cost, changes.others_changed_share)


@dataclasses.dataclass(frozen=True)
class Captions:
    """Captions, steered towards words of a class.

    Attributes:
        words: those of the class; none where nothing is steered.
        java: run the metrics that need Java.
        wanted: by how much the share of captions with one of the words is to rise.
        max_cost: which share of CIDEr may be lost.
    """

    words: tuple[str, ...] = ()
    java: bool = False
    wanted: float = 0.5
    max_cost: float = 0.25
    max_new_tokens = 32

    def describe(self) -> dict[str, Any]:
        """As JSON values."""
        return {"kind": "captions", "words": list(self.words)}

    def require(self, samples: Sequence[Sample]) -> None:
        """ValueError for samples without captions, or words that are in none of them."""
        texts = [text for sample in samples for text in sample.references]
        if samples and not texts:
            raise ValueError("the samples have no captions; evaluate captions on --dataset coco")
        if self.words and not count_words(texts, self.words).any():
            shown = ", ".join(self.words[:5])
            raise ValueError(
                f"none of {len(texts)} captions holds one of the {len(self.words)} words {shown}"
                " ...; choose words, or a class of words, of this data set"
            )

    def measure(
        self, samples: Sequence[Sample], plain: Sequence[str], answers: Sequence[str]
    ) -> dict[str, Any]:
        """Scores, counts of words, and changes from the plain captions."""
        references = [sample.references for sample in samples]
        said = caption_changes.count_said(answers)
        measured: dict[str, Any] = {
            "scores": describe_captions(caption_scores(answers, references, java=self.java)),
            "words": dict(list(said.items())[:NUM_COUNTED]),
        }
        if self.words:
            changes = caption_changes.caption_changes(plain, answers, self.words)
            measured["changes"] = {**changes._asdict(), "gain": changes.gain}
            wanted = {word: said[word] for word in said if count_words([word], self.words)[0]}
            measured["class words"] = dict(list(wanted.items())[:NUM_COUNTED])
        return measured

    def trial(
        self,
        samples: Sequence[Sample],
        plain: Sequence[str],
        condition: Condition,
        answers: Sequence[str],
    ) -> Trial:
        """How many more captions hold one of the words, and what it costs in CIDEr."""
        references = [sample.references for sample in samples]
        before, after = (
            caption_scores(texts, references).values["CIDEr"] for texts in (plain, answers)
        )
        changes = caption_changes.caption_changes(plain, answers, self.words)
        cost = 1 - after / before if before else math.nan
        return Trial(condition, changes.gain, cost, changes.changed / changes.samples)


Task = Questions | Captions


def _or_none(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None
