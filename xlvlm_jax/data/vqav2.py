"""VQAv2: questions about COCO images, ten answers each.

    <directory>/v2_OpenEnded_mscoco_{train,val}2014_questions.json
    <directory>/v2_mscoco_{train,val}2014_annotations.json
    <directory>/{train,val}2014/COCO_val2014_000000000042.jpg

The answers to VQAv2's own test questions are not public. Here, "test" is the val2014 questions
about the images of Karpathy's test split, which needs his file too; "val" is all val2014 questions,
including those.
"""

import os
from pathlib import Path
from typing import Any, Literal

from xlvlm_jax.data import coco, files, prompts
from xlvlm_jax.data.sample import Sample

SUBSETS = {"train": "train2014", "val": "val2014", "test": "val2014"}
SUBSETS |= {name: name for name in ("train2014", "val2014")}  # as XL-VLMs calls them

_QUESTIONS = "VQAv2's questions (v2_OpenEnded_mscoco_*_questions.json)"
_ANNOTATIONS = "VQAv2's annotations (v2_mscoco_*_annotations.json)"


def load(
    directory: str | os.PathLike[str],
    split: str = "train",
    *,
    questions: str | os.PathLike[str] | None = None,
    annotations: str | os.PathLike[str] | None = None,
    karpathy: str | os.PathLike[str] | None = None,
    prompt: str = prompts.QUESTION,
    order: Literal["questions", "annotations"] = "questions",
) -> list[Sample]:
    """Returns one sample per question; the answers of all annotators are the references.

    The metadata has `question`, `question_type`, `answer` (the most frequent one) and `answer_type`
    ("yes/no", "number" or "other").

    Args:
        directory: directory of the data set.
        split: "train", "val" or "test".
        questions: a file to read instead of the one above.
        annotations: a file to read instead of the one above.
        karpathy: a file to read instead of `dataset_coco.json`.
        prompt: prompt of every sample, with {question} in place of the question.
        order: the file whose order the samples have. XL-VLMs draws samples in that of the
            annotations.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not from VQAv2, a question is a duplicate or has no annotation, the
            split is unknown, or the prompt does not hold {question}.
    """
    if split not in SUBSETS:
        raise ValueError(f"VQAv2 has no split {split!r}; expected one of {', '.join(SUBSETS)}")
    directory, subset = Path(directory), SUBSETS[split]
    path = files.resolve(directory, questions, f"v2_OpenEnded_mscoco_{subset}_questions.json")
    content = files.read_json(path)
    records = files.get_records(content, "questions", path, _QUESTIONS)
    answers_path = files.resolve(directory, annotations, f"v2_mscoco_{subset}_annotations.json")
    annotated = _annotations(answers_path)
    if "data_subtype" in content:  # names the folder, whatever the file is called
        subset = files.get(content, "data_subtype", str, path)
    folder = directory / subset
    wanted = _test_images(directory, karpathy) if split == "test" else None
    attributes = files.read_attributes(directory)

    samples: dict[int, Sample] = {}
    for i, record in enumerate(records):
        place = f"questions[{i}]"
        image = files.get(record, "image_id", int, path, place)
        if wanted is not None and image not in wanted:
            continue
        number = files.get(record, "question_id", int, path, place)
        if number in samples:
            raise ValueError(
                f"{path}: {place}: question_id {number} is a duplicate; expected each question once"
            )
        if number not in annotated:
            raise ValueError(f"{answers_path}: no annotation for question_id {number} of {path}")
        question = files.get(record, "question", str, path, place)
        answers, metadata = _answers(*annotated[number], answers_path)
        if str(image) in attributes:
            metadata["attributes"] = attributes[str(image)]
        samples[number] = Sample(
            id=str(number),
            image=folder / f"COCO_{subset}_{image:012d}.jpg",
            image_id=str(image),
            prompt=prompts.question(question, prompt),
            references=answers,
            metadata={"split": split, "question": question, **metadata},
        )
    if not samples:
        raise ValueError(f"{path}: no question about an image of Karpathy's test split")
    numbers = samples if order == "questions" else annotated
    return [samples[number] for number in numbers if number in samples]


def _annotations(path: Path) -> dict[int, tuple[str, Any]]:
    """Returns {question id: (place in the file, annotation)}."""
    annotated: dict[int, tuple[str, Any]] = {}
    records = files.get_records(files.read_json(path), "annotations", path, _ANNOTATIONS)
    for i, record in enumerate(records):
        place = f"annotations[{i}]"
        number = files.get(record, "question_id", int, path, place, _ANNOTATIONS)
        if number in annotated:
            raise ValueError(
                f"{path}: {place}: question_id {number} is a duplicate; expected each question once"
            )
        annotated[number] = place, record
    return annotated


def _answers(place: str, record: Any, path: Path) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Returns the answers and the metadata of an annotation."""
    answers = files.get(record, "answers", list, path, place)
    if not answers:
        raise ValueError(f"{path}: {place}: 'answers' is empty; expected those of ten people")
    metadata = {
        "question_type": files.get(record, "question_type", str, path, place),
        "answer": files.get(record, "multiple_choice_answer", str, path, place),
        "answer_type": files.get(record, "answer_type", str, path, place),
    }
    return files.get_texts(answers, "answer", path, f"{place}.answers"), metadata


def _test_images(directory: Path, karpathy: str | os.PathLike[str] | None) -> set[int]:
    path = files.resolve(directory, karpathy, coco.FILE)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file; it says which images are in VQAv2's split 'test'; without it "
            "use 'val'"
        )
    return coco.image_ids(path, "test")
