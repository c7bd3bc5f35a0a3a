"""Resizing against PyTorch, to the last bit."""

import numpy as np
import pytest
import torch

from ports.inputs import resizing

SHAPES = [(40, 23, 3), (1, 3, 3), (90, 64, 3)]
SIZES = ((35, 35), (60, 91), (7, 120))


def image_and_tensor(shape: tuple[int, int, int]) -> tuple[np.ndarray, torch.Tensor]:
    image = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    return image, torch.from_numpy(image).permute(2, 0, 1)[None]


@pytest.mark.parametrize("shape", SHAPES)
def test_bilinear_is_pytorchs(shape):
    image, tensor = image_and_tensor(shape)
    options = {"mode": "bilinear", "align_corners": False}
    for size in SIZES:
        theirs = torch.nn.functional.interpolate(tensor.float(), size, **options).round()
        ours = resizing.bilinear(image, *size)
        np.testing.assert_array_equal(ours, theirs[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("resize", [resizing.bicubic, resizing.lanczos])
@pytest.mark.parametrize("shape", SHAPES)
def test_filters_are_pytorchs(shape, resize):
    image, tensor = image_and_tensor(shape)
    # The last has the height of the image, which is left as it is.
    for size in (*SIZES, (shape[0], 17)):
        mode = resize.__name__
        theirs = torch.nn.functional.interpolate(tensor, size, mode=mode, antialias=True)
        ours = resize(image, *size)
        np.testing.assert_array_equal(ours, theirs[0].permute(1, 2, 0).numpy())


def test_bicubic_by_hand():
    """At half the size, a pixel is a sum of eight, by Keys' cubic at 1/4 to 7/4 each way."""
    line = np.zeros((1, 16, 3), np.uint8)
    line[0, 7] = 200
    cubic = np.array([111, 29, -9, -3]) / 128
    expected = np.zeros(8)
    # Pixel 7 is 1/4, 3/4 ... of a new pixel from the centres of the new pixels 3, 4, 2 and 5.
    expected[[3, 4, 2, 5]] = 200 * cubic / (2 * cubic.sum())
    expected = np.clip(expected.round(), 0, 255)
    np.testing.assert_array_equal(resizing.bicubic(line, 1, 8)[0, :, 0], expected)


@pytest.mark.parametrize("resize", [resizing.bilinear, resizing.bicubic, resizing.lanczos])
@pytest.mark.parametrize("value", [0, 77, 255])
def test_one_colour_stays(resize, value):
    image = np.full((9, 14, 3), value, np.uint8)
    assert (resize(image, 31, 5) == value).all()
