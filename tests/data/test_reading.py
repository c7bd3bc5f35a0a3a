"""Pictures in batches of one size: what is read, what fills up, what is passed over."""

import time

import numpy as np
import pytest
from PIL import Image

from xlvlm_jax.data.reading import ahead, read_pictures
from xlvlm_jax.data.sample import Sample


def samples(folder, values):
    """One sample a value: a grey picture of it, or no picture where it is None."""
    found = []
    for i, value in enumerate(values):
        path = folder / f"{i}.png"
        if value is not None:
            Image.new("RGB", (2, 2), (value,) * 3).save(path)
        found.append(Sample(str(i), path, image_id=str(i), prompt="?"))
    return found


def test_a_batch_by_hand(tmp_path):
    pictures = read_pictures(samples(tmp_path, [None, 10, 20]), 4)
    assert [image.getpixel((0, 0))[0] for image in pictures.images] == [10, 20, 10, 10]
    np.testing.assert_array_equal(pictures.rows, [1, 2, 1, 1])
    assert pictures.num_rows == 2
    assert pictures.errors[1:] == (None, None) and "no such image file" in pictures.errors[0]


def test_without_any_picture_there_is_no_batch(tmp_path):
    pictures = read_pictures(samples(tmp_path, [None, None]), 4)
    assert (pictures.images, len(pictures.rows), pictures.num_rows) == ([], 0, 0)
    assert len(pictures.errors) == 2


def test_strict_stops_at_the_first(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"1\.png: no such image file"):
        read_pictures(samples(tmp_path, [5, None, 6]), 4, strict=True)


@pytest.mark.parametrize("workers", [1, 3])
def test_in_order_however_long_each_takes(workers):
    def slow(group):
        time.sleep(0.01 * (group % 3))
        return 10 * group

    assert list(ahead(range(7), slow, workers)) == [0, 10, 20, 30, 40, 50, 60]
