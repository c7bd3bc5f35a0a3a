"""Questions whether something is in a picture, from any source: a JSON object per line.

    <directory>/questions.jsonl
    <directory>/street.jpg

    {"image": "street.jpg", "question": "Is there a bus?", "label": "no", "type": "adversarial"}

"type" is optional: the kind of question, by which scores are shown too, such as "real", "random"
and "adversarial" for the recognition questions of HalluScope (Khayatan et al. 2026, arXiv
2604.21911), whose own files are not published yet. "id" is optional too; without it the
number of the line counts ("line 3" where another line has the id 3).
"""

import os
from pathlib import Path

from xlvlm_jax.data import files, prompts
from xlvlm_jax.data.sample import Sample

_FORM = "a line with image, question and label"


def load(
    directory: str | os.PathLike[str],
    split: str = "all",
    *,
    questions: str | os.PathLike[str] | None = None,
    prompt: str = prompts.QUESTION,
) -> list[Sample]:
    """Returns one sample per question; its label is each of ten references.

    The metadata has `question`, `label`, `answer` and `answer_type` as for POPE; the type is under
    `negatives`, as the way in which POPE draws objects.

    Args:
        directory: directory of the pictures and the file.
        split: a type, for the questions of this type only; "all" for every question.
        questions: a file to read instead of the one above.
        prompt: prompt of every sample, with {question} in place of the question.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: a line has another form, a label is neither yes nor no, an id is a duplicate, no
            question is of this type, or the prompt does not hold {question}.
    """
    path = files.resolve(Path(directory), questions, "questions.jsonl")
    samples: dict[str, Sample] = {}
    types: dict[str, None] = {}
    records = files.read_lines(path)
    given = {
        str(record["id"]) for _, record in records if isinstance(record, dict) and "id" in record
    }
    for place, record in records:
        image = files.get(record, "image", str, path, place, _FORM)
        question = files.get(record, "question", str, path, place, _FORM)
        label = files.get(record, "label", str, path, place, _FORM)
        if label not in ("yes", "no"):
            raise ValueError(f"{path}: {place}: 'label' is {label!r}; expected 'yes' or 'no'")
        kind = files.get(record, "type", str, path, place) if "type" in record else None
        number = place.removeprefix("line ")
        if "id" in record:
            number = str(files.get(record, "id", (str, int), path, place))
        elif number in given:
            number = place
        if number in samples:
            raise ValueError(f"{path}: {place}: id {number} is a duplicate")
        if kind is not None:
            types.setdefault(str(kind))
        samples[number] = Sample(
            id=number,
            image=Path(directory) / image,
            image_id=image,
            prompt=prompts.question(question, prompt),
            references=(label,) * 10,  # as in VQAv2: its accuracy is defined
            metadata={
                "split": split,
                "negatives": kind,
                "question": question,
                "label": label,
                "answer": label,
                "answer_type": "yes/no",
            },
        )
    if not samples:
        raise ValueError(f"{path}: has no questions")
    kept = [each for each in samples.values() if split in ("all", each.metadata["negatives"])]
    if not kept:
        offered = f"one of {', '.join(types)}, all" if types else "all: none has a type"
        raise ValueError(f"{path}: has no questions of type {split!r}; expected {offered}")
    return kept
