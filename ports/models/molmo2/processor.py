"""Molmo2's processor for text and pictures, in numpy: crops, tokens and the patches of features.

transformers' own class requires torch and torchvision; this one gives the same arrays.

C crops, P patches per crop, F features, K patches of a feature.

A picture becomes one crop with the whole of it and a tiling of overlapping crops. Both are resized
without keeping the aspect ratio. Each patch of the tiling is taken from one crop, the one in which
it is not in a margin.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ports import checkpoint
from ports.inputs import processor, resizing
from ports.models import port
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
# Tokens whose type in mm_token_type_ids is 1.
PICTURE_TOKENS = (
    *("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>"),
    *("<frame_start>", "<im_end>", "<frame_end>", "<im_low>"),
)


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
    pixels = (np.stack(crops).astype(np.float32) - mean) / deviation
    cells = pixels.reshape(len(crops), side, patch, side, patch, 3).swapaxes(2, 3)
    numbers = np.arange(side**2, dtype=np.int32).reshape(side, side)
    whole, views = (
        _pooled(index, settings.pool)
        for index in (numbers, _tiling(rows, columns, settings) + side**2)
    )
    pooling = np.concatenate([view.reshape(-1, view.shape[-1]) for view in (whole, views)])
    return Crops(
        cells.reshape(len(crops), side**2, -1), pooling, (*whole.shape[:2], *views.shape[:2])
    )


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


def _pooled(index: np.ndarray, pool: tuple[int, int]) -> np.ndarray:
    """Groups a grid of patches, with -1 around it, to int32[rows, columns, K]."""
    # Of an odd number of missing patches, one more is after the grid.
    missing = [-length % side for length, side in zip(index.shape, pool, strict=True)]
    index = np.pad(index, [(n // 2, n - n // 2) for n in missing], constant_values=-1)
    rows, columns = (length // side for length, side in zip(index.shape, pool, strict=True))
    cells = index.reshape(rows, pool[0], columns, pool[1]).swapaxes(1, 2)
    return cells.reshape(rows, columns, pool[0] * pool[1])


class Processor(processor.Processor):
    """Converts texts and pictures to the arrays that the model takes.

    Besides input_ids, attention_mask and mm_token_type_ids (1 at all tokens of pictures), these are
    pixel_values float32[crops, P, values], image_token_pooling int32[F, K], image_grids int64[I, 4]
    and image_num_crops int64[I].

    Attributes:
        image_processor: how pictures are cut.
        whole_lines, lines: whether a token ends each row of features of the whole, of the tiling.
        start: the token before the whole.
    """

    def __init__(
        self,
        image_processor: ImageSettings,
        tokenizer: Any,
        chat_template: str | None = None,
        options: dict[str, Any] | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template)
        self.image_token = getattr(tokenizer, "image_token", "<|image|>")
        said = options or {}
        self.lines = said.get("image_use_col_tokens", True)
        whole_lines = said.get("use_single_crop_col_tokens")
        self.whole_lines = self.lines if whole_lines is None else whole_lines
        own_start = said.get("use_single_crop_start_token", True)
        self.start = "<low_res_im_start>" if own_start else "<im_start>"

    @property
    def image_token_ids(self) -> list[int]:
        """Ids of all tokens that a picture may become, those of its features first."""
        return self.tokenizer.convert_tokens_to_ids(list(PICTURE_TOKENS))

    def process_images(self, images: list[Any]) -> dict[str, np.ndarray]:
        """Returns the crops of a flat list of pictures, with the patches of their features."""
        cuts = [cut(_pixels(image), self.image_processor) for image in images]
        counts = np.array([len(crops.patches) for crops in cuts])
        starts = self.image_processor.side**2 * np.cumsum([0, *counts[:-1]])
        pooling = [
            np.where(crops.pooling >= 0, crops.pooling + start, -1)
            for crops, start in zip(cuts, starts, strict=True)
        ]
        return {
            "pixel_values": np.concatenate([crops.patches for crops in cuts]),
            "image_token_pooling": np.concatenate(pooling).astype(np.int32),
            "image_grids": np.array([crops.grid for crops in cuts]),
            "image_num_crops": counts,
        }

    def expand(self, arrays: dict[str, np.ndarray]) -> list[str]:
        """Returns the tokens of a picture: features in rows, of the whole and of the tiling."""

        def view(start: str, rows: int, columns: int, has_ends: bool) -> str:
            line = "<im_patch>" * columns + "<im_col>" * has_ends
            return start + line * rows + "<im_end>"

        return [
            view(self.start, rows, columns, self.whole_lines)
            + view("<im_start>", all_rows, all_columns, self.lines)
            for rows, columns, all_rows, all_columns in arrays["image_grids"].tolist()
        ]

    def __call__(
        self,
        images: Sequence[Any] | None = None,
        text: str | Sequence[str] = "",
        *,
        padding: bool = False,
        return_tensors: str = "np",
    ) -> dict[str, np.ndarray]:
        """Makes the arrays of a batch; each text begins with the tokenizer's first token.

        Args:
            images, text, padding, return_tensors: as for the base class.

        Returns:
            The arrays.

        Raises:
            ValueError: as for the base class.
        """
        first = self.tokenizer.bos_token or self.tokenizer.eos_token
        texts = [text] if isinstance(text, str) else text
        texts = [prompt if prompt.startswith(first) else first + prompt for prompt in texts]
        return super().__call__(images, texts, padding=padding, return_tensors=return_tensors)


def _pixels(image: Any) -> np.ndarray:
    """Converts an array, a PIL image or a file's path to uint8[height, width, 3]."""
    if isinstance(image, str):
        from transformers.image_utils import load_image

        image = load_image(image)
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(
            f"it is {pixels.dtype}{list(pixels.shape)}; expected a PIL image or "
            "uint8[height, width, 3]"
        )
    return pixels


def read_processor(directory: Path) -> Processor:
    """Loads the processor of a checkpoint.

    Raises:
        ValueError: a file is missing, can't be read, or has a value that is not implemented.
    """
    with checkpoint.loading(directory, "processor"):
        options = port.read_settings(directory, "processor_config.json")
        # Newer checkpoints have one file for everything.
        settings = options.get("image_processor") or checkpoint.read_json(
            directory / "preprocessor_config.json"
        )
        cutting = ImageSettings.from_json(settings)
        template = port.read_template(directory)
    return Processor(cutting, port.read_tokenizer(directory), template, options)
