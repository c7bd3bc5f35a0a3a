"""Images with prompts and references: COCO captions, VQAv2, a folder of images, drawn scenes."""

import os
from importlib import import_module
from typing import Any

from xlvlm_jax.data.sample import Sample

DATASETS = ("coco", "vqav2", "folder")

__all__ = ["DATASETS", "Sample", "load"]


def load(
    name: str, directory: str | os.PathLike[str], split: str | None = None, **options: Any
) -> list[Sample]:
    """The samples of one split of a data set, in the order of its files.

    Args:
        name: one of DATASETS.
        directory: where its files lie; drawn scenes are read as "coco" or "vqav2".
        split: "train" (the default), "val" or "test"; a folder has none.
        options: those of the reader, e.g. the names of files.

    Raises ValueError and FileNotFoundError, one line each, naming the file and the place in it.
    """
    if name not in DATASETS:
        raise ValueError(f"no data set {name!r}; expected one of {', '.join(DATASETS)}")
    if split is not None:
        options["split"] = split
    return import_module(f"xlvlm_jax.data.{name}").load(directory, **options)
