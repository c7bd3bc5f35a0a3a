"""The processor's arrays of a Qwen: checks, and a layout for which few programs are compiled.

F frames (an image has one), P patches per frame, I images or videos.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ports.inputs import padding
from ports.inputs import patch_layout as patches
from ports.inputs.patch_layout import Layouts
from ports.models.qwen2_vl.config import Config
from ports.nn import vision_language

# The processor's arrays that the port uses; the rest (mm_token_type_ids) is ignored: what a token
# is follows from input_ids.
INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
)
# Names of the patches and of their grids, for images and for videos.
KINDS = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
PIECES = tuple(pixels for pixels, _ in KINDS)  # each frame is one


def example_inputs(config: Config, batch: int = 1, length: int | None = None) -> dict[str, Any]:
    """Returns shapes and dtypes of a batch with one image of 16 x 16 patches per row."""
    patches = 256
    length = length or patches // config.vision.merge_size**2 + vision_language.EXAMPLE_TEXT
    ids = jax.ShapeDtypeStruct((batch, length), np.int32)
    pixels = (batch, patches, config.vision.patch_values)
    return {
        "input_ids": ids,
        "attention_mask": ids,
        "pixel_values": jax.ShapeDtypeStruct(pixels, np.float32),
        "image_grid_thw": jax.ShapeDtypeStruct((batch, 3), np.int32),
    }


def prepare_inputs(config: Config, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checks the processor's arrays and prepares them for the module.

    Pads the patches to one row per frame, pixel_values[F, P, values], so that few shapes compile
    and attention is computed within frames. P is the largest frame's number of patches, rounded up.

    Args:
        config: the model's configuration.
        inputs: the processor's arrays.

    Returns:
        The arrays that the module takes.

    Raises:
        ValueError: grids, patches and image tokens do not match, or position_ids are given.
    """
    arrays = dict(inputs)
    if "position_ids" in arrays:
        raise ValueError(
            "position_ids are not inputs of this model family, whose positions follow from the "
            "grids of images and videos; leave them out"
        )
    for (pixels, grid), token in zip(KINDS, config.image_tokens, strict=True):
        images = _grid(config, arrays, pixels, grid)
        per_image = images.prod(axis=1) // config.vision.merge_size**2
        what = "image" if pixels == "pixel_values" else "video"
        vision_language.check_image_tokens(
            arrays["input_ids"],
            (token,),
            len(images),
            int(per_image.sum()),
            f"{', '.join(map(str, per_image.tolist()[:8])) or 'none'}, one number per {what}, "
            f"according to {grid} (pass it along with {pixels})",
            what,
        )
        if len(images):
            runs = per_image
            if config.frames_apart:
                runs = np.repeat(per_image // images[:, 0], images[:, 0])
                what = "frame"
            _check_runs(arrays["input_ids"], token, runs, what)
            arrays[pixels] = _by_frame(arrays[pixels], images)
    return arrays


def _grid(config: Config, arrays: Mapping[str, np.ndarray], pixels: str, grid: str) -> np.ndarray:
    """Checks and returns the grids int[I, 3]; int[0, 3] if there are no images."""
    patches, images = arrays.get(pixels), arrays.get(grid)
    if patches is None and images is None:
        return np.zeros((0, 3), int)
    if patches is None or images is None:
        there, missing = (grid, pixels) if patches is None else (pixels, grid)
        raise ValueError(
            f"inputs have {there} without {missing}; pass both, as the processor returns them"
        )
    values, merge = config.vision.patch_values, config.vision.merge_size
    if patches.ndim != 2 or patches.shape[1] != values:
        raise ValueError(
            f"{pixels} has shape {patches.shape}; expected [patches, {values}], flat patches of "
            f"{config.vision.patch_size} x {config.vision.patch_size} pixels"
        )
    if images.ndim != 2 or images.shape[1] != 3:
        raise ValueError(f"{grid} has shape {images.shape}; expected [images, 3]")
    bad = np.flatnonzero((images < 1).any(1) | (images[:, 1:] % merge).any(1))
    if len(bad):
        raise ValueError(
            f"{grid} of image {bad[0]} is {images[bad[0]].tolist()}; expected rows and columns in "
            f"multiples of {merge} patches: let the processor resize images smaller than "
            f"{merge} x {merge} patches"
        )
    if images.prod(axis=1).sum() != len(patches):
        raise ValueError(
            f"{grid} describes {images.prod(axis=1).sum()} patches, but {pixels} has "
            f"{len(patches)}; pass both from the same call of the processor"
        )
    return images


def _check_runs(input_ids: np.ndarray, token: int, per_image: np.ndarray, what: str) -> None:
    """Raises ValueError unless the tokens of each image are consecutive in one prompt."""
    rows, columns = np.nonzero(input_ids == token)
    ends = np.cumsum(per_image)
    first, last = ends - per_image, ends - 1
    apart = (columns[last] - columns[first] != per_image - 1) | (rows[last] != rows[first])
    if apart.any():
        i = int(np.argmax(apart))
        raise ValueError(
            f"the {per_image[i]} tokens of {what} {i}, according to its grid, are not consecutive "
            f"in one prompt; pass the {what}s in the order of the prompts"
        )


def _by_frame(patches: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Splits patches[sum, values] into frames [F, P, values], padded with zeros."""
    sizes = np.repeat(grid[:, 1] * grid[:, 2], grid[:, 0])
    longest = padding.bucket_length(int(sizes.max()))
    frames = np.zeros((len(sizes), longest, patches.shape[1]), np.float32)
    for frame, part in zip(frames, np.split(patches, np.cumsum(sizes)[:-1]), strict=True):
        frame[: len(part)] = part
    return frames


def patch_layout(
    config: Config, arrays: Mapping[str, np.ndarray], read_processor: Callable[[], Any]
) -> Layouts:
    """Lays out merged patches; the processor only resizes a picture, so that they fill it."""
    grids = [arrays.get(grid) for _, grid in KINDS]
    return patches.of_grids(
        arrays["input_ids"],
        dict(zip(config.image_tokens, grids, strict=True)),
        config.vision.merge_size,
    )
