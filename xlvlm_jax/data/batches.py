"""Samples -> what the model takes, in batches of one size, read ahead of it.

A sample whose picture can't be read, or whose picture or prompt the checkpoint's processor refuses,
leaves its batch with the reason; the others are computed as if it had not been there.

B batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from ports import VLM
from xlvlm_jax.data.images import read_image
from xlvlm_jax.data.sample import Sample

Group = TypeVar("Group")
Batch = TypeVar("Batch")
Arrays = dict[str, np.ndarray]


class Processed(NamedTuple):
    """What the processor made of some samples, filled up to a batch."""

    rows: np.ndarray  # int[B]: the sample that each row belongs to; int[0] if none is good
    num_rows: int  # the rows behind only fill the batch up
    errors: tuple[str | None, ...]  # a sample: why it has no row, else None
    inputs: tuple[Arrays, ...]  # one a version of the texts; () if no sample is good

    @property
    def good(self) -> np.ndarray:
        """int[R]: the samples that have a row, in the order of the rows."""
        return self.rows[: self.num_rows]


def process_samples(
    vlm: VLM,
    samples: Sequence[Sample],
    texts: Sequence[Sequence[str]],
    size: int,
    *,
    strict: bool = False,
) -> Processed:
    """Reads the pictures of some samples and runs the processor over them.

    Args:
        vlm: whose processor.
        samples: at most `size`.
        texts: versions of what is asked: of each, a rendered prompt a sample.
        size: B. A batch is filled up by its first row, so that all batches are alike.
        strict: stop at a sample that has no row, instead of recording why.

    Raises, if strict, OSError or ValueError that names the sample. What the processor raises for a
    batch but for none of its samples passes, and so does a package that it lacks.
    """
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
    return Processed(_filled(images, size), len(images), tuple(errors), inputs)


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


def ahead(
    groups: Sequence[Group], prepare: Callable[[Group], Batch], workers: int
) -> Iterator[Batch]:
    """prepare(group) of each group in order, by threads ahead of who takes them."""
    import grain  # which loads Orbax, so only where a model runs

    dataset = grain.MapDataset.source(list(groups)).map(prepare)
    # One more than there are threads: as many batches wait as are being made.
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers + 1)
    return iter(dataset.to_iter_dataset(options))
