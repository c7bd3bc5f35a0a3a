"""Scores of hallucination with their intervals, and tests of paired answers under conditions.

POPE asks whether objects are there, CHAIR looks for those that captions name. Every protocol of a
metric is computed, and in how many answers the protocols differ.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from xlvlm_jax.data.amber import WordLists
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.data.scenes import mentioned_kinds
from xlvlm_jax.metrics.amber import amber
from xlvlm_jax.metrics.amber_descriptions import (
    amber_counts,
    amber_description_scores,
    listed_words,
    nltk_nouns,
    spacy_alike,
)
from xlvlm_jax.metrics.caption_tokenizer import caption_words
from xlvlm_jax.metrics.chair import PROTOCOLS as CHAIR_PROTOCOLS
from xlvlm_jax.metrics.chair import chair_counts, chair_scores, mentioned_objects, object_named
from xlvlm_jax.metrics.pope import PROTOCOLS as POPE_PROTOCOLS
from xlvlm_jax.metrics.pope import label_at_start, pope, pope_counts, pope_scores, read_answer
from xlvlm_jax.metrics.uncertainty import Interval, bootstrap, mcnemar

NUM_EXAMPLES = 5  # answers that protocols read differently, of those that are stored
Vocabulary = Literal["coco", "scenes"]
# Vocabulary -> protocol -> what reads the objects in a caption. Drawn scenes have one protocol:
# their words are known.
READERS: dict[Vocabulary, dict[str, Callable[[str], list[str]]]] = {
    "coco": {
        protocol: functools.partial(mentioned_objects, protocol=protocol)
        for protocol in CHAIR_PROTOCOLS
    },
    "scenes": {"scenes": mentioned_kinds},
}


def pope_figures(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Any]:
    """Returns POPE's scores by every protocol, with intervals, and by kind of negatives.

    Args:
        samples: questions, each with a label "yes" or "no" in its metadata.
        answers: an answer per question.

    Returns:
        JSON values: "POPE" {protocol: scores}; "POPE intervals" {protocol: {score: [low, high]}};
        "POPE by negatives" {kind: {protocol: scores}} if there are several kinds; "read
        differently", in how many answers the protocols differ; for AMBER's questions also "AMBER".

    Raises:
        ValueError: there are no questions, or the numbers of questions and answers differ.
    """
    labels = [sample.metadata["label"] for sample in samples]
    kinds = [sample.metadata.get("negatives") for sample in samples]
    figures: dict[str, Any] = {
        "POPE": {protocol: as_json(pope(answers, labels, protocol)) for protocol in POPE_PROTOCOLS}
        | {"xl-vlms": label_at_start(answers, labels)._asdict()},
        "POPE intervals": {
            protocol: _intervals(pope_counts(answers, labels, protocol), samples, pope_scores)
            for protocol in POPE_PROTOCOLS
        },
        "read differently": _read_differently(answers),
    }
    if len(named := sorted({kind for kind in kinds if kind is not None})) > 1:
        figures["POPE by negatives"] = {
            name: {
                protocol: as_json(
                    pope(
                        [a for a, kind in zip(answers, kinds, strict=True) if kind == name],
                        [label for label, kind in zip(labels, kinds, strict=True) if kind == name],
                        protocol,
                    )
                )
                for protocol in POPE_PROTOCOLS
            }
            for name in named
        }
    if all("amber_type" in sample.metadata for sample in samples):
        figures["AMBER"] = {
            protocol: as_json(amber(answers, labels, protocol)) for protocol in POPE_PROTOCOLS
        }
    return figures


def _read_differently(answers: Sequence[str]) -> dict[str, Any]:
    both = [[read_answer(a, p) for p in POPE_PROTOCOLS] for a in answers]
    different = Counter(
        a.strip() for a, said in zip(answers, both, strict=True) if len({*said}) > 1
    )
    return {
        "count": different.total(),
        "examples": [text for text, _ in different.most_common(NUM_EXAMPLES)],
    }


def chair_figures(
    samples: Sequence[Sample], answers: Sequence[str], vocabulary: Vocabulary = "coco"
) -> dict[str, Any]:
    """Returns CHAIR's scores by every protocol, with intervals.

    Args:
        samples: images with `objects` in their metadata. Of COCO, the objects that people's
            captions name count as there too, as in CHAIR; of drawn scenes the contents are known.
        answers: a caption per image.
        vocabulary: whose words name the objects.

    Returns:
        JSON values: "CHAIR" {protocol: scores and the mean length in words}; "CHAIR intervals"
        {protocol: {score: [low, high]}}; "read differently", in how many captions the protocols
        find different objects.

    Raises:
        ValueError: an object is not in the vocabulary.
    """
    length = float(np.mean([len(caption_words(answer)) for answer in answers]))
    scores, intervals, said = {}, {}, []
    for protocol, mentioned in READERS[vocabulary].items():
        said.append([mentioned(answer) for answer in answers])
        counts = chair_counts(said[-1], objects_there(samples, vocabulary, protocol))
        sums = chair_scores(counts.sum(0))
        scores[protocol] = {name: _or_none(float(x)) for name, x in sums.items()}
        scores[protocol]["length"] = length
        intervals[protocol] = _intervals(counts, samples, chair_scores)
    differ = [
        answer
        for answer, *found in zip(answers, *said, strict=True)
        if any(sorted(each) != sorted(found[0]) for each in found)
    ]
    return {
        "CHAIR": scores,
        "CHAIR intervals": intervals,
        "read differently": {"count": len(differ), "examples": differ[:NUM_EXAMPLES]},
    }


def description_counts(
    samples: Sequence[Sample], answers: Sequence[str], lists: WordLists, protocol: str
) -> Float[np.ndarray, "N 8"]:
    """Returns what each description adds to AMBER's counts, see `metrics.amber_counts`.

    Args:
        samples: images with `there` and `imagined` in their metadata.
        answers: a description per image.
        lists: AMBER's words.
        protocol: "plain", or "official", which needs nltk and spaCy with their data.

    Raises:
        ModuleNotFoundError: they are not installed.
        ValueError: their data are not, the numbers differ, or an annotated object is not in the
            lists.
    """
    there, imagined = ([s.metadata[name] for s in samples] for name in ("there", "imagined"))
    if protocol == "official":
        nouns = [nltk_nouns(answer) for answer in answers]
        return amber_counts(nouns, there, imagined, lists, alike=spacy_alike())
    nouns = [listed_words(answer, lists) for answer in answers]
    return amber_counts(nouns, there, imagined, lists)


def description_figures(
    samples: Sequence[Sample], answers: Sequence[str], lists: WordLists, protocols: Sequence[str]
) -> dict[str, Any]:
    """Returns AMBER's scores of descriptions by some protocols, with intervals.

    Args:
        samples, answers, lists: as for `description_counts`.
        protocols: "official", "plain" or both.

    Returns:
        JSON values: "AMBER" {protocol: scores and the mean length in words}; "AMBER intervals"
        {protocol: {score: [low, high]}}.

    Raises:
        ModuleNotFoundError, ValueError: as `description_counts`.
    """
    length = float(np.mean([len(caption_words(answer)) for answer in answers]))
    scores, intervals = {}, {}
    for protocol in protocols:
        counts = description_counts(samples, answers, lists, protocol)
        sums = amber_description_scores(counts.sum(0))
        scores[protocol] = {name: _or_none(float(x)) for name, x in sums.items()}
        scores[protocol]["length"] = length
        intervals[protocol] = _intervals(counts, samples, amber_description_scores)
    return {"AMBER": scores, "AMBER intervals": intervals}


def objects_there(
    samples: Sequence[Sample], vocabulary: Vocabulary, protocol: str
) -> list[set[str]]:
    """Returns the objects that count as there in each image.

    Args:
        samples, vocabulary: as for `chair_figures`.
        protocol: what reads the objects in people's captions.

    Raises:
        ValueError: an object is not in the vocabulary.
    """
    if vocabulary == "scenes":
        return [set(sample.metadata["objects"]) for sample in samples]
    reads = READERS[vocabulary][protocol]
    return [
        {object_named(name) for name in sample.metadata["objects"]}.union(
            *map(reads, sample.references)
        )
        for sample in samples
    ]


def without_absent(
    samples: Sequence[Sample], answers: Sequence[str], vocabulary: Vocabulary, protocol: str
) -> list[bool]:
    """Returns which captions name no object that is not there.

    Args:
        samples, answers, vocabulary: as for `chair_figures`.
        protocol: what reads the objects.

    Raises:
        ValueError: as `objects_there`.
    """
    reads = READERS[vocabulary][protocol]
    there = objects_there(samples, vocabulary, protocol)
    return [not {*reads(text)} - given for text, given in zip(answers, there, strict=True)]


def distinct_questions(samples: Sequence[Sample]) -> list[int]:
    """Returns the places of samples, of those with the same image and prompt the first.

    The files of POPE share questions, which are answered once and are one observation of a test.
    """
    places: dict[Any, int] = {}
    for i, sample in enumerate(samples):
        places.setdefault((sample.image, sample.prompt), i)
    return list(places.values())


def paired_tests(
    judged: Mapping[str, Mapping[str, Sequence[bool]]], against: Sequence[str]
) -> list[dict[str, Any]]:
    """Tests whether conditions differ in the answers that are right (McNemar's exact test).

    The p values are not corrected for the number of tests.

    Args:
        judged: {condition: {what is judged: whether each of N answers is right}}.
        against: conditions that each other one is compared with, if there.

    Returns:
        JSON values: for each pair and each thing judged, how many answers only the first ("lost")
        or only the second ("gained") has right, and the p value.

    Raises:
        ValueError: conditions judge different numbers of answers.
    """
    pairs = [
        (first, second)
        for first, second in itertools.product(against, judged)
        if first in judged
        and first != second
        and (second not in against or against.index(first) < against.index(second))
    ]
    return [
        {
            "first": first,
            "second": second,
            "what": what,
            **mcnemar(judged[first][what], judged[second][what])._asdict(),
        }
        for first, second in pairs
        for what in judged[first]
    ]


def _intervals(
    counts: np.ndarray, samples: Sequence[Sample], scores: Callable[[Any], Any]
) -> dict[str, list[float | None]]:
    found: dict[str, Interval] = bootstrap(counts, [s.image_id for s in samples], scores)
    return {name: [_or_none(end) for end in interval] for name, interval in found.items()}


def as_json(score: Any) -> dict[str, float | None]:
    """Returns the fields of a score as JSON values, None for those that are undefined."""
    return {name: _or_none(value) for name, value in score._asdict().items()}


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
