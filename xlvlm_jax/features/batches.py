"""Samples -> batches of what the model takes; images are read ahead of the model.

B batch.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ports import VLM
from xlvlm_jax.data.answers import answered
from xlvlm_jax.data.batches import ahead, process_samples
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.features.settings import Settings

Group = tuple[Sample, ...]  # the samples of one batch


class Batch(NamedTuple):
    """What one pass of the model takes, and whose it is."""

    samples: Group
    errors: tuple[str | None, ...]  # why a sample has no row, else None
    rows: np.ndarray  # int[B]: the sample of `samples` that each row of the batch belongs to
    num_rows: int  # the rows behind only fill the batch up
    inputs: dict[str, np.ndarray] | None  # None if no sample has a row
    answer_lengths: np.ndarray  # int[B]: how many of the last tokens are forced


def groups_of(samples: Sequence[Sample], size: int) -> list[Group]:
    """The samples in order, `size` at a time. Which share a batch depends on nothing else."""
    return [tuple(samples[i : i + size]) for i in range(0, len(samples), size)]


def batches(
    vlm: VLM, groups: Sequence[Group], settings: Settings, *, strict: bool, workers: int
) -> Iterator[Batch]:
    """A batch a group, read and preprocessed by threads ahead of the model."""
    # What the processor reads once is read before the threads ask for it.
    vlm.processor  # noqa: B018
    prepared = functools.partial(prepare, vlm, settings=settings, strict=strict)
    return ahead(groups, prepared, workers)


def default_workers() -> int:
    """Threads that read images: decoding and resizing let others run, so one a core, at most 16."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)


def prepare(vlm: VLM, samples: Group, *, settings: Settings, strict: bool) -> Batch:
    """The batch of a group. Raises OSError or ValueError for a sample without a row if strict."""
    texts = [vlm.render(sample.prompt) for sample in samples]
    lengths = np.zeros(len(samples), int)
    if settings.mode == "teacher-forcing":
        texts, lengths = answered(vlm, texts, [reference(sample) for sample in samples])
    made = process_samples(vlm, samples, [texts], settings.batch_size, strict=strict)
    inputs = made.inputs[0] if made.inputs else None
    return Batch(samples, made.errors, made.rows, made.num_rows, inputs, lengths[made.rows])


def reference(sample: Sample) -> str:
    """What is forced on a sample. ValueError for one without references."""
    if not sample.references:
        raise ValueError(
            f"sample {sample.id} has no reference to force; use data with captions or answers"
        )
    return sample.references[0]
