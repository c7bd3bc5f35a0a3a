"""A folder of images, with captions or without.

<directory>/**/*.jpg ...
<directory>/captions.json    {"dog.jpg": "a dog", "cats/two.png": ["two cats", "cats asleep"]}
or captions.csv              dog.jpg,a dog        (a line a caption; a head line may stand first)
"""

import codecs
import csv
import io
import os
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
    """One sample an image, sub-folders included, by the order of their names.

    Args:
        split: a folder has none; give the sub-folder as `directory`.
        captions: a JSON or CSV file, instead of `captions.json` or `captions.csv`.

    Raises FileNotFoundError for a missing directory or captions file; ValueError when the folder
    holds no image, or a caption is for an image that it does not hold.
    """
    directory = Path(directory)
    if split is not None:
        raise ValueError(
            f"a folder of images has no splits, got {split!r}; give the sub-folder as the directory"
        )
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory; expected a folder of images")
    found = sorted(
        file.relative_to(directory).as_posix()
        for file in directory.rglob("*")
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if not found:
        raise ValueError(f"{directory}: holds no image; expected files {', '.join(SUFFIXES)}")
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


def _captions(
    directory: Path, given: str | os.PathLike[str] | None, images: set[str]
) -> dict[str, tuple[str, ...]]:
    """{image: captions}; nothing when no file was given and none lies there."""
    names = ["captions.json", "captions.csv"] if given is None else [given]
    paths = [directory / name for name in names if given is not None or (directory / name).exists()]
    if not paths:
        return {}
    path = paths[0]
    captions = _of_csv(path, images) if path.suffix.lower() == ".csv" else _of_json(path)
    for place, name, _ in captions:
        if name not in images:
            raise ValueError(f"{path}: {place}: {directory} holds no image {name!r}")
    by_image: dict[str, tuple[str, ...]] = {}
    for _, name, caption in captions:
        by_image[name] = (*by_image.get(name, ()), caption)
    return by_image


def _of_json(path: Path) -> list[tuple[str, str, str]]:
    """(place in the file, image, caption)."""
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
    """(place in the file, image, caption)."""
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
