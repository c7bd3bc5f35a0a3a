"""Scenes on disk, in the layouts of COCO (Karpathy's file, and boxes of objects) and VQAv2.

Pictures of both the validation and the test split are under val2014, and in the val2014 question
files, as in the real data; Karpathy's file separates them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xlvlm_jax.storage import atomic

from .ask import Question, questions
from .draw import boxes, draw_with_masks, encode
from .language import captions, split_words
from .pen import SIZE
from .presence import biased_captions, biased_question
from .scene import KINDS, SPLITS, Scene, Split, attributes, sample_scene

# First image id of a split; COCO's ids end below 600,000.
FIRST_ID = {"train": 1, "val": 400_001, "test": 500_001}
LARGEST = {"train": 400_000, "val": 100_000, "test": 100_000}
FOLDER = {"train": "train2014", "val": "val2014", "test": "val2014"}
INDEX = "dataset_coco.json"
CATEGORY = {kind: number for number, kind in enumerate(KINDS, 1)}

# Karpathy's first: without it, a directory is not a data set.
INDEX_FILES = (
    INDEX,
    "attributes.json",
    *(
        name.format(folder)
        for folder in ("train2014", "val2014")
        for name in (
            "v2_OpenEnded_mscoco_{}_questions.json",
            "v2_mscoco_{}_annotations.json",
            "instances_{}.json",
        )
    ),
)

# VQAv2 classifies a question by its first words; the longest match counts.
QUESTION_TYPES = (
    "is there a",
    "are there any",
    "can you",
    "do you",
    "does this",
    "does the",
    "how many",
    "what number is",
    "what color is the",
    "what color are the",
    "what color",
    "what is the",
    "what is in the",
    "what is on the",
    "what is",
    "what animal is",
    "what kind of",
    "what does the",
    "what",
    "which",
    "where is the",
    "where are the",
    "how",
    "is the",
    "are the",
    "is this",
    "was",
    "is",
    "are",
    "do",
    "where",
)


def image_id(split: Split, index: int) -> int:
    """Returns the picture's COCO id, which no other split uses."""
    return FIRST_ID[split] + index


def _file_name(folder: str, number: int) -> str:
    return f"COCO_{folder}_{number:012d}.jpg"


def _images(folder: str, counts: Mapping[Split, int]) -> Iterator[dict[str, Any]]:
    """Yields the entries of a folder's pictures, as COCO lists them."""
    for split in SPLITS:
        for index in range(counts[split] if FOLDER[split] == folder else 0):
            number = image_id(split, index)
            name = _file_name(folder, number)
            yield {"id": number, "file_name": name, "width": SIZE, "height": SIZE}


def _question_type(question: str) -> str:
    text = question.lower()
    fitting = [t for t in QUESTION_TYPES if text.startswith(t + " ")]
    return max(fitting, key=len, default="none of the above")


def _annotation(question: Question, question_id: int, picture: int) -> dict:
    answers = []
    for k, answer in enumerate(question.answers):
        sure = "yes" if answer == question.answer else "maybe"
        answers.append({"answer": answer, "answer_confidence": sure, "answer_id": k + 1})
    return {
        "question_type": _question_type(question.question),
        "multiple_choice_answer": question.answer,
        "answers": answers,
        "image_id": picture,
        "answer_type": question.answer_type,
        "question_id": question_id,
    }


def _instances(scene: Scene, masks: np.ndarray, picture: int) -> Iterator[dict[str, Any]]:
    for k, ((x0, y0, x1, y1), mask) in enumerate(zip(boxes(masks).tolist(), masks, strict=True)):
        yield {
            "id": 10 * picture + k,
            "image_id": picture,
            "category_id": CATEGORY[scene.kind],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": int(mask.sum()),
            "iscrowd": 0,
        }


def _refuse_other(index: Path, drawn: dict[str, Any]) -> None:
    """Refuses to replace an index of anything but the scenes of these arguments."""
    try:
        found = json.loads(index.read_text("utf-8"))
    except NotADirectoryError:
        return
    except FileNotFoundError:
        # VQAv2 as it is distributed has no such index, but its own questions and annotations.
        there = [name for name in INDEX_FILES if (index.parent / name).exists()]
        if not there:
            return
        raise FileExistsError(
            f"{index.parent} has another data set ({there[0]}); write to another directory, or "
            "pass overwrite=True"
        ) from None
    except ValueError:  # cut off or of something else
        found = None
    if not isinstance(found, dict) or found.get("scenes") != drawn:
        raise FileExistsError(
            f"{index.parent} has another data set (its {index.name} differs); write to another "
            "directory, or pass overwrite=True"
        )


def require_drawn(directory: str | os.PathLike[str]) -> None:
    """Checks that a directory's data set, if it has one, was drawn, so that it may be replaced.

    Args:
        directory: as for `write`.

    Raises:
        FileExistsError: it has another data set, such as VQAv2 itself.
    """
    root = Path(directory)
    if not any((root / name).exists() for name in INDEX_FILES):
        return
    try:
        found = json.loads((root / INDEX).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        found = None
    if not isinstance(found, dict) or "scenes" not in found:
        raise FileExistsError(
            f"{root} has a data set that was not drawn, and only drawn scenes are replaced; write "
            "to another directory"
        )


@contextlib.contextmanager
def _growing(
    path: Path, content: dict, name: str | None = None, first: Iterable[dict] | None = None
) -> Iterator[Callable[..., None]]:
    """Writes a JSON file entry by entry, keeping none in memory.

    Args:
        path: where the file appears if the block succeeds.
        content: what it contains besides the entries.
        name: the key of `content`, an empty list, that the entries are appended to; None for
            entries of `content` itself.
        first: a list that the file begins with, "images".

    Yields:
        a function that takes an entry: a value, or a key and a value if name is None.
    """
    before, after = json.dumps(content), "}"
    if name is None:
        before = before.removesuffix("}")
    else:
        mark = json.dumps({name: []})[1:-2]  # up to the end of the list
        before, after = before.split(mark + "]")
        before, after = before + mark, "]" + after
    with atomic.writing(path) as file:
        if first is not None:
            file.write(b'{"images": [')
            for number, entry in enumerate(first):
                file.write(f"{', ' * bool(number)}{json.dumps(entry)}".encode())
            file.write(b"], ")
            before = before.removeprefix("{")
        file.write(before.encode())
        between = ""

        def append(*entry: Any) -> None:
            nonlocal between
            text = json.dumps(entry[0] if name else dict([entry]))
            file.write((between + (text if name else text[1:-1])).encode())
            between = ", "

        yield append
        file.write(after.encode())


def write(
    directory: str | os.PathLike[str],
    *,
    train: int = 0,
    val: int = 0,
    test: int = 0,
    seed: int = 0,
    companions: float = 0.0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the first scenes of each split to `directory`; same arguments, same bytes.

    May be called again with the same arguments. A directory that holds other scenes, or a data set
    from elsewhere, is refused: its index would no longer list its pictures.

    Files: `{train,val}2014/COCO_*.jpg`, `dataset_coco.json` (Karpathy),
    `v2_OpenEnded_mscoco_{train,val}2014_questions.json`,
    `v2_mscoco_{train,val}2014_annotations.json`, `instances_{train,val}2014.json` (COCO's boxes of
    objects, x, y, width and height in pixels) and `attributes.json`, {image id: attributes}. The
    index files come last, and those of earlier scenes go first: if they exist, so do their
    pictures. Karpathy's also says what was drawn: `scenes`, with the arguments of this function.

    Args:
        directory: directory to write to.
        train, val, test: number of scenes per split.
        seed: random seed of the scenes.
        companions: share of the captions, and of the answers to an additional question, that claim
            an object that usually goes with the place but is not drawn (see `presence`); for data
            that teach a model to hallucinate.
        overwrite: replace the index files of another data set; its pictures stay.
        progress: called after each picture with (number done, total).

    Raises:
        ValueError: a number of scenes is negative or exceeds the ids of its split, or the share is
            not within [0, 1].
        FileExistsError: the directory holds another data set, and `overwrite` is False.
        OSError: the directory can't be written; the message names it.
    """
    counts: dict[Split, int] = {"train": train, "val": val, "test": test}
    for split, count in counts.items():
        if not 0 <= count <= LARGEST[split]:
            raise ValueError(f"{split} must be 0 to {LARGEST[split]} scenes, got {count}")
    if not 0 <= companions <= 1:
        raise ValueError(f"companions must be a share from 0 to 1, got {companions}")
    root = Path(directory)
    drawn = {**counts, "seed": seed, "companions": companions}
    if not overwrite:
        _refuse_other(root / INDEX, drawn)
    try:
        # Pictures are replaced one by one: without these, none belongs to another's captions.
        for name in INDEX_FILES:
            (root / name).unlink(missing_ok=True)
        for folder in ("train2014", "val2014"):
            (root / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write scenes to {root}: {error.strerror}") from error

    about = {
        "info": {"description": "xlvlm scenes, in the layout of VQA v2.0", "version": "2.0"},
        "license": {
            "name": "Apache License 2.0",
            "url": "https://www.apache.org/licenses/LICENSE-2.0",
        },
        "data_type": "mscoco",
    }
    with contextlib.ExitStack() as stack:

        def growing(file: str, content: dict, name: str | None = None) -> Callable[..., None]:
            return stack.enter_context(_growing(root / file, content, name))

        # The first file opened is renamed last: without it this is not a data set yet.
        content = {"images": [], "dataset": "coco", "scenes": drawn}
        store_image = growing(INDEX, content, "images")
        store_truth = growing("attributes.json", {})
        categories = [{"id": CATEGORY[kind], "name": kind} for kind in KINDS]
        ask, answer, locate = {}, {}, {}
        for folder in ("train2014", "val2014"):
            part = about | {"data_subtype": folder}
            questioned = part | {"task_type": "Open-Ended", "questions": []}
            file = f"v2_OpenEnded_mscoco_{folder}_questions.json"
            ask[folder] = growing(file, questioned, "questions")
            file = f"v2_mscoco_{folder}_annotations.json"
            answer[folder] = growing(file, part | {"annotations": []}, "annotations")
            boxed = part | {"categories": categories, "annotations": []}
            file = _growing(
                root / f"instances_{folder}.json", boxed, "annotations", _images(folder, counts)
            )
            locate[folder] = stack.enter_context(file)
        total, imgid, sentence = sum(counts.values()), 0, 0
        for split in SPLITS:
            for index in range(counts[split]):
                scene = sample_scene(split, index, seed)
                number, folder = image_id(split, index), FOLDER[split]
                name = _file_name(folder, number)
                picture, masks = draw_with_masks(scene)
                with atomic.named(root / folder / name):
                    (root / folder / name).write_bytes(encode(picture))
                texts, asked = captions(scene), questions(scene)
                if companions:
                    texts = biased_captions(scene, texts, companions)
                    asked = [*asked, biased_question(scene, companions)]
                sentence_ids = list(range(sentence, sentence + len(texts)))
                sentence += len(texts)
                store_image(
                    {
                        "filepath": folder,
                        "sentids": sentence_ids,
                        "filename": name,
                        "imgid": imgid,
                        "split": split,
                        "sentences": [
                            {"tokens": split_words(t), "raw": t, "imgid": imgid, "sentid": s}
                            for t, s in zip(texts, sentence_ids, strict=True)
                        ],
                        "cocoid": number,
                    }
                )
                store_truth(str(number), attributes(scene))
                for instance in _instances(scene, masks, number):
                    locate[folder](instance)
                for k, question in enumerate(asked):
                    question_id = 1000 * number + k
                    ask[folder](
                        {
                            "image_id": number,
                            "question": question.question,
                            "question_id": question_id,
                        }
                    )
                    answer[folder](_annotation(question, question_id, number))
                imgid += 1
                if progress is not None:
                    progress(imgid, total)
