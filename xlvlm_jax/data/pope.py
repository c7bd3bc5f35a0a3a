"""POPE: whether an object is in a COCO image, asked by yes and no (Li et al. 2023).

    <directory>/coco_pope_{random,popular,adversarial}.json    a JSON object per line
    <directory>/val2014/COCO_val2014_000000310196.jpg

The questions whose answer is yes are the same in each file. A line:

    {"question_id": 1, "image": "COCO_val2014_000000310196.jpg",
     "text": "Is there a snowboard in the image?", "label": "yes"}

XL-VLMs keeps the questions of all splits in one list, and the pictures in one folder:

    <directory>/annotations.json    [{"filename": "COCO_val2014_000000310196.jpg",
                                      "instruction": "Is there ...? Answer with just one word.",
                                      "response": "yes", "subset": "random"}, ...]
    <directory>/images/COCO_val2014_000000310196.jpg

A split then has all questions whose answer is yes, and its own of those whose answer is no; "all"
has every question.
"""

import codecs
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlvlm_jax.data import files, prompts
from xlvlm_jax.data.sample import Sample

SPLITS = ("random", "popular", "adversarial")
_ENDING = "Answer with just one word."  # which XL-VLMs drops from its instructions
_FORM = "a line of POPE, with question_id, image, text and label"
_SUBSET = re.compile(r"COCO_([a-z]+[0-9]{4})_0*([0-9]+)")


def load(
    directory: str | os.PathLike[str],
    split: str = "random",
    *,
    questions: str | os.PathLike[str] | None = None,
    prompt: str | None = None,
    describe: bool = False,
) -> list[Sample]:
    """Returns one sample per question; its label is each of ten references.

    The metadata has `question`, `label`, `negatives` (how absent objects were drawn) and, as for
    VQAv2, `answer` and `answer_type`.

    Args:
        directory: directory of the data set.
        split: how absent objects were drawn: "random", "popular" or "adversarial"; or "all" of
            them, whose ids are then such as "random/1" for POPE's own files.
        questions: a file to read instead of the one above, in either form.
        prompt: prompt of every sample, with {question} in place of the question; None for that
            of XL-VLMs.
        describe: ask for a description of the picture instead, as XL-VLMs' --descriptive_answer
            does; the prompt, by default `prompts.DESCRIPTION`, then need not hold {question}.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the split is unknown, a line has another form, a label is neither yes nor no, a
            question is a duplicate, or the prompt does not hold {question}.
    """
    directory = Path(directory)
    if split not in (*SPLITS, "all"):
        raise ValueError(f"POPE has no split {split!r}; expected one of {', '.join(SPLITS)}, all")
    path = files.resolve(directory, questions, f"coco_pope_{split}.json")
    if _is_list(path):
        folder, asked = "images", _listed(path, split)
    else:
        folder, asked = None, _asked(path, split)
        if split == "all" and questions is None:
            each = [(directory / f"coco_pope_{name}.json", name) for name in SPLITS]
            asked = (
                (path, f"{name}/{number}", place, record)
                for path, name in each
                for _, number, place, record in _asked(path, name)
            )
    samples: dict[str, Sample] = {}
    for path, number, place, record in asked:
        if number in samples:
            raise ValueError(f"{path}: {place}: question_id {number} is a duplicate")
        label = files.get(record, "label", str, path, place, _FORM)
        if label not in ("yes", "no"):
            raise ValueError(f"{path}: {place}: 'label' is {label!r}; expected 'yes' or 'no'")
        question = files.get(record, "text", str, path, place, _FORM)
        image = files.get(record, "image", str, path, place, _FORM)
        known = _SUBSET.match(image)
        samples[number] = Sample(
            id=number,
            image=directory / (folder or (known[1] if known else "")) / image,
            image_id=known[2] if known else image,
            prompt=(prompt or prompts.DESCRIPTION).replace("{question}", question)
            if describe
            else prompts.question(question, prompt or prompts.QUESTION),
            references=(label,) * 10,  # as in VQAv2, so that its accuracy is defined
            metadata={
                "split": split,
                "negatives": record["subset"],
                "question": question,
                "label": label,
                "answer": label,
                "answer_type": "yes/no",
            },
        )
    if not samples:
        raise ValueError(f"{path}: has no questions")
    return list(samples.values())


def _is_list(path: Path) -> bool:
    """Returns whether a file holds a list, as XL-VLMs keeps the questions."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:  # as text it is read, and refused by name, later
        return file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _listed(path: Path, split: str) -> Iterator[tuple[Path, str, str, Any]]:
    """Yields (file, ID, place, record as in POPE's own files) of a split from XL-VLMs' list."""
    names = {"filename": "image", "response": "label", "subset": "subset", "instruction": "text"}
    for number, given in enumerate(files.read_json(path)):
        place = f"[{number}]"
        record = {ours: files.get(given, name, str, path, place) for name, ours in names.items()}
        record["text"] = record["text"].split(_ENDING)[0].strip()
        if split == "all" or record["label"] == "yes" or record["subset"] == split:
            yield path, str(number), place, record


def _asked(path: Path, split: str) -> Iterator[tuple[Path, str, str, Any]]:
    """Yields (file, ID, place, record) of each line of one of POPE's own files."""
    for place, record in files.read_lines(path):
        number = files.get(record, "question_id", int, path, place, _FORM)
        yield path, str(number), place, {**record, "subset": split}
