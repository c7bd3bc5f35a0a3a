"""A folder of images, with or without captions.

<directory>/**/*.jpg ...
<directory>/captions.json    {"dog.jpg": "a dog", "cats/two.png": ["two cats", "cats asleep"]}
or captions.csv              dog.jpg,a dog        (one line per caption; may have a header line)
"""

import codecs
import csv
import dataclasses
import io
import os
from collections.abc import Sequence
from pathlib import Path

from xlvlm_jax.data import files, prompts
from xlvlm_jax.data.sample import Sample

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def load(
    directory: str | os.PathLike[str],
    split: str | None = None,
    *,
    captions: str | os.PathLike[str] | None = None,
    prompt: str = prompts.CAPTION,
) -> list[Sample]:
    """Returns one sample per image, including sub-folders, in the order of their names.

    Args:
        directory: the folder.
        split: must be None: a folder has no splits; pass the sub-folder as `directory`.
        captions: a JSON or CSV file to read instead of `captions.json` or `captions.csv`.
        prompt: prompt of every sample.

    Raises:
        FileNotFoundError: the directory or the captions file is missing.
        ValueError: the folder has no images, or a caption is for an image that does not exist.
    """
    directory = Path(directory)
    if split is not None:
        raise ValueError(
            f"a folder of images has no splits, got {split!r}; pass the sub-folder as the directory"
        )
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory; expected a folder of images")
    found = sorted(
        file.relative_to(directory).as_posix()
        for file in directory.rglob("*")
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if not found:
        raise ValueError(f"{directory}: has no images; expected files {', '.join(SUFFIXES)}")
    references = _captions(directory, captions, set(found))
    return [
        Sample(
            id=name,
            image=directory / name,
            image_id=name,
            prompt=prompt,
            references=references.get(name, ()),
        )
        for name in found
    ]


def samples_of(paths: Sequence[str | os.PathLike[str]], prompt: str) -> list[Sample]:
    """Returns one sample per image of some files and folders, in their order.

    Args:
        paths: image files, and folders as for `load`.
        prompt: prompt of every sample.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder has no images.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            found += [
                dataclasses.replace(sample, id=str(sample.image))
                for sample in load(path, prompt=prompt)
            ]
        elif path.exists():
            found.append(Sample(id=str(path), image=path, image_id=path.name, prompt=prompt))
        else:
            raise FileNotFoundError(f"{path}: no such image file or folder of images")
    return found


def _captions(
    directory: Path, given: str | os.PathLike[str] | None, images: set[str]
) -> dict[str, tuple[str, ...]]:
    """Returns {image: captions}; {} if no file was given and none exists."""
    names = ["captions.json", "captions.csv"] if given is None else [given]
    paths = [directory / name for name in names if given is not None or (directory / name).exists()]
    if not paths:
        return {}
    path = paths[0]
    captions = _of_csv(path, images) if path.suffix.lower() == ".csv" else _of_json(path)
    for place, name, _ in captions:
        if name not in images:
            raise ValueError(f"{path}: {place}: {directory} has no image {name!r}")
    by_image: dict[str, tuple[str, ...]] = {}
    for _, name, caption in captions:
        by_image[name] = (*by_image.get(name, ()), caption)
    return by_image


def _of_json(path: Path) -> list[tuple[str, str, str]]:
    """Returns (place in the file, image, caption) of each caption."""
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, file: caption or captions")
    captions = []
    for name, value in content.items():
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}: {name!r} must have a caption or a list of captions")
        captions += [(repr(name), name, text.strip()) for text in texts]
    return captions


def _of_csv(path: Path, images: set[str]) -> list[tuple[str, str, str]]:
    """Returns (place in the file, image, caption) of each caption."""
    captions = []
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; expected captions") from None
    # Spreadsheets write UTF-16 with a byte order mark as "Unicode text".
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "UTF-16" if marked else "UTF-8"
    try:
        text = content.decode("utf-16" if marked else "utf-8-sig")
        reader = csv.reader(io.StringIO(text, ""))
        rows = [(row, reader.line_num) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV file in {encoding} ({error})") from None
    for row, number in rows:
        if not row:
            continue
        if len(row) != 2:
            raise ValueError(
                f"{path}: line {number}: expected 2 columns, image and caption, got {len(row)};"
                " put a caption with commas in quotes"
            )
        is_head = number == 1 and row[0] not in images and not Path(row[0]).suffix
        if not is_head:
            captions.append((f"line {number}", row[0].strip(), row[1].strip()))
    return captions
