"""Makes batches of one size from samples, read ahead of the model.

A sample whose picture can't be read, or whose picture or prompt the checkpoint's processor refuses,
is left out of its batch and the reason recorded; the others are unaffected.

B batch.
"""

import bisect
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from ports import VLM
from xlvlm_jax.data.answers import answered, without_end
from xlvlm_jax.data.images import read_image
from xlvlm_jax.data.sample import Sample

Asked = TypeVar("Asked")
Made = TypeVar("Made")
Arrays = dict[str, np.ndarray]
Group = tuple[Sample, ...]  # the samples of one batch
PICTURE_ROWS = 4  # a picture and its part of a prompt cost as much as this many questions, or more


class Batch(NamedTuple):
    """Inputs of one pass of the model, and the samples they belong to."""

    samples: Group
    errors: tuple[str | None, ...]  # per sample: why it has no row, else None
    rows: np.ndarray  # int[B]: index into `samples` of each row; int[0] if none has a row
    num_rows: int  # the rows after these are padding
    inputs: tuple[Arrays, ...]  # one per version of the prompts; () if no sample has a row
    answer_lengths: np.ndarray  # int[B]: how many of a row's last tokens are its answer
    sizes: tuple[tuple[int, int], ...]  # per row: height and width of its picture

    @property
    def good(self) -> np.ndarray:
        """int[R]: indices of the samples that have a row, in row order."""
        return self.rows[: self.num_rows]

    @property
    def refused(self) -> dict[str, str]:
        """{sample id: why it has no row}."""
        pairs = zip(self.samples, self.errors, strict=True)
        return {sample.id: error for sample, error in pairs if error is not None}


def own_prompt(sample: Sample) -> str:
    """Returns the prompt that a sample has in its data set."""
    return sample.prompt


def groups_of(samples: Sequence[Sample], size: int) -> list[Group]:
    """Splits the samples, in order, into groups of `size`, independently of anything else."""
    return [tuple(samples[i : i + size]) for i in range(0, len(samples), size)]


def groups_by_picture(samples: Sequence[Sample], size: int) -> list[Group]:
    """Splits samples, ordered by picture, into groups of nearly equal size with few pictures each.

    Questions about one picture share its encoding, and programs are compiled for 1, 2, 4 ...
    pictures (see `ports.inputs.common_prefix`). A group therefore ends early where one more picture
    would double what is computed, and no group is much smaller than the others, as it would need a
    program of its own.

    Args:
        samples: the samples; those with the same picture follow each other.
        size: maximum number of samples in a group, to which its batch is padded.

    Returns:
        The groups, in order; those of `groups_of` for fewer than two samples per picture.
    """
    names: dict[Any, int] = {}
    pictures = [names.setdefault(sample.image, len(names)) for sample in samples]
    if not samples or 2 * len(names) > len(samples):
        return groups_of(samples, size)

    def starts(rows: int, most: int) -> list[int]:
        """Returns where groups of at most so many rows and pictures start."""
        found, first = [0], 0
        for i, picture in enumerate(pictures):
            if i - first == rows or picture - pictures[first] >= most:
                found.append(first := i)
        return found

    def cost(most: int) -> int:
        return len(starts(size, most)) * (most * PICTURE_ROWS + size)

    most = min((2**power for power in range((size - 1).bit_length() + 1)), key=cost)
    count = len(starts(size, most))
    rows = bisect.bisect_left(range(size), -count, key=lambda rows: -len(starts(rows + 1, most)))
    ends = [*starts(rows + 1, most), len(samples)]
    return [tuple(samples[first:last]) for first, last in itertools.pairwise(ends)]


def make_batch(
    vlm: VLM,
    samples: Sequence[Sample],
    size: int,
    *,
    prompts: Sequence[Callable[[Sample], str]] = (own_prompt,),
    answers: Sequence[str] | None = None,
    ended: bool = True,
    strict: bool = False,
) -> Batch:
    """Reads the pictures of some samples and runs the processor over them and their prompts.

    Args:
        vlm: the model, for its chat template and processor.
        samples: at most `size` samples.
        size: B. A smaller batch is padded with copies of its first row, so that all have one shape.
        prompts: functions from a sample to its prompt, one per version of the batch.
        answers: answer to append to the prompt of each sample; only with a single version.
        ended: whether the end-of-answer token follows too.
        strict: stop at a sample that has no row, instead of recording why.

    Raises:
        OSError: if strict, a picture can't be read; the sample is named.
        ValueError: if strict, the processor refuses a sample, which is named. An error for the
            batch that no single sample causes, or for a missing package, is passed on.
    """
    texts = [[vlm.render(prompt(sample)) for sample in samples] for prompt in prompts]
    lengths, suffixes = np.zeros(len(samples), int), None
    if answers is not None:
        (own,) = texts
        own, suffixes, lengths = answered(vlm, own, answers, ended=ended)
        texts = [own]
    images, errors = _read(samples, strict)
    process = functools.partial(_process, vlm, texts, suffixes)
    inputs: tuple[Arrays, ...] = ()
    try:
        inputs = process(images, size)
    except (ImportError, MemoryError):
        raise
    # Processors may raise any error for an odd picture, or a prompt with their own markers.
    except Exception as error:
        refused = _refused(process, images)
        if not refused:
            raise
        for i, reason in refused.items():
            del images[i]
            errors[i] = f"{samples[i].image}: the processor refuses it or its prompt ({reason})"
            if strict:
                raise ValueError(f"sample {samples[i].id}: {errors[i]}") from error
        inputs = process(images, size)
    if suffixes is not None and not ended:
        inputs = tuple(map(without_end, inputs))
    rows = _filled(images, size)
    sizes = tuple((images[i].height, images[i].width) for i in rows.tolist())
    return Batch(tuple(samples), tuple(errors), rows, len(images), inputs, lengths[rows], sizes)


def _read(
    samples: Sequence[Sample], strict: bool
) -> tuple[dict[int, Image.Image], list[str | None]]:
    """Returns {index: picture} of the samples that can be read, and why each other one can't."""
    images, errors = {}, []
    read = functools.cache(read_image)
    for i, sample in enumerate(samples):
        try:
            images[i] = read(sample.image)
            errors.append(None)
        except (OSError, ValueError) as error:
            if strict:
                raise type(error)(f"sample {sample.id}: {error}") from error
            errors.append(str(error))
    return images, errors


def _filled(images: Mapping[int, Image.Image], size: int) -> np.ndarray:
    good = list(images)
    return np.array(good + good[:1] * (size - len(good)), int)


def _process(
    vlm: VLM,
    texts: Sequence[Sequence[str]],
    suffixes: Sequence[str] | None,
    images: Mapping[int, Image.Image],
    size: int,
) -> tuple[Arrays, ...]:
    """Returns the processor's arrays of each version, whose answers may be `suffixes`.

    Raises whatever the processor raises, or ValueError if images and prompts do not match (a
    question may contain the image marker).
    """
    rows: list[int] = _filled(images, size).tolist()
    if not rows:
        return ()
    pictures = [images[i] for i in rows]
    options = {} if suffixes is None else {"suffix": [suffixes[i] for i in rows]}
    inputs = tuple(
        vlm.process([version[i] for i in rows], pictures, **options) for version in texts
    )
    for arrays in inputs:
        vlm.prepare(arrays)
    return inputs


def _refused(
    process: Callable[[Mapping[int, Image.Image], int], Any], images: Mapping[int, Image.Image]
) -> dict[int, str]:
    """Returns {index: why it can't be processed}, trying each sample alone."""
    refused = {}
    for i, image in images.items():
        try:
            process({i: image}, 1)
        except Exception as error:
            said = " ".join(str(error).split())
            refused[i] = said[:300] or type(error).__name__
    return refused


def read_ahead(
    asked: Sequence[Asked], make: Callable[[Asked], Made], workers: int | None = None
) -> Iterator[Made]:
    """Yields make(x) for each item in order, computed by threads ahead of the caller.

    Args:
        asked: the items.
        make: called with an item, on any thread.
        workers: number of threads; None for `default_workers`.
    """
    import grain  # loads Orbax, so only where a model runs

    begun = threading.Event()

    def made(number: int) -> Made:
        # The first call reads and sets shared state (the processor, its padding), which the others
        # must not see half done.
        if number > 0:
            begun.wait()
        try:
            return make(asked[number])
        finally:
            begun.set()

    workers = workers or default_workers()
    dataset = grain.MapDataset.source(range(len(asked))).map(made)
    # One more than there are threads: as many batches wait as are being made.
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers + 1)
    return iter(dataset.to_iter_dataset(options))


def default_workers() -> int:
    """Returns the number of threads that read images: one per core, at most 16.

    Decoding and resizing release the interpreter lock.
    """
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
