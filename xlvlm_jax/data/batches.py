"""Samples -> what the model takes, in batches of one size, read ahead of it.

A sample whose picture can't be read, or whose picture or prompt the checkpoint's processor refuses,
leaves its batch with the reason; the others are computed as if it had not been there.

B batch.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from ports import VLM
from xlvlm_jax.data.answers import answered
from xlvlm_jax.data.images import read_image
from xlvlm_jax.data.sample import Sample

Asked = TypeVar("Asked")
Made = TypeVar("Made")
Arrays = dict[str, np.ndarray]
Group = tuple[Sample, ...]  # the samples of one batch


class Batch(NamedTuple):
    """What one pass of the model takes, and whose it is."""

    samples: Group
    errors: tuple[str | None, ...]  # a sample: why it has no row, else None
    rows: np.ndarray  # int[B]: the sample that each row belongs to; int[0] if none has a row
    num_rows: int  # the rows after these only fill the batch up
    inputs: tuple[Arrays, ...]  # one per version of the prompts; () if no sample has a row
    answer_lengths: np.ndarray  # int[B]: how many of a row's last tokens are its answer

    @property
    def good(self) -> np.ndarray:
        """int[R]: the samples that have a row, in the order of the rows."""
        return self.rows[: self.num_rows]

    @property
    def refused(self) -> dict[str, str]:
        """Sample -> why it has no row."""
        pairs = zip(self.samples, self.errors, strict=True)
        return {sample.id: error for sample, error in pairs if error is not None}


def own_prompt(sample: Sample) -> str:
    """What a sample is asked, in its data's own words."""
    return sample.prompt


def groups_of(samples: Sequence[Sample], size: int) -> list[Group]:
    """The samples in order, `size` at a time. Which share a batch depends on nothing else."""
    return [tuple(samples[i : i + size]) for i in range(0, len(samples), size)]


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
        vlm: whose chat template and processor.
        samples: at most `size`.
        size: B. A batch is filled up by its first row, so that all batches are alike.
        prompts: versions of what is asked, each of which gives a sample its prompt.
        answers: what follows the prompt of each sample; of one version only.
        ended: whether the token that ends an answer follows too.
        strict: stop at a sample that has no row, instead of recording why.

    Raises, if strict, OSError or ValueError that names the sample. What the processor raises for a
    batch but for none of its samples passes, and so does a package that it lacks.
    """
    texts = [[vlm.render(prompt(sample)) for sample in samples] for prompt in prompts]
    lengths = np.zeros(len(samples), int)
    if answers is not None:
        (own,) = texts
        own, lengths = answered(vlm, own, answers, ended=ended)
        texts = [own]
    images, errors = _read(samples, strict)
    inputs: tuple[Arrays, ...] = ()
    try:
        inputs = _process(vlm, texts, images, size)
    except (ImportError, MemoryError):
        raise
    # Processors raise whatever an odd picture or a prompt with their own marks leads them to.
    except Exception as error:
        refused = _refused(vlm, texts, images)
        if not refused:
            raise
        for i, reason in refused.items():
            del images[i]
            errors[i] = f"{samples[i].image}: the processor refuses it or its prompt ({reason})"
            if strict:
                raise ValueError(f"sample {samples[i].id}: {errors[i]}") from error
        inputs = _process(vlm, texts, images, size)
    rows = _filled(images, size)
    return Batch(tuple(samples), tuple(errors), rows, len(images), inputs, lengths[rows])


def _read(
    samples: Sequence[Sample], strict: bool
) -> tuple[dict[int, Image.Image], list[str | None]]:
    """{sample: its picture}, of those that can be read, and why each other can't."""
    images, errors = {}, []
    for i, sample in enumerate(samples):
        try:
            images[i] = read_image(sample.image)
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
    vlm: VLM, texts: Sequence[Sequence[str]], images: Mapping[int, Image.Image], size: int
) -> tuple[Arrays, ...]:
    """The processor's arrays of each version. Raises whatever it does, or ValueError if images and
    prompts do not fit each other (a question may hold the mark that stands for an image).
    """
    rows: list[int] = _filled(images, size).tolist()
    if not rows:
        return ()
    pictures = [images[i] for i in rows]
    inputs = tuple(vlm.process([version[i] for i in rows], pictures) for version in texts)
    for arrays in inputs:
        vlm.prepare(arrays)
    return inputs


def _refused(
    vlm: VLM, texts: Sequence[Sequence[str]], images: Mapping[int, Image.Image]
) -> dict[int, str]:
    """{sample: why it can't be processed}, each tried alone."""
    refused = {}
    for i, image in images.items():
        try:
            _process(vlm, texts, {i: image}, 1)
        except Exception as error:
            said = " ".join(str(error).split())
            refused[i] = said[:300] or type(error).__name__
    return refused


def read_ahead(
    asked: Sequence[Asked], make: Callable[[Asked], Made], workers: int | None = None
) -> Iterator[Made]:
    """make(each) of what is asked, in order, by threads ahead of the caller.

    workers: how many threads; None: `default_workers`.
    """
    import grain  # which loads Orbax, so only where a model runs

    begun = threading.Event()

    def made(number: int) -> Made:
        # What the first reads and sets for all (the processor, its padding) no other may meet
        # half done.
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
    """Threads that read images: decoding and resizing let others run, so one a core, at most 16."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
