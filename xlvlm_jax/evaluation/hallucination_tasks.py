"""The tasks of the hallucination bench: questions whether objects are there, and captions.

They are `Questions` and `Captions` whose wanted effect is less hallucination, at a bounded cost on
everything else.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xlvlm_jax.data.amber import WordLists
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.evaluation import hallucination
from xlvlm_jax.evaluation.predict import Condition
from xlvlm_jax.evaluation.sweep import Quantity, Trial
from xlvlm_jax.evaluation.tasks import Captions, Questions
from xlvlm_jax.metrics.amber_descriptions import amber_description_scores, can_read_officially
from xlvlm_jax.metrics.chair import (
    OBJECT_OF,
    chair_counts,
    chair_scores,
    mentioned_objects,
    object_named,
)
from xlvlm_jax.metrics.pope import read_answer
from xlvlm_jax.metrics.uncertainty import bootstrap
from xlvlm_jax.metrics.vqa import vqa_accuracy

_ASKED = re.compile(r"\bis there an? (.+?) in the im", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Presence(Questions):
    """Questions whether objects are in the picture, as POPE's, and others about the same pictures.

    A false yes is a yes to a question whose label is no. The rest are the questions whose label is
    yes and those without a label; their accuracy is what less hallucination must not cost.

    Attributes:
        wanted: the wanted effect, the share of false yes that are gone.
        max_cost: the maximum cost, in points of accuracy that the rest loses.
        needed: what samples the task needs, for messages.
    """

    wanted: float = 0.5
    max_cost: float = 1.0
    effect = Quantity("false yes gone", "%", 100)
    cost = Quantity("accuracy of the rest lost", "points")
    needed = "--task pope needs questions of --dataset pope, amber, scenes or questions"

    def describe(self) -> dict[str, Any]:
        """Returns the task as JSON values."""
        return {**super().describe(), "task": "pope"}

    def require_trial(self, samples: Sequence[Sample]) -> None:
        """Checks that some samples have the label no, some yes; effect and cost need no words.

        Raises:
            ValueError: none has, or the samples have no answers.
        """
        self._require_answered(samples)

    def _require_answered(self, samples: Sequence[Sample]) -> None:
        labels = {sample.metadata.get("label") for sample in samples}
        if samples and not {"yes", "no"} <= labels:
            raise ValueError(f"the samples have no labels yes and no; {self.needed}")
        super()._require_answered(samples)

    def measure(
        self, samples: Sequence[Sample], plain: Sequence[str], answers: Sequence[str]
    ) -> dict[str, Any]:
        """Returns what `Questions` measures, POPE's scores, false yes and the rest as JSON values.

        Raises:
            ValueError: as `Questions.measure`.
        """
        measured = super().measure(samples, plain, answers)
        labelled = [i for i, sample in enumerate(samples) if "label" in sample.metadata]
        if len(labelled) < len(samples):
            measured |= hallucination.pope_figures(
                [samples[i] for i in labelled], [answers[i] for i in labelled]
            )
        false = self.false_yes(samples, answers)
        rest = self.rest(samples, answers)
        known = ~np.isnan(rest)
        counts = np.stack([rest[known], np.ones(known.sum())], axis=1)
        groups = [
            sample.image_id for sample, is_known in zip(samples, known, strict=True) if is_known
        ]
        undefined = {"accuracy": (float("nan"), float("nan"))}
        interval = undefined
        if known.any():
            interval = bootstrap(counts, groups, lambda x: {"accuracy": x[:, 0] / x[:, 1]})
        measured["false yes"] = {
            "count": int(np.nansum(false)),
            "of": int((~np.isnan(false)).sum()),
        }
        measured["rest"] = {
            "accuracy": float(rest[known].mean()) if known.any() else None,
            "interval": [None if np.isnan(end) else end for end in interval["accuracy"]],
            "count": int(known.sum()),
        }
        return measured

    def false_yes(self, samples: Sequence[Sample], answers: Sequence[str]) -> np.ndarray:
        """Returns float[N], whether a person reads a yes to a question whose label is no, or NaN.

        Args:
            samples: N questions.
            answers: an answer per question.

        Raises:
            ValueError: the numbers differ.
        """
        return np.array(
            [
                float(read_answer(answer, "plain") == "yes")
                if sample.metadata.get("label") == "no"
                else np.nan
                for sample, answer in zip(samples, answers, strict=True)
            ]
        )

    def rest(self, samples: Sequence[Sample], answers: Sequence[str]) -> np.ndarray:
        """Returns float[N], how right the answers to the rest are, in [0, 1]; NaN for the others.

        Args:
            samples: N questions.
            answers: an answer per question.

        Raises:
            ValueError: the numbers differ, or a question has no answers.
        """
        found = []
        for sample, answer in zip(samples, answers, strict=True):
            label = sample.metadata.get("label")
            if label is None:
                found.append(vqa_accuracy(answer, sample.references, self.protocol))
            elif label == "yes":
                found.append(float(read_answer(answer, "plain") == "yes"))
            else:
                found.append(np.nan)
        return np.array(found)

    def trial(
        self,
        samples: Sequence[Sample],
        plain: Sequence[str],
        condition: Condition,
        answers: Sequence[str],
    ) -> Trial:
        """Returns the share of false yes that are gone, and the accuracy that the rest loses.

        Args:
            samples: N questions.
            plain: the unsteered answers.
            condition: what `answers` were given under.
            answers: the steered answers.

        Returns:
            The trial; its effect is NaN if there was no false yes.

        Raises:
            ValueError: as `rest`.
        """
        before, after = (np.nansum(self.false_yes(samples, each)) for each in (plain, answers))
        rest = [self.rest(samples, each) for each in (plain, answers)]
        cost = 100 * float(np.nanmean(rest[0]) - np.nanmean(rest[1]))
        changed = [
            old.strip().lower() != new.strip().lower()
            for old, new, score in zip(plain, answers, rest[0], strict=True)
            if not np.isnan(score)
        ]
        return Trial(
            condition, _share_gone(float(before), float(after)), cost, float(np.mean(changed))
        )


@dataclasses.dataclass(frozen=True)
class ObjectDescriptions(Presence):
    """Descriptions of POPE's pictures, each asked for in place of a question about an object.

    A description that names the object counts as a yes, another as a no, and is scored as such an
    answer: a false yes names an object that is not there. Objects are those of COCO, in the words
    that the plain protocol of CHAIR knows.
    """

    max_new_tokens = 128
    effect = Quantity("absent objects no longer named", "%", 100)
    cost = Quantity("present objects no longer named", "points")
    needed = "--task descriptions needs POPE's questions"

    def describe(self) -> dict[str, Any]:
        """Returns the task as JSON values."""
        return {**super().describe(), "task": "descriptions"}

    def _require_answered(self, samples: Sequence[Sample]) -> None:
        super()._require_answered(samples)
        for sample in samples:
            asked_object(sample)

    def measure(
        self, samples: Sequence[Sample], plain: Sequence[str], answers: Sequence[str]
    ) -> dict[str, Any]:
        """Returns what `Presence` measures of yes and no, and the mean number of words.

        Raises:
            ValueError: as `Presence.measure`.
        """
        said = [says_whether(samples, each) for each in (plain, answers)]
        length = float(np.mean([len(answer.split()) for answer in answers]))
        return {**super().measure(samples, *said), "words per description": length}

    def judged(self, samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, list[bool]]:
        """Returns what `Presence` returns of yes and no.

        Raises:
            ValueError: the numbers of samples and answers differ.
        """
        return super().judged(samples, says_whether(samples, answers))

    def trial(
        self,
        samples: Sequence[Sample],
        plain: Sequence[str],
        condition: Condition,
        answers: Sequence[str],
    ) -> Trial:
        """Returns the share of absent objects named that is gone, and what is lost of the others.

        Args:
            samples, plain, condition, answers: as for `Presence.trial`.

        Raises:
            ValueError: as `Presence.trial`.
        """
        said = [says_whether(samples, each) for each in (plain, answers)]
        return super().trial(samples, said[0], condition, said[1])


def asked_object(sample: Sample) -> str:
    """Returns the object of COCO that a question of POPE asks about.

    Args:
        sample: the question, "Is there a dog in the image?".

    Raises:
        ValueError: it asks something else.
    """
    question = str(sample.metadata.get("question"))
    found = _ASKED.search(question)
    if found is None or found[1].lower() not in OBJECT_OF:
        raise ValueError(
            f"sample {sample.id} asks {question!r:.80}; expected a question of POPE about an "
            "object of COCO, such as 'Is there a dog in the image?'"
        )
    return object_named(found[1].lower())


def says_whether(samples: Sequence[Sample], descriptions: Sequence[str]) -> list[str]:
    """Returns "yes" for each description that names the object its question asks about, else "no".

    Args:
        samples: N questions of POPE.
        descriptions: a description per question.

    Raises:
        ValueError: the numbers differ, or as `asked_object`.
    """
    return [
        "yes" if asked_object(sample) in mentioned_objects(text, "plain") else "no"
        for sample, text in zip(samples, descriptions, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class ObjectCaptions(Captions):
    """Captions of pictures whose objects are known, as CHAIR's.

    Attributes:
        wanted: the wanted effect, the share of mentions of absent objects (CHAIRi) that is gone.
        max_cost: the maximum cost, in points of the recall of objects.
    """

    wanted: float = 0.5
    max_cost: float = 1.0
    effect = Quantity("CHAIRi gone", "%", 100)
    cost = Quantity("recall of objects lost", "points")

    def describe(self) -> dict[str, Any]:
        """Returns the task as JSON values."""
        return {**super().describe(), "task": "chair"}

    def require(self, samples: Sequence[Sample]) -> None:
        """Checks that the objects in the pictures are known, and that captions can be scored.

        Raises:
            ValueError: as `require_trial` and `Captions.require`.
        """
        self.require_trial(samples)
        super().require(samples)

    def require_trial(self, samples: Sequence[Sample]) -> None:
        """Checks that the objects in the pictures are known; effect and cost need no captions.

        Raises:
            ValueError: they are not.
        """
        if not all("objects" in sample.metadata for sample in samples):
            raise ValueError(
                "the objects in the pictures are unknown; --task chair needs --objects, COCO's "
                "file of instances, or --dataset scenes"
            )

    def trial(
        self,
        samples: Sequence[Sample],
        plain: Sequence[str],
        condition: Condition,
        answers: Sequence[str],
    ) -> Trial:
        """Returns the share of CHAIRi that is gone, and the recall of objects that is lost.

        Args:
            samples: N captioned images.
            plain: the unsteered captions.
            condition: what `answers` were given under.
            answers: the steered captions.

        Returns:
            The trial; its effect is NaN if no absent object was mentioned.

        Raises:
            ValueError: an object is not in the vocabulary, or the numbers differ.
        """
        protocol, reads = list(hallucination.READERS[self.vocabulary].items())[-1]
        there = hallucination.objects_there(samples, self.vocabulary, protocol)
        before, after = (
            chair_scores(chair_counts([reads(text) for text in texts], there).sum(0))
            for texts in (plain, answers)
        )
        cost = 100 * float(before["recall"] - after["recall"])
        effect = _share_gone(float(before["chair_i"]), float(after["chair_i"]))
        return Trial(condition, effect, cost, _share_changed(plain, answers))


@dataclasses.dataclass(frozen=True)
class Descriptions(Captions):
    """AMBER's descriptions, scored by its own words.

    Attributes:
        lists: AMBER's words.
        wanted: the wanted effect, the share of AMBER's CHAIR that is gone.
        max_cost: the maximum cost, in points of Cover.
    """

    wanted: float = 0.5
    max_cost: float = 1.0
    lists: WordLists = dataclasses.field(default_factory=lambda: WordLists({}))
    max_new_tokens = 256
    effect = Quantity("CHAIR gone", "%", 100)
    cost = Quantity("Cover lost", "points")

    @property
    def protocols(self) -> tuple[str, ...]:
        """Those that are computed: the official one only where nltk and spaCy have their data."""
        return ("official", "plain") if can_read_officially() else ("plain",)

    def describe(self) -> dict[str, Any]:
        """Returns the task as JSON values."""
        return {**super().describe(), "task": "chair", "protocols": list(self.protocols)}

    def require(self, samples: Sequence[Sample]) -> None:
        """Checks that the samples are AMBER's descriptions, and that descriptions can be scored.

        Raises:
            ValueError: they are not, or an annotated object is not in the lists.
        """
        self._require_countable(samples, self.protocols)

    def measure(
        self, samples: Sequence[Sample], plain: Sequence[str], answers: Sequence[str]
    ) -> dict[str, Any]:
        """Returns what `Captions` measures and AMBER's scores as JSON values.

        Raises:
            ValueError: as `Captions.measure`, or an annotated object is not in the lists.
        """
        figures = hallucination.description_figures(samples, answers, self.lists, self.protocols)
        return {**super().measure(samples, plain, answers), **figures}

    def judged(self, samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, list[bool]]:
        """Returns whether each description names only what is there, by each protocol.

        Raises:
            ValueError: as `measure`.
        """
        return {
            f"nothing absent, {protocol}": [
                not row[4]
                for row in hallucination.description_counts(samples, answers, self.lists, protocol)
            ]
            for protocol in self.protocols
        }

    def require_trial(self, samples: Sequence[Sample]) -> None:
        """Checks as `require`, by the plain protocol alone, which effect and cost are of.

        Raises:
            ValueError: the samples are not AMBER's descriptions, or an annotated object is not in
                the lists.
        """
        self._require_countable(samples, ("plain",))

    def _require_countable(self, samples: Sequence[Sample], protocols: Sequence[str]) -> None:
        if not all("imagined" in sample.metadata for sample in samples):
            raise ValueError(
                "the samples are not to be described; expected AMBER's split 'generative'"
            )
        if samples:  # what would end `measure` ends here, before a model has described them
            for protocol in protocols:
                texts = ["A dog."] * len(samples)
                hallucination.description_counts(samples, texts, self.lists, protocol)

    def trial(
        self,
        samples: Sequence[Sample],
        plain: Sequence[str],
        condition: Condition,
        answers: Sequence[str],
    ) -> Trial:
        """Returns the share of AMBER's CHAIR that is gone, and the points of Cover that are lost.

        Args:
            samples: N images to describe.
            plain: the unsteered descriptions.
            condition: what `answers` were given under.
            answers: the steered descriptions.

        Returns:
            The trial, by the plain protocol; its effect is NaN if nothing absent was named.

        Raises:
            ValueError: the numbers differ, or an annotated object is not in the lists.
        """
        before, after = (
            amber_description_scores(
                hallucination.description_counts(samples, texts, self.lists, "plain").sum(0)
            )
            for texts in (plain, answers)
        )
        cost = 100 * float(before["cover"] - after["cover"])
        effect = _share_gone(float(before["chair"]), float(after["chair"]))
        return Trial(condition, effect, cost, _share_changed(plain, answers))


def _share_gone(before: float, after: float) -> float:
    """Returns the share of something unwanted that is gone; NaN if there was none."""
    return 1 - after / before if before else float("nan")


def _share_changed(plain: Sequence[str], answers: Sequence[str]) -> float:
    return float(np.mean([old != new for old, new in zip(plain, answers, strict=True)]))


def quantities_of(summary: Mapping[str, Any]) -> dict[str, Quantity]:
    """Returns what "effect" and "cost" are in an evaluation's sweep.

    Args:
        summary: what `evaluation.evaluate` writes, with a sweep. If the sweep does not say, as in
            earlier releases, those of the summary's task are returned.

    Raises:
        KeyError: neither says.
    """
    if "quantities" in (sweep := summary["sweep"]):
        return {name: Quantity(**told) for name, told in sweep["quantities"].items()}
    kinds: dict[str | None, type[Questions | Captions]] = {
        "pope": Presence,
        "descriptions": ObjectDescriptions,
        "chair": Descriptions if "protocols" in summary else ObjectCaptions,
        None: Questions if summary["kind"] == "vqa" else Captions,
    }
    task = kinds[summary.get("task")]
    return {"effect": task.effect, "cost": task.cost}
