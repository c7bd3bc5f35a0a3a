"""Reads drawn scenes back as the questions of POPE, or as captions that CHAIR can score.

Both come from the files of captions and attributes that `write` leaves, and need no others.
"""

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from xlvlm_jax.data import coco, prompts, vqav2
from xlvlm_jax.data.sample import Sample

from .ask import EXISTS
from .presence import NEGATIVES, Negatives, absent_kind, presence_question
from .scene import KINDS, PLACES

_ABOUT_PRESENCE = tuple(form.split(" {")[0] for form in EXISTS)
Ask = Literal["presence", "all", "captions"]


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
        ask: "presence" for the questions; "all" for these and the other questions about the same
            pictures (`xlvlm_jax.data.vqav2`), except those about presence, which have no label and
            show what steering costs elsewhere; "captions" for a sample per picture.
        negatives: how the absent kinds are drawn: "random", "popular" (the most frequent one of
            the split), "adversarial" (what usually goes with the place), or "all".
        prompt: prompt of every sample; for questions with {question} in place of the question.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are not of drawn scenes, the split or the negatives are unknown, or
            the prompt does not hold {question}.
    """
    if ask not in get_args(Ask):
        raise ValueError(f"ask is {ask!r}; expected one of {', '.join(get_args(Ask))}")
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
    asked = [
        question
        for kind in kinds
        for sample in pictures
        for question in _questions(sample, kind, counts, template)
    ]
    if ask == "all":
        others = vqav2.load(directory, split, prompt=template)
        shown = {sample.image_id for sample in pictures}  # val2014's include those of test
        asked += [
            sample
            for sample in others
            if sample.image_id in shown
            and not sample.metadata["question"].startswith(_ABOUT_PRESENCE)
        ]
    return asked


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
