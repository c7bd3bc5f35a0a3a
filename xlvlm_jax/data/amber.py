"""AMBER's yes-or-no questions about what is in a picture (Wang et al. 2023).

    <directory>/data/query/query_discriminative-existence.json     ... -attribute, -relation
    <directory>/data/annotations.json
    <directory>/image/AMBER_1.jpg       (or images/, or the directory itself)

A query: {"id": 1005, "image": "AMBER_1.jpg", "query": "Is the sky sunny in this image?"}
Its annotation: {"id": 1005, "type": "discriminative-attribute-state", "truth": "yes"}

Descriptions (AMBER's "generative" part) are not read: scoring them needs its word vectors.
"""

import os
from pathlib import Path
from typing import Any

from xlvlm_jax.data import files, prompts
from xlvlm_jax.data.sample import Sample

SPLITS = ("existence", "attribute", "relation")


def load(
    directory: str | os.PathLike[str],
    split: str = "all",
    *,
    questions: str | os.PathLike[str] | None = None,
    annotations: str | os.PathLike[str] | None = None,
    prompt: str = prompts.QUESTION,
) -> list[Sample]:
    """Returns one sample per question; its label is each of ten references.

    The metadata has `question`, `label`, `amber_type` (as in the annotations) and, as for VQAv2,
    `answer` and `answer_type`.

    Args:
        directory: directory of the data set.
        split: "existence", "attribute", "relation" or "all".
        questions, annotations: files to read instead of the ones above.
        prompt: prompt of every sample, with {question} in place of the question.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the split is unknown, a file is not AMBER's, a question has no annotation, is a
            duplicate or is about a description, or the prompt does not hold {question}.
    """
    if split not in (*SPLITS, "all"):
        raise ValueError(f"AMBER has no split {split!r}; expected one of {', '.join(SPLITS)}, all")
    directory = Path(directory)
    truth_path = files.resolve(directory, annotations, "data/annotations.json")
    truths = {
        files.get(record, "id", int, truth_path, place, _ANNOTATIONS): (place, record)
        for place, record in _records(truth_path, _ANNOTATIONS)
    }
    found = (directory / name for name in ("image", "images"))
    folder = next((each for each in found if each.is_dir()), directory)
    dimensions = SPLITS if split == "all" and questions is None else (split,)
    samples: dict[int, Sample] = {}
    for dimension in dimensions:
        file = f"data/query/query_discriminative-{dimension}.json"
        path = files.resolve(directory, questions, file)
        for place, record in _records(path, _QUERIES):
            number = files.get(record, "id", int, path, place, _QUERIES)
            if number in samples:
                raise ValueError(f"{path}: {place}: id {number} is a duplicate")
            if number not in truths:
                raise ValueError(f"{truth_path}: no annotation for id {number} of {path}")
            question = files.get(record, "query", str, path, place, _QUERIES)
            image = files.get(record, "image", str, path, place, _QUERIES)
            metadata = _truth(*truths[number], truth_path)
            samples[number] = Sample(
                id=str(number),
                image=folder / image,
                image_id=Path(image).stem,
                prompt=prompts.question(question, prompt),
                references=(metadata["label"],) * 10,  # as in VQAv2: its accuracy is defined
                metadata={"split": split, "question": question, **metadata},
            )
    return list(samples.values())


_QUERIES = "AMBER's queries (query_discriminative-*.json)"
_ANNOTATIONS = "AMBER's annotations.json"


def _records(path: Path, expected: str) -> list[tuple[str, Any]]:
    content = files.read_json(path)
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path}: expected a list, as in {expected}")
    return [(f"[{i}]", record) for i, record in enumerate(content)]


def _truth(place: str, record: Any, path: Path) -> dict[str, Any]:
    kind = files.get(record, "type", str, path, place, _ANNOTATIONS)
    label = files.get(record, "truth", (str, list), path, place, _ANNOTATIONS)
    if label not in ("yes", "no"):
        raise ValueError(
            f"{path}: {place}: 'truth' is {label!s:.40}; expected 'yes' or 'no', that of a "
            "question and not of a description"
        )
    return {"label": label, "amber_type": kind, "answer": label, "answer_type": "yes/no"}
