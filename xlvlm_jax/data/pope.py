"""POPE: whether an object is in a COCO image, asked by yes and no (Li et al. 2023).

    <directory>/coco_pope_{random,popular,adversarial}.json    a JSON object per line
    <directory>/val2014/COCO_val2014_000000310196.jpg

A line: {"question_id": 1, "image": "COCO_val2014_000000310196.jpg",
         "text": "Is there a snowboard in the image?", "label": "yes"}
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from xlvlm_jax.data import files, prompts
from xlvlm_jax.data.sample import Sample

SPLITS = ("random", "popular", "adversarial")
_SUBSET = re.compile(r"COCO_([a-z]+[0-9]{4})_0*([0-9]+)")


def load(
    directory: str | os.PathLike[str],
    split: str = "random",
    *,
    questions: str | os.PathLike[str] | None = None,
    prompt: str = prompts.QUESTION,
) -> list[Sample]:
    """Returns one sample per question; its label is each of ten references.

    The metadata has `question`, `label` and, as for VQAv2, `answer` and `answer_type`.

    Args:
        directory: directory of the data set.
        split: how absent objects were drawn: "random", "popular" or "adversarial".
        questions: a file to read instead of the one above.
        prompt: prompt of every sample, with {question} in place of the question.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the split is unknown, a line has another form, a label is neither yes nor no, a
            question is a duplicate, or the prompt does not hold {question}.
    """
    if split not in SPLITS:
        raise ValueError(f"POPE has no split {split!r}; expected one of {', '.join(SPLITS)}")
    directory = Path(directory)
    path = files.resolve(directory, questions, f"coco_pope_{split}.json")
    samples: dict[int, Sample] = {}
    for place, record in _lines(path):
        number = files.get(record, "question_id", int, path, place)
        if number in samples:
            raise ValueError(f"{path}: {place}: question_id {number} is a duplicate")
        label = files.get(record, "label", str, path, place)
        if label not in ("yes", "no"):
            raise ValueError(f"{path}: {place}: 'label' is {label!r}; expected 'yes' or 'no'")
        question = files.get(record, "text", str, path, place)
        image = files.get(record, "image", str, path, place)
        known = _SUBSET.match(image)
        samples[number] = Sample(
            id=str(number),
            image=directory / (known[1] if known else "") / image,
            image_id=known[2] if known else image,
            prompt=prompts.question(question, prompt),
            references=(label,) * 10,  # as in VQAv2, so that its accuracy is defined
            metadata={
                "split": split,
                "question": question,
                "label": label,
                "answer": label,
                "answer_type": "yes/no",
            },
        )
    if not samples:
        raise ValueError(f"{path}: has no questions")
    return list(samples.values())


def _lines(path: Path) -> list[tuple[str, Any]]:
    """Returns (place, object) of each line."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such file; pass its name or another directory"
        ) from None
    records = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                records.append((f"line {number}", json.loads(line)))
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: not JSON ({error})") from None
    return records
