"""Resizing of pixels as PyTorch does it on a CPU, in numpy, to the last bit."""

import math
from collections.abc import Callable

import numpy as np

Kernel = Callable[[np.ndarray], np.ndarray]


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes by bilinear interpolation between the four nearest pixels, without antialiasing.

    Args:
        image: uint8[h, w, 3].
        height: pixels of the result.
        width: pixels of the result.

    Returns:
        uint8[height, width, 3], rounded to the nearest value, half to even.
    """
    top, bottom, down = _neighbours(image.shape[0], height)
    left, right, across = _neighbours(image.shape[1], width)
    down, across = down[:, None, None], across[:, None]
    up, back = 1 - down, 1 - across
    pixels = image.astype(np.float32)
    above, below = pixels[top], pixels[bottom]
    # In the order in which PyTorch adds them, or halves would be rounded elsewhere.
    values = (down * back, below[:, left]), (down * across, below[:, right])
    total = up * across * above[:, right]
    for weight, value in ((up * back, above[:, left]), *values):
        total = _add_product(total, weight, value)
    return np.clip(np.rint(total), 0, 255).astype(np.uint8)


def _add_product(total: np.ndarray, weight: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Returns the sum in float32, rounded once, as processors compute it in one instruction."""
    return (weight.astype(np.float64) * value + total).astype(np.float32)


def _neighbours(given: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns for each of the wanted pixels in a line the given ones before and after its centre,
    and the weight of the latter.
    """
    # The scale and the result are float32, as in PyTorch.
    scale = float(np.float32(given) / np.float32(wanted))
    place = np.maximum(scale * (np.arange(wanted) + 0.5) - 0.5, 0).astype(np.float32)
    before = np.minimum(place.astype(int), given - 1)
    return before, np.minimum(before + 1, given - 1), place - before.astype(np.float32)


def bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes by cubic convolution, with antialiasing: as torchvision resizes uint8 by default.

    The width is resized first, then the height. Weights have 16 bits and the pixels between the two
    steps 8, so that the result is exact everywhere.

    Args:
        image: uint8[h, w, 3].
        height: pixels of the result.
        width: pixels of the result.

    Returns:
        uint8[height, width, 3].
    """
    return _filtered(image, height, width, _cubic, 2)


def lanczos(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes with Lanczos' filter of three lobes, in the same way as `bicubic`.

    Args:
        image: uint8[h, w, 3].
        height: pixels of the result.
        width: pixels of the result.

    Returns:
        uint8[height, width, 3].
    """
    return _filtered(image, height, width, _lanczos, 3)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic with a = -1/2, within one pixel and up to two, at distances x >= 0."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    """The sine cardinal, in a window of another that is three times as wide, at x >= 0."""
    return np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0)


def _filtered(image: np.ndarray, height: int, width: int, kernel: Kernel, reach: int) -> np.ndarray:
    across = _resized(image.swapaxes(0, 1), width, kernel, reach).swapaxes(0, 1)
    return np.ascontiguousarray(_resized(across, height, kernel, reach))


def _resized(lines: np.ndarray, wanted: int, kernel: Kernel, reach: int) -> np.ndarray:
    """Resizes uint8[given, ...] to uint8[wanted, ...]."""
    if len(lines) == wanted:
        return lines
    index, weights, precision = _weights(len(lines), wanted, kernel, reach)
    total = np.full((wanted, *lines.shape[1:]), 1 << (precision - 1), np.int32)
    for place, weight in zip(index.T, weights.T, strict=True):
        total += weight[:, None, None] * lines[place]
    return np.clip(total >> precision, 0, 255).astype(np.uint8)


def _weights(
    given: int, wanted: int, kernel: Kernel, reach: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns for each of the wanted pixels in a line the given ones that it is made from, their
    weights int32[wanted, taps] in units of 2^-precision, and the precision.
    """
    scale = given / wanted
    stretch = max(scale, 1)
    centre = scale * (np.arange(wanted) + 0.5)
    first = np.maximum((centre - reach * stretch + 0.5).astype(int), 0)
    end = np.minimum((centre + reach * stretch + 0.5).astype(int), given)
    taps = np.arange(2 * math.ceil(reach * stretch) + 1)
    index = first[:, None] + taps
    x = np.abs((taps + (first - centre)[:, None] + 0.5) * (1 / stretch))
    weights = kernel(x) * (index < end[:, None])
    # cumsum adds from left to right, as PyTorch does.
    weights /= np.cumsum(weights, axis=1)[:, -1:]
    # As precise as possible with the largest weight in 16 bits.
    largest = weights.max()
    precision = next((p for p in range(22) if int(0.5 + largest * 2 ** (p + 1)) >= 1 << 15), 22)
    scaled = weights * 2**precision
    rounded = (scaled + np.where(scaled < 0, -0.5, 0.5)).astype(np.int32)
    return np.minimum(index, given - 1), rounded, precision
