"""Pictures as arrays, for processors that are not those of transformers."""

from typing import Any

import numpy as np
from PIL import Image


def as_rgb(image: Any) -> np.ndarray:
    """Converts a picture to RGB as transformers' image processors do: what is transparent is white.

    Args:
        image: a PIL image, or uint8[height, width], [height, width, 1] or [height, width, 4].

    Returns:
        uint8[height, width, 3]; other arrays as they are.
    """
    from transformers.image_transforms import convert_to_rgb

    if isinstance(image, Image.Image):
        return np.asarray(convert_to_rgb(image, return_numpy=True))
    pixels = np.asarray(image)
    if pixels.dtype == np.uint8 and pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 4):
        return pixels
    rgb = convert_to_rgb(pixels, return_numpy=True, input_data_format="channels_last")
    return np.asarray(rgb)
