"""What XL-VLMs counts of answers besides accuracy: their types by a dictionary, and one answer.

    {"answer_type": {"number": ["2", "two"], ...}, "question_type": {"how many": ["2"], ...}}

maps each type to answers of that type, as the training set has them; an answer belongs to the type
that lists it most often (vqa_accuracy.py at a599fe9).
"""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from xlvlm_jax.data import files
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.metrics.answer_text import xl_vlms_answer
from xlvlm_jax.metrics.vqa import vqa_accuracy

UNRECOGNISED = "unrecognized"  # as XL-VLMs spells it
KINDS = ("answer_type", "question_type")
TypeOf = Mapping[str, str]  # answer -> its type


def read_types(path: str | os.PathLike[str]) -> dict[str, TypeOf]:
    """Reads a dictionary of answers by type.

    Args:
        path: the file, see the module.

    Returns:
        {"answer_type": {answer: type}, "question_type": {answer: type}}.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has another form.
    """
    path = Path(path)
    content = files.read_json(path)
    found: dict[str, TypeOf] = {}
    for kind in KINDS:
        listed: dict[str, Counter[str]] = defaultdict(Counter)
        for name, answers in files.get(content, kind, dict, path).items():
            if not isinstance(answers, list) or not all(isinstance(each, str) for each in answers):
                raise ValueError(f"{path}: {kind}: {name!r} must be a list of answers")
            for answer in answers:
                listed[answer][name] += 1
        # Of types that list an answer equally often, the first.
        found[kind] = {answer: counts.most_common(1)[0][0] for answer, counts in listed.items()}
    return found


def count_listed_types(answers: Sequence[str], types: Mapping[str, TypeOf]) -> dict[str, dict]:
    """Counts the types of answers by a dictionary.

    Args:
        answers: the model's answers.
        types: what `read_types` returns.

    Returns:
        {"answer_type": {type: number}, "question_type": {type: number}}, the most frequent first. A
        number that is not listed has answer type "number", anything else "unrecognized".
    """
    given = [xl_vlms_answer(answer) for answer in answers]
    counts = {
        "answer_type": Counter(
            types["answer_type"].get(each, "number" if _is_number(each) else UNRECOGNISED)
            for each in given
        ),
        "question_type": Counter(types["question_type"].get(each, UNRECOGNISED) for each in given),
    }
    return {kind: dict(counted.most_common()) for kind, counted in counts.items()}


def token_of_interest_accuracy(
    samples: Sequence[Sample], answers: Sequence[str], word: str
) -> dict[str, float]:
    """Returns the "accuracy" of answers if `word` were the only right answer, as in XL-VLMs.

    One of three needed matches gives at most 1 / 3: three times this is the share of answers that
    are the word.

    Args:
        samples: questions.
        answers: an answer per question.
        word: the token of interest.

    Returns:
        {answer type: accuracy in [0, 1 / 3], "overall": the mean over the types}; empty if the
        types are unknown.

    Raises:
        ValueError: the numbers of samples and answers differ.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for sample, answer in zip(samples, answers, strict=True):
        if (kind := sample.metadata.get("answer_type")) is not None:
            found[kind].append(vqa_accuracy(answer, [word], "xl-vlms"))
    means = {kind: float(np.mean(each)) for kind, each in found.items()}
    return means | ({"overall": float(np.mean(list(means.values())))} if means else {})


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
