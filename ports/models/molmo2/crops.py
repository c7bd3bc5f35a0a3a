"""Crops of a picture for Molmo2, in numpy, and the patches that each of its features is made of.

C crops, P patches per crop, F features, K patches of a feature.

A picture becomes one crop with the whole of it and a tiling of overlapping crops. Both are resized
without keeping the aspect ratio. Each patch of the tiling is taken from one crop, the one in which
it is not in a margin.
"""

from typing import Any, NamedTuple

import numpy as np

from ports.inputs import resizing
from ports.models.molmo.crops import choose_tiling

# Of transformers' class, for values missing in the files.
DEFAULTS = {
    "size": {"height": 378, "width": 378},
    "patch_size": 14,
    "max_crops": 8,
    "overlap_margins": [4, 4],
    "pooling_size": [2, 2],
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "rescale_factor": 1 / 255,
}
# Options that change the arrays, with the only values that are implemented.
_IMPLEMENTED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 2}


class ImageSettings(NamedTuple):
    """How pictures are cut into crops."""

    crop_size: int  # pixels per side
    patch_size: int  # pixels per side
    max_crops: int  # maximum number of crops in the tiling
    margins: tuple[int, int]  # patches: at left and top, at right and bottom
    pool: tuple[int, int]  # rows and columns of the patches of a feature
    mean: tuple[float, ...]  # of the values 0 to 255
    deviation: tuple[float, ...]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ImageSettings":
        """Reads the values of a file.

        Raises:
            ValueError: a value is not implemented.
        """
        said = {name: value for name, value in values.items() if value is not None}
        for name, implemented in _IMPLEMENTED.items():
            if said.get(name, implemented) != implemented:
                raise ValueError(f"{name} is {said[name]!r}; expected {implemented!r}")
        said = {**DEFAULTS, **said}
        size, patch, margins = said["size"], said["patch_size"], tuple(said["overlap_margins"])
        if size.get("height") != size.get("width") or size["height"] % patch:
            raise ValueError(f"size is {size}; expected a square, a multiple of patch_size {patch}")
        if min(margins) < 0 or sum(margins) >= size["height"] // patch:
            raise ValueError(
                f"overlap_margins is {list(margins)}; expected a sum below the "
                f"{size['height'] // patch} patches per side of a crop"
            )
        unit = np.float32(1 / said["rescale_factor"])
        mean, deviation = (
            tuple(float(np.float32(value) * unit) for value in said[name])
            for name in ("image_mean", "image_std")
        )
        pool = tuple(said["pooling_size"])
        return cls(size["height"], patch, said["max_crops"], margins, pool, mean, deviation)

    def as_json(self) -> dict[str, Any]:
        """Returns values of a file, by the names that `from_json` reads."""
        return {
            "image_processor_type": "Molmo2ImageProcessor",  # transformers' class
            "size": {"height": self.crop_size, "width": self.crop_size},
            "patch_size": self.patch_size,
            "max_crops": self.max_crops,
            "overlap_margins": list(self.margins),
            "pooling_size": list(self.pool),
            "image_mean": list(self.mean),
            "image_std": list(self.deviation),
            "rescale_factor": 1.0,  # mean and deviation are of the values 0 to 255
        }

    @property
    def side(self) -> int:
        """Patches along a side of a crop."""
        return self.crop_size // self.patch_size


class Crops(NamedTuple):
    """One picture in the form that the model takes."""

    patches: np.ndarray  # float32[C, P, values]; the first crop shows the whole
    pooling: np.ndarray  # int32[F, K]: numbers of the patches of each feature, -1 for none
    grid: tuple[int, int, int, int]  # rows and columns of features: of the whole, of the tiling


def cut(image: np.ndarray, settings: ImageSettings) -> Crops:
    """Cuts a picture into crops and lists the patches of its features.

    Args:
        image: uint8[height, width, 3].
        settings: how to cut it.

    Returns:
        The crops.
    """
    size, patch, side = settings.crop_size, settings.patch_size, settings.side
    step, margin = side - sum(settings.margins), sum(settings.margins)
    rows, columns = choose_tiling(
        image.shape[0] - margin * patch,
        image.shape[1] - margin * patch,
        step * patch,
        settings.max_crops,
    )
    tiled = resizing.bilinear(
        image, (rows * step + margin) * patch, (columns * step + margin) * patch
    )
    crops = [resizing.bilinear(image, size, size)]
    for top in range(0, rows * step * patch, step * patch):
        for left in range(0, columns * step * patch, step * patch):
            crops.append(tiled[top : top + size, left : left + size])
    mean, deviation = np.array([settings.mean, settings.deviation], np.float32)
    patches = cut_patches((np.stack(crops).astype(np.float32) - mean) / deviation, patch)
    numbers = np.arange(side**2, dtype=np.int32).reshape(side, side)
    whole, views = (
        pooled(index, settings.pool)
        for index in (numbers, _tiling(rows, columns, settings) + side**2)
    )
    pooling = np.concatenate([view.reshape(-1, view.shape[-1]) for view in (whole, views)])
    return Crops(patches, pooling, (*whole.shape[:2], *views.shape[:2]))


def cut_patches(pixels: np.ndarray, size: int) -> np.ndarray:
    """Cuts squares float32[C, pixels, pixels, 3] into float32[C, P, values]."""
    crops, side = len(pixels), pixels.shape[1] // size
    cells = pixels.reshape(crops, side, size, side, size, 3).swapaxes(2, 3)
    return cells.reshape(crops, side**2, -1)


def _tiling(rows: int, columns: int, settings: ImageSettings) -> np.ndarray:
    """Returns the numbers of the patches in the tiling, int32[rows of patches, columns]."""
    side, (before, after) = settings.side, settings.margins
    step = side - before - after

    def line(count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns for each patch along an axis its crop, and its place in the crop."""
        place = np.arange(count * step + before + after, dtype=np.int32)
        # The outer margins are in the first and last crop.
        crop = np.clip((place - before) // step, 0, count - 1)
        return crop, place - crop * step

    (row, y), (column, x) = line(rows), line(columns)
    crop = row[:, None] * columns + column
    return (crop * side + y[:, None]) * side + x


def pooled(index: np.ndarray, pool: tuple[int, int]) -> np.ndarray:
    """Groups a grid of patches, with -1 around it, to int32[rows, columns, K]."""
    # Of an odd number of missing patches, one more is after the grid.
    missing = [-length % side for length, side in zip(index.shape, pool, strict=True)]
    index = np.pad(index, [(n // 2, n - n // 2) for n in missing], constant_values=-1)
    rows, columns = (length // side for length, side in zip(index.shape, pool, strict=True))
    cells = index.reshape(rows, pool[0], columns, pool[1]).swapaxes(1, 2)
    return cells.reshape(rows, columns, pool[0] * pool[1])
