"""How Molmo's processor cuts an image into crops, and where the features of each crop go.

P patches per crop, K features per crop (P / 4).

An image becomes one crop with the whole image, shrunk, and a tiling of overlapping crops. Each of
these shows a window of the enlarged image plus a margin, which the tower sees but whose features
are dropped where a neighbouring crop has them.

The tokens of an image are two grids, for the whole image and for the tiling, row by row:
    <im_start> (<im_patch> ... <im_col>) ... <im_end>
"""

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

POOL = 2  # POOL x POOL patches become one feature
UNUSED = -100  # in image_input_idx: the feature is not used
FILL = -1  # in all arrays of images: padding for rows with fewer crops
MARKS = {"patch": "<im_patch>", "col": "<im_col>", "start": "<im_start>", "end": "<im_end>"}
# Defaults of the original code, for values missing in preprocessor_config.json.
DEFAULTS = {
    "max_crops": 12,
    "overlap_margins": [4, 4],
    "base_image_input_size": [336, 336],
    "image_token_length_h": 12,
    "image_token_length_w": 12,
    "image_patch_size": 14,
    "image_padding_mask": True,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


class ImageSettings(NamedTuple):
    """Settings in preprocessor_config.json: how images are cut into crops."""

    crop_size: int  # pixels per side
    patch_size: int  # pixels per side
    max_crops: int  # maximum number of crops in the tiling
    margins: tuple[int, int]  # patches without features: at left and top, at right and bottom
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ImageSettings":
        """Reads the file's values.

        Raises:
            ValueError: a value is not implemented.
        """
        values = {**DEFAULTS, **values}
        for name, reason in (
            ("image_padding_mask", "the model needs the masks"),
            ("do_normalize", "the model was trained on normalised pixels"),
        ):
            if not values[name]:
                raise ValueError(f"{name} is {values[name]!r}; expected true, as {reason}")
        height, width = values["base_image_input_size"]
        patch, margins = values["image_patch_size"], tuple(values["overlap_margins"])
        if height != width or height % patch:
            raise ValueError(
                f"base_image_input_size is {[height, width]}; expected a square, a multiple of the "
                f"image_patch_size {patch}"
            )
        pooled = -(-(height // patch) // POOL)
        lengths = (values["image_token_length_h"], values["image_token_length_w"])
        if lengths != (pooled, pooled):
            raise ValueError(f"image_token_length is {lengths}; expected {pooled} for both")
        if any(margin % POOL for margin in margins) or sum(margins) >= height // patch:
            raise ValueError(
                f"overlap_margins is {list(margins)}; expected even numbers with a sum below the "
                f"{height // patch} patches per side of a crop"
            )
        if (height // patch - sum(margins)) % POOL:
            raise ValueError(
                f"a crop has {height // patch} patches per side, {sum(margins)} of them in the "
                "margins; expected an even number of others"
            )
        return cls(
            height,
            patch,
            values["max_crops"],
            margins,
            tuple(values["image_mean"]),
            tuple(values["image_std"]),
        )

    @property
    def crop_patches(self) -> int:
        """Patches along a side of a crop."""
        return self.crop_size // self.patch_size

    @property
    def pooled(self) -> int:
        """Features along a side of a crop."""
        return -(-self.crop_patches // POOL)

    @property
    def window(self) -> int:
        """Patches along a side of a crop without its margins."""
        return self.crop_patches - sum(self.margins)


class Crops(NamedTuple):
    """One image in the form that the model takes."""

    patches: np.ndarray  # float32[C, P, values]
    masks: np.ndarray  # float32[C, P]: fraction of a patch in the image; -1 in the last crop
    tokens: tuple[str, ...]  # keys of MARKS
    positions: np.ndarray  # int32[C, K]: index in `tokens` of each feature, or UNUSED


def choose_tiling(height: int, width: int, window: int, max_crops: int) -> tuple[int, int]:
    """Chooses the rows and columns of windows that need the least enlargement of an image.

    If the image is too large for every tiling, chooses the one that shrinks it least. Ties go to
    fewer windows, then fewer rows. Computed in float32, as in training.

    Args:
        height: pixels of the image.
        width: pixels of the image.
        window: pixels per side of a window.
        max_crops: maximum number of windows.

    Returns:
        (rows, columns).
    """
    tilings = [
        (rows, columns)
        for rows in range(1, max_crops + 1)
        for columns in range(1, max_crops + 1)
        if rows * columns <= max_crops
    ]
    tilings.sort(key=lambda tiling: (tiling[0] * tiling[1], tiling[0]))
    sizes = (np.array(tilings, np.int32) * window).astype(np.float32)
    with np.errstate(divide="ignore"):
        scales = (sizes / np.array([height, width], np.float32)).min(axis=1)
    if (scales < 1).all():
        return tilings[int(scales.argmax())]
    return tilings[int(np.where(scales < 1, np.float32(10e9), scales).argmin())]


def resize_and_pad(
    image: np.ndarray, height: int, width: int, settings: ImageSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Resizes an image, keeping its aspect ratio, and centres it on a black canvas.

    Uses antialiased bilinear interpolation of float32 values, in which Pillow and PyTorch agree (an
    8-bit resize would round).

    Args:
        image: uint8[h, w, 3].
        height: pixels of the canvas.
        width: pixels of the canvas.
        settings: mean and deviation for normalisation.

    Returns:
        Normalised pixels float32[height, width, 3], and a mask bool[height, width] of the image.

    Raises:
        ValueError: the aspect ratio is too extreme.
    """
    scale = min(
        np.float32(height) / np.float32(image.shape[0]),
        np.float32(width) / np.float32(image.shape[1]),
    )
    inner = (
        int(np.float32(image.shape[0]) * scale),
        int(np.float32(image.shape[1]) * scale),
    )
    if 0 in inner:
        raise ValueError(
            f"an image of {image.shape[1]} x {image.shape[0]} pixels would shrink to nothing; its "
            "aspect ratio is too extreme: crop it or leave it out"
        )
    values = image.astype(np.float32) / np.float32(255)
    channels = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(values[..., i])).resize(
                (inner[1], inner[0]), Image.Resampling.BILINEAR
            )
        )
        for i in range(3)
    ]
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    where = np.s_[top : top + inner[0], left : left + inner[1]]
    canvas, picture = np.zeros((height, width, 3), np.float32), np.zeros((height, width), bool)
    canvas[where] = np.clip(np.stack(channels, axis=-1), 0, 1)
    picture[where] = True
    mean, deviation = np.array([settings.mean, settings.deviation], np.float32)
    return (canvas - mean) / deviation, picture


def _patches(pixels: np.ndarray, size: int) -> np.ndarray:
    """Cuts [height, width, ...] into flat patches [P, size x size x ...], row by row."""
    rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
    pixels = pixels.reshape(rows, size, columns, size, -1)
    return np.swapaxes(pixels, 1, 2).reshape(rows * columns, -1)


def _grid_tokens(rows: int, columns: int) -> list[str]:
    return ["start", *(["patch"] * columns + ["col"]) * rows, "end"]


def cut(image: np.ndarray, settings: ImageSettings) -> Crops:
    """Cuts an image into crops and lays out its tokens.

    Args:
        image: uint8[height, width, 3].
        settings: how to cut it.

    Returns:
        Crops, tokens and positions.

    Raises:
        ValueError: the image is smaller than a patch or has an extreme aspect ratio.
    """
    size, patch, pooled = settings.crop_size, settings.patch_size, settings.pooled
    if min(image.shape[:2]) < patch:
        raise ValueError(
            f"an image has {image.shape[1]} x {image.shape[0]} pixels, expected at least a patch of"
            f" {patch} x {patch}; enlarge it or leave it out"
        )
    before, after = settings.margins
    margin, window = (before + after) * patch, settings.window * patch
    rows, columns = choose_tiling(
        image.shape[0] - margin, image.shape[1] - margin, window, settings.max_crops
    )
    whole, _ = resize_and_pad(image, size, size, settings)
    tiled, picture = resize_and_pad(
        image, rows * window + margin, columns * window + margin, settings
    )
    patches, masks = [_patches(whole, patch)], []
    for i in range(rows):
        for j in range(columns):
            where = np.s_[i * window : i * window + size, j * window : j * window + size]
            patches.append(_patches(tiled[where], patch))
            masks.append(_patches(picture[where], patch).mean(axis=1, dtype=np.float32))
    # The masks are one crop ahead of the patches, with -1 at the end, as in training.
    masks.append(np.full_like(masks[0], -1))

    shape = [-(-(count * settings.window + before + after) // POOL) for count in (rows, columns)]
    first = _grid_tokens(pooled, pooled)
    positions = [_positions(0, pooled, (0, 0), (0, 0), (pooled, pooled), pooled)]
    for i in range(rows):
        top, inner_top, height = _kept(i, rows, settings)
        for j in range(columns):
            left, inner_left, width = _kept(j, columns, settings)
            positions.append(
                _positions(
                    len(first),
                    shape[1],
                    (top, left),
                    (inner_top, inner_left),
                    (height, width),
                    pooled,
                )
            )
    return Crops(
        np.stack(patches),
        np.stack(masks),
        (*first, *_grid_tokens(*shape)),
        np.stack(positions),
    )


def _kept(number: int, count: int, settings: ImageSettings) -> tuple[int, int, int]:
    """Returns which features of a crop are kept along one axis.

    The first and last crop also keep the features of the outer margin.

    Args:
        number: index of the crop along the axis.
        count: number of crops along the axis.
        settings: margins and window.

    Returns:
        Their start in the grid of the tiling, their start in the crop, and their number.
    """
    before, after = settings.margins
    begins = 0 if number == 0 else (before + number * settings.window) // POOL
    inner = 0 if number == 0 else before // POOL
    size = settings.window + before * (number == 0) + after * (number == count - 1)
    return begins, inner, -(-size // POOL)


def _positions(
    offset: int,
    columns: int,
    begin: tuple[int, int],
    inner: tuple[int, int],
    size: tuple[int, int],
    pooled: int,
) -> np.ndarray:
    """Returns int32[K], the token of each feature of a crop.

    Args:
        offset: number of tokens before the grid.
        columns: width of the grid.
        begin: first row and column of the crop's features in the grid.
        inner: first row and column of the kept features in the crop.
        size: rows and columns of the kept features.
        pooled: features per side of the crop.
    """
    grid = np.full((pooled, pooled), UNUSED, np.int32)
    row, column = np.indices(size)
    # <im_start> precedes the grid, <im_col> ends each of its rows.
    tokens = offset + 1 + (begin[0] + row) * (columns + 1) + begin[1] + column
    grid[inner[0] : inner[0] + size[0], inner[1] : inner[1] + size[1]] = tokens
    return grid.reshape(-1)
