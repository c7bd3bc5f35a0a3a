"""COCO captions, from Karpathy's split file.

    <directory>/dataset_coco.json
    <directory>/{train,val}2014/COCO_train2014_000000000009.jpg

The file gives the split, folder and name of each image. It puts 5,000 images each in "val" and
"test", and the others in "train" and "restval".
"""

import os
from pathlib import Path
from typing import Any

from xlvlm_jax.data import files, prompts
from xlvlm_jax.data.sample import Sample

FILE = "dataset_coco.json"
_KARPATHY = f"Karpathy's split file ({FILE})"
_INSTANCES = "COCO's file of instances (instances_val2014.json)"


def load(
    directory: str | os.PathLike[str],
    split: str = "train",
    *,
    file: str | os.PathLike[str] | None = None,
    objects: str | os.PathLike[str] | None = None,
    prompt: str = prompts.CAPTION,
) -> list[Sample]:
    """Returns one sample per image; its captions are the references.

    Args:
        directory: directory of the data set.
        split: as named in the file: "train", "restval", "val" or "test".
        file: a file to read instead of `dataset_coco.json`.
        objects: COCO's file of instances, such as `annotations/instances_val2014.json`; the names
            of an image's objects become `metadata["objects"]`, which CHAIR needs.
        prompt: prompt of every sample.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the file is not a Karpathy file, has an image twice, or does not have the split;
            the file of instances does not have an image of the split.
    """
    directory = Path(directory)
    path = files.resolve(directory, file, FILE)
    there = None if objects is None else _objects(files.resolve(directory, objects, FILE))
    attributes = files.read_attributes(directory)
    samples: dict[int, Sample] = {}
    splits: dict[str, None] = {}
    for place, image in _images(path):
        its_split = files.get(image, "split", str, path, place, _KARPATHY)
        splits[its_split] = None
        if its_split != split:
            continue
        number = files.get(image, "cocoid", int, path, place)
        if number in samples:
            raise ValueError(
                f"{path}: {place}: cocoid {number} is a duplicate; expected each image once"
            )
        sentences = files.get(image, "sentences", list, path, place)
        metadata: dict[str, Any] = {"split": split}
        if str(number) in attributes:
            metadata["attributes"] = attributes[str(number)]
        if there is not None:
            if number not in there:
                raise ValueError(
                    f"{objects}: does not have image {number} of split {split!r}; give the "
                    "instances of this split (COCO's 2014 files: train for train, val for others)"
                )
            metadata["objects"] = there[number]
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
        raise ValueError(f"{path}: no split {split!r}; expected one of {', '.join(splits)}")
    return list(samples.values())


def image_ids(path: Path, split: str) -> set[int]:
    """Returns the COCO ids of the images that Karpathy's file puts in `split`."""
    return {
        files.get(image, "cocoid", int, path, place)
        for place, image in _images(path)
        if files.get(image, "split", str, path, place) == split
    }


def _objects(path: Path) -> dict[int, list[str]]:
    """Returns {image id: names of its objects, each once} from COCO's file of instances."""
    content = files.read_json(path)
    names = {
        files.get(each, "id", int, path, f"categories[{i}]"): files.get(
            each, "name", str, path, f"categories[{i}]"
        )
        for i, each in enumerate(files.get_records(content, "categories", path, _INSTANCES))
    }
    found: dict[int, set[str]] = {
        files.get(image, "id", int, path, f"images[{i}]"): set()
        for i, image in enumerate(files.get_records(content, "images", path, _INSTANCES))
    }
    for i, each in enumerate(files.get(content, "annotations", list, path, "", _INSTANCES)):
        place = f"annotations[{i}]"
        image = files.get(each, "image_id", int, path, place, _INSTANCES)
        category = files.get(each, "category_id", int, path, place, _INSTANCES)
        if image not in found or category not in names:
            raise ValueError(f"{path}: {place}: unknown image {image} or category {category}")
        found[image].add(names[category])
    return {image: sorted(objects) for image, objects in found.items()}


def _images(path: Path) -> list[tuple[str, Any]]:
    images = files.get_records(files.read_json(path), "images", path, _KARPATHY)
    return [(f"images[{i}]", image) for i, image in enumerate(images)]
