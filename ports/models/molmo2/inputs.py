"""The processor's arrays: prepared for the model, and where their features are in the pictures.

T positions, R crops (or frames), P patches per crop, F features, K patches of a feature.

`image_token_pooling` int[F, K] numbers the patches of all crops of the batch; -1 is none.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ports.inputs import padding
from ports.inputs import patch_layout as patches
from ports.inputs.patch_layout import Layouts
from ports.models.molmo2.config import Config
from ports.nn import vision_language

# The processor's arrays of pictures and of videos: pixels, patches of features, grids.
KINDS = (
    ("pixel_values", "image_token_pooling", "image_grids"),
    ("pixel_values_videos", "video_token_pooling", "video_grids"),
)
POOL = 2  # of pictures, POOL x POOL patches become one feature


def kind_of(inputs: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Returns the names of the arrays that the inputs have: of pictures, videos, or neither.

    Raises:
        ValueError: they have pictures and videos, or pixels without their pooling.
    """
    given = [names for names in KINDS if inputs.get(names[0]) is not None]
    if len(given) > 1:
        raise ValueError(
            "inputs have pixel_values and pixel_values_videos; Molmo2 sees pictures or videos: "
            "pass one of them per batch"
        )
    if given and inputs.get(given[0][1]) is None:
        raise ValueError(
            f"inputs have {given[0][0]} but no {given[0][1]}; pass what the processor returns"
        )
    return given[0] if given else None


def example_inputs(config: Config, batch: int = 1, length: int | None = None) -> dict[str, Any]:
    """Returns shapes and dtypes of a batch with one image per row, of one crop plus the whole."""
    count = 2 * (-(-math.isqrt(config.num_patches) // POOL)) ** 2
    ids = jax.ShapeDtypeStruct((batch, length or count + vision_language.EXAMPLE_TEXT), np.int32)
    pixels = (2 * batch, config.num_patches, config.patch_values)
    return {
        "input_ids": ids,
        "attention_mask": ids,
        "pixel_values": jax.ShapeDtypeStruct(pixels, np.float32),
        "image_token_pooling": jax.ShapeDtypeStruct((batch * count, POOL**2), np.int32),
    }


def prepare_inputs(config: Config, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checks the processor's arrays, and pads features to one of a few numbers.

    Args:
        config: the model's configuration.
        inputs: the processor's arrays.

    Returns:
        The arrays that the module takes; those of videos have the names of pictures.

    Raises:
        ValueError: crops, features and image tokens do not match.
    """
    kind = kind_of(inputs)
    known = {name for names in KINDS for name in names}
    arrays = {name: value for name, value in inputs.items() if name not in known}
    is_patch, what = config.image_tokens[:1], "video" if kind == KINDS[1] else "image"
    if kind is None:
        expected = "none without the processor's pixel_values and image_token_pooling"
        vision_language.check_image_tokens(arrays["input_ids"], is_patch, 0, 0, expected)
        return arrays
    pixels, pooling = (np.asarray(inputs[name]) for name in kind[:2])
    crops, shape = len(pixels), (config.num_patches, config.patch_values)
    if pixels.shape[1:] != shape:
        raise ValueError(f"{kind[0]} has shape {pixels.shape}; expected [crops, %d, %d]" % shape)
    if pooling.ndim != 2 or pooling.max(initial=-1) >= crops * config.num_patches:
        raise ValueError(
            f"{kind[1]} has shape {pooling.shape} and numbers up to {pooling.max(initial=-1)}; "
            f"expected [features, patches] with numbers below {crops} x {config.num_patches}, "
            f"from the same call of the processor as {kind[0]}"
        )
    pooling = pooling[(pooling >= 0).any(-1)].astype(np.int32)
    count = len(inputs[kind[2]]) if inputs.get(kind[2]) is not None else 1
    expected = f"one per row of {kind[1]}, from one call of the processor"
    ids = arrays["input_ids"]
    vision_language.check_image_tokens(ids, is_patch, count, len(pooling), expected, what)
    missing = padding.bucket_count(len(pooling)) - len(pooling)
    return arrays | {
        KINDS[0][0]: pixels,
        KINDS[0][1]: np.pad(pooling, [(0, missing), (0, 0)], constant_values=-1),
    }


def patch_layout(
    config: Config, arrays: Mapping[str, np.ndarray], read_processor: Callable[[], Any]
) -> Layouts:
    """Lays out the crops of each picture, with the whole as its `whole`; a video's frames one by
    one. At the edge of a picture, a feature may have fewer patches and so a smaller box.

    Raises:
        ValueError: the grids are missing, or do not match the features or tokens.
    """
    kind = kind_of(arrays)
    if kind is not None and arrays.get(kind[2]) is None:
        raise ValueError(f"inputs have no {kind[2]}; pass what the processor returns")
    pooling, grids = ((), ()) if kind is None else (arrays[name] for name in kind[1:])
    # Rows and columns of each of a picture's two grids, or of each frame of a video.
    shapes = [
        [(grid[1], grid[2])] * grid[0]
        if kind == KINDS[1]
        else [(grid[0], grid[1]), (grid[2], grid[3])]
        for grid in np.asarray(grids, int).tolist()
    ]
    lengths = [sum(height * width for height, width in each) for each in shapes]
    if kind is not None and sum(lengths) != len(pooling):
        raise ValueError(
            f"{kind[2]} has grids of {sum(lengths)} features, but {kind[1]} has {len(pooling)}; "
            "pass the arrays of one call of the processor"
        )
    given, pooled, lengths = iter(shapes), iter(pooling), iter(lengths)
    rows: Layouts = []
    for row in arrays["input_ids"]:
        rows.append([])
        for places in patches.runs(row, config.image_tokens[0], lengths):
            found, rest = [], iter(places)
            for height, width in next(given):
                found.append(_grid(rest, pooled, height, width))
            if kind == KINDS[0]:
                whole, crops = found
                found = [dataclasses.replace(crops, whole=whole)]
            rows[-1] += found
    return rows


def _grid(
    places: Iterator[int], pooled: Iterator[np.ndarray], height: int, width: int
) -> patches.PatchLayout:
    """Lays out a grid of features, whose positions and patches come next."""
    count = height * width
    at = np.array([next(places) for _ in range(count)]).reshape(height, width)
    real = np.stack([next(pooled) for _ in range(count)]) >= 0
    side = math.isqrt(real.shape[1])
    if side**2 != real.shape[1]:
        raise ValueError(f"a feature has {real.shape[1]} patches; expected those of a square")
    real = real.reshape(height, width, side, side)
    # Patches along each row and column of features.
    down, across = real.any((1, 3)).sum(1), real.any((0, 2)).sum(1)
    y, x = (np.append(0, np.cumsum(each)) / each.sum() for each in (down, across))
    left, top = np.meshgrid(x[:-1], y[:-1])
    right, bottom = np.meshgrid(x[1:], y[1:])
    return patches.PatchLayout(at, np.stack([left, top, right, bottom], axis=-1))
