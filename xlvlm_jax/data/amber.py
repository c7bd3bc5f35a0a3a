"""AMBER: yes-or-no questions about what is in a picture, and descriptions (Wang et al. 2023).

    <directory>/data/query/query_discriminative-existence.json     ... -attribute, -relation
    <directory>/data/query/query_generative.json                   "Describe this image."
    <directory>/data/annotations.json
    <directory>/data/relation.json, <directory>/data/safe_words.txt     words, for descriptions
    <directory>/image/AMBER_1.jpg       (or images/, or the directory itself)

A query: {"id": 1005, "image": "AMBER_1.jpg", "query": "Is the sky sunny in this image?"}
Its annotation: {"id": 1005, "type": "discriminative-attribute-state", "truth": "yes"}

That of a description: {"id": 1, "type": "generative", "truth": ["sky", "dog"], "hallu": ["sun"]}
"""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xlvlm_jax.data import files, prompts
from xlvlm_jax.data.sample import Sample

SPLITS = ("existence", "attribute", "relation")
DESCRIPTIONS = "generative"


class WordLists(NamedTuple):
    """AMBER's words.

    Attributes:
        associations: {object: words for it, or for its parts}, of relation.json.
        safe: words that are never wrong, of safe_words.txt.
    """

    associations: Mapping[str, Sequence[str]]
    safe: Collection[str] = ()

    @property
    def words(self) -> frozenset[str]:
        """All words that can be mentions."""
        listed = self.associations.values()
        return frozenset(self.associations) | {word for words in listed for word in words}


def load(
    directory: str | os.PathLike[str],
    split: str = "all",
    *,
    questions: str | os.PathLike[str] | None = None,
    annotations: str | os.PathLike[str] | None = None,
    prompt: str | None = None,
) -> list[Sample]:
    """Returns one sample per question; its label is each of ten references.

    The metadata has `question`, `label`, `amber_type` (as in the annotations) and, as for VQAv2,
    `answer` and `answer_type`. Samples to describe have no references, and `there` and `imagined`,
    the objects in the picture and those that people imagine there, in place of a label.

    Args:
        directory: directory of the data set.
        split: "existence", "attribute" or "relation"; "all" for all questions; "generative" for
            descriptions.
        questions, annotations: files to read instead of the ones above.
        prompt: prompt of every sample, with {question} in place of the question; None for
            `prompts.QUESTION`, and for descriptions for the question itself.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the split is unknown, a file is not AMBER's, a question has no annotation, is a
            duplicate or is of the other kind, or the prompt does not hold {question}.
    """
    if split not in (*SPLITS, "all", DESCRIPTIONS):
        raise ValueError(
            f"AMBER has no split {split!r}; expected one of {', '.join(SPLITS)}, all, "
            f"{DESCRIPTIONS}"
        )
    describes = split == DESCRIPTIONS
    template = ("{question}" if describes else prompts.QUESTION) if prompt is None else prompt
    directory = Path(directory)
    truth_path = files.resolve(directory, annotations, "data/annotations.json")
    truths: dict[int, tuple[str, Any]] = {}
    for place, record in _records(truth_path, _ANNOTATIONS):
        number = files.get(record, "id", int, truth_path, place, _ANNOTATIONS)
        if number in truths:
            raise ValueError(f"{truth_path}: {place}: id {number} is a duplicate")
        truths[number] = place, record
    found = (directory / name for name in ("image", "images"))
    folder = next((each for each in found if each.is_dir()), directory)
    dimensions = SPLITS if split == "all" and questions is None else (split,)
    samples: dict[int, Sample] = {}
    for dimension in dimensions:
        name = dimension if describes else f"discriminative-{dimension}"
        file = f"data/query/query_{name}.json"
        path = files.resolve(directory, questions, file)
        for place, record in _records(path, _QUERIES):
            number = files.get(record, "id", int, path, place, _QUERIES)
            if number in samples:
                raise ValueError(f"{path}: {place}: id {number} is a duplicate")
            if number not in truths:
                raise ValueError(f"{truth_path}: no annotation for id {number} of {path}")
            question = files.get(record, "query", str, path, place, _QUERIES)
            image = files.get(record, "image", str, path, place, _QUERIES)
            metadata = (_objects if describes else _truth)(*truths[number], truth_path)
            samples[number] = Sample(
                id=str(number),
                image=folder / image,
                image_id=Path(image).stem,
                prompt=prompts.question(question, template),
                # Ten, as in VQAv2: its accuracy is defined.
                references=() if describes else (metadata["label"],) * 10,
                metadata={"split": split, "question": question, **metadata},
            )
    return list(samples.values())


def word_lists(directory: str | os.PathLike[str]) -> WordLists:
    """Returns the words that count as mentions in descriptions.

    Args:
        directory: directory of the data set.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not AMBER's.
    """
    path = Path(directory) / "data/relation.json"
    content = files.read_json(path)
    if not isinstance(content, dict) or not all(
        isinstance(words, list) and all(isinstance(word, str) for word in words)
        for words in content.values()
    ):
        raise ValueError(f"{path}: expected an object of lists of words, as AMBER's relation.json")
    safe = Path(directory) / "data/safe_words.txt"
    try:
        lines = [line.strip() for line in safe.read_text("utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise FileNotFoundError(f"{safe}: no such file; it is part of AMBER's data") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{safe}: byte {error.start}: not UTF-8") from None
    return WordLists(
        {name: tuple(words) for name, words in content.items()}, tuple(filter(None, lines))
    )


_QUERIES = "AMBER's queries (query_*.json)"
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


def _objects(place: str, record: Any, path: Path) -> dict[str, Any]:
    kind = files.get(record, "type", str, path, place, _ANNOTATIONS)
    if kind != DESCRIPTIONS:
        raise ValueError(
            f"{path}: {place}: 'type' is {kind!r}; expected {DESCRIPTIONS!r}, that of a description"
        )
    found: dict[str, Any] = {"amber_type": kind}
    for ours, theirs in (("there", "truth"), ("imagined", "hallu")):
        listed = files.get(record, theirs, list, path, place, _ANNOTATIONS)
        if not all(isinstance(name, str) for name in listed):
            raise ValueError(f"{path}: {place}: {theirs!r} must be a list of strings")
        found[ours] = tuple(listed)
    return found
