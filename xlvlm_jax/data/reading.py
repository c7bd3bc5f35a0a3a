"""Pictures of samples in batches of one size, read ahead of the model.

B batch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import grain
import numpy as np
from PIL import Image

from xlvlm_jax.data.images import read_image
from xlvlm_jax.data.sample import Sample

Group, Batch = TypeVar("Group"), TypeVar("Batch")


class Pictures(NamedTuple):
    """The images of some samples that could be read, filled up to a batch."""

    images: list[Image.Image]  # B of them, or none at all
    rows: np.ndarray  # int[B]: the sample that each belongs to
    num_rows: int  # the rows behind only fill the batch up
    errors: tuple[str | None, ...]  # why a sample has no image, else None


def read_pictures(samples: Sequence[Sample], size: int, *, strict: bool = False) -> Pictures:
    """The images of at most `size` samples, filled up by the first, so that all batches are alike.

    Raises OSError or ValueError for an unreadable image if strict.
    """
    images, errors = [], []
    for sample in samples:
        try:
            images.append(read_image(sample.image))
            errors.append(None)
        except (OSError, ValueError) as error:
            if strict:
                raise
            errors.append(str(error))
    good = [i for i, error in enumerate(errors) if error is None]
    fill = size - len(good) if good else 0
    rows = np.array(good + good[:1] * fill, int)
    return Pictures(images + images[:1] * fill, rows, len(good), tuple(errors))


def ahead(
    groups: Sequence[Group], prepare: Callable[[Group], Batch], workers: int
) -> Iterator[Batch]:
    """prepare(group) of each group in order, by threads ahead of who takes them."""
    dataset = grain.MapDataset.source(list(groups)).map(prepare)
    # One more than there are threads: as many batches wait as are being made.
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers + 1)
    return iter(dataset.to_iter_dataset(options))
