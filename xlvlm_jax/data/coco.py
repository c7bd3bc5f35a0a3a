"""COCO captions, by Karpathy's split file.

    <directory>/dataset_coco.json
    <directory>/{train,val}2014/COCO_train2014_000000000009.jpg

Split, folder and name of an image are those that the file gives. It puts 5,000 images each in "val"
and "test", and the others in "train" and "restval".
"""

import os
from pathlib import Path
from typing import Any

from xlvlm_jax.data import files, prompts
from xlvlm_jax.data.sample import Sample

FILE = "dataset_coco.json"


def load(
    directory: str | os.PathLike[str],
    split: str = "train",
    *,
    file: str | os.PathLike[str] | None = None,
    prompt: str = prompts.CAPTION,
) -> list[Sample]:
    """One sample an image; its captions are the references.

    Args:
        split: as the file names it: "train", "restval", "val" or "test".
        file: instead of `dataset_coco.json`.

    Raises FileNotFoundError for a missing file; ValueError for one that is no Karpathy file, for an
    image that it holds twice, and for a split that it does not hold.
    """
    directory = Path(directory)
    path = files.resolve(directory, file, FILE)
    attributes = files.read_attributes(directory)
    samples: dict[int, Sample] = {}
    splits: dict[str, None] = {}
    for place, image in _images(path):
        its_split = files.get(image, "split", str, path, place)
        splits[its_split] = None
        if its_split != split:
            continue
        number = files.get(image, "cocoid", int, path, place)
        if number in samples:
            raise ValueError(f"{path}: {place}: cocoid {number} comes a second time")
        sentences = files.get(image, "sentences", list, path, place)
        metadata: dict[str, Any] = {"split": split}
        if str(number) in attributes:
            metadata["attributes"] = attributes[str(number)]
        samples[number] = Sample(
            id=str(number),
            image=directory
            / files.get(image, "filepath", str, path, place)
            / files.get(image, "filename", str, path, place),
            image_id=str(number),
            prompt=prompt,
            references=tuple(
                text.strip()
                for text in files.get_texts(sentences, "raw", path, f"{place}.sentences")
            ),
            metadata=metadata,
        )
    if not samples:
        raise ValueError(f"{path}: no split {split!r}; it has {', '.join(splits)}")
    return list(samples.values())


def image_ids(path: Path, split: str) -> set[int]:
    """The COCO ids of the images that Karpathy's file puts in `split`."""
    return {
        files.get(image, "cocoid", int, path, place)
        for place, image in _images(path)
        if files.get(image, "split", str, path, place) == split
    }


def _images(path: Path) -> list[tuple[str, Any]]:
    images = files.get_records(files.read_json(path), "images", path)
    return [(f"images[{i}]", image) for i, image in enumerate(images)]
