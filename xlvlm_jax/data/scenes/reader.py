"""Reads drawn scenes back as the questions of POPE, or as captions that CHAIR can score.

Both come from the files of captions and attributes that `write` leaves, and need no others.
"""

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from xlvlm_jax.data import coco, prompts
from xlvlm_jax.data.sample import Sample

from .presence import NEGATIVES, Negatives, absent_kind, presence_question
from .scene import KINDS, PLACES

Ask = Literal["presence", "captions"]


def load(
    directory: str | os.PathLike[str],
    split: str = "train",
    *,
    ask: Ask = "presence",
    negatives: Negatives | Literal["all"] = "all",
    prompt: str | None = None,
) -> list[Sample]:
    """Returns questions about what is in each picture and what is not, or its captions.

    For each way of drawing negatives a picture has a question about the kind of object that it
    shows and one about a kind that it does not show, as in POPE, whose files repeat the first too.
    The metadata has `question`, `label`, `negatives`, `answer` and `answer_type` as for POPE;
    captions have `objects` as for COCO with instances, but named as in `KINDS`.

    Args:
        directory: directory that `write` wrote.
        split: "train", "val" or "test".
        ask: "presence" for the questions, "captions" for a sample per picture.
        negatives: how the absent kinds are drawn: "random", "popular" (the most frequent one of
            the split), "adversarial" (what usually goes with the place), or "all".
        prompt: prompt of every sample; for questions with {question} in place of the question.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are not of drawn scenes, the split or the negatives are unknown, or
            the prompt does not hold {question}.
    """
    if ask not in ("presence", "captions"):
        raise ValueError(f"ask is {ask!r}; expected 'presence' or 'captions'")
    if negatives not in (*NEGATIVES, "all"):
        raise ValueError(
            f"unknown negatives {negatives!r}; expected one of {', '.join(NEGATIVES)}, all"
        )
    pictures = coco.load(directory, split)
    for sample in pictures:
        shown = sample.metadata.get("attributes", {})
        if shown.get("kind") not in KINDS or shown.get("place") not in PLACES:
            raise ValueError(
                f"{Path(directory) / 'attributes.json'}: has no kind and place of image "
                f"{sample.image_id}; expected a directory that `xlvlm scenes` wrote"
            )
    if ask == "captions":
        return [
            Sample(
                sample.id,
                sample.image,
                sample.image_id,
                prompts.CAPTION if prompt is None else prompt,
                sample.references,
                sample.metadata | {"objects": [sample.metadata["attributes"]["kind"]]},
            )
            for sample in pictures
        ]
    counts = Counter(sample.metadata["attributes"]["kind"] for sample in pictures)
    template = prompts.QUESTION if prompt is None else prompt
    kinds = NEGATIVES if negatives == "all" else (negatives,)
    return [
        question
        for kind in kinds
        for sample in pictures
        for question in _questions(sample, kind, counts, template)
    ]


def _questions(
    picture: Sample, negatives: Negatives, counts: Counter[str], template: str
) -> Iterator[Sample]:
    """Yields the two questions about a picture, the one whose answer is yes first."""
    shown: dict[str, Any] = picture.metadata["attributes"]
    rng = random.Random(f"{negatives}/{picture.image_id}")
    absent = absent_kind(shown["kind"], shown["place"], negatives, counts, rng)
    for label, kind in (("yes", shown["kind"]), ("no", absent)):
        question = presence_question(kind)
        yield Sample(
            id=f"{negatives}/{picture.image_id}/{label}",
            image=picture.image,
            image_id=picture.image_id,
            prompt=prompts.question(question, template),
            references=(label,) * 10,
            metadata={
                **picture.metadata,
                "negatives": negatives,
                "question": question,
                "label": label,
                "answer": label,
                "answer_type": "yes/no",
            },
        )
