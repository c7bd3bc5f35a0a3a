"""Images with prompts and references: COCO, VQAv2, POPE, AMBER, folders, drawn scenes, others."""

import os
from importlib import import_module
from typing import Any

from xlvlm_jax.data.frames import to_pandas
from xlvlm_jax.data.sample import Sample

DATASETS = ("coco", "vqav2", "folder", "pope", "mmsb", "amber", "scenes", "questions")

__all__ = ["DATASETS", "Sample", "load", "to_pandas"]


def load(
    name: str, directory: str | os.PathLike[str], split: str | None = None, **options: Any
) -> list[Sample]:
    """Returns the samples of one split of a data set, in the order of its files.

    Args:
        name: one of DATASETS.
        directory: directory of its files; drawn scenes are read as "coco" or "vqav2", or as
            "scenes" for questions about what they show.
        split: "train" (the default), "val" or "test"; a folder has none; POPE, AMBER,
            MM-SafetyBench ("mmsb") and "questions" have their own.
        **options: options of the reader, e.g. the names of files.

    Raises:
        ValueError: the name or split is unknown, or a file is invalid; the message names the file
            and the place in it.
        FileNotFoundError: a file is missing.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; expected one of {', '.join(DATASETS)}")
    if split is not None:
        options["split"] = split
    return import_module(f"xlvlm_jax.data.{name}").load(directory, **options)
