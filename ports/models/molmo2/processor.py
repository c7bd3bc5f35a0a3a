"""Molmo2's processor for text, pictures and videos, in numpy: crops, tokens, patches of features.

transformers' own class requires torch and torchvision; this one gives the same arrays.

C crops, P patches per crop, F features, K patches of a feature.

A picture becomes one crop with the whole of it and a tiling of overlapping crops. Both are resized
without keeping the aspect ratio. Each patch of the tiling is taken from one crop, the one in which
it is not in a margin. A frame of a video is one crop, with the whole of it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from ports import checkpoint
from ports.inputs import processor, resizing
from ports.inputs import videos as clips
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


@dataclasses.dataclass(frozen=True)
class VideoSettings(clips.SquareSettings):
    """How the frames of a video are chosen and become patches.

    Values are scaled, as published files ask for; transformers leaves them at 0 to 255 if a file
    has neither do_rescale nor do_normalize.
    """

    patch_size: int  # pixels per side
    pool: tuple[int, int]  # rows and columns of the patches of a feature
    max_fps: float  # most frames per second
    defaults: ClassVar[Mapping[str, Any]] = {
        **clips.SquareSettings.defaults,
        "size": {"height": 378, "width": 378},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "patch_size": 14,
        "pooling_size": [3, 3],
        "do_sample_frames": True,
        "num_frames": 64,
        "max_fps": 2,
    }
    implemented: ClassVar[Mapping[str, Any]] = {
        **clips.SquareSettings.implemented,
        "resample": int(Image.Resampling.BILINEAR),
    }

    @classmethod
    def fields(cls, said: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of this class, from the values of a file and the defaults.

        Raises:
            ValueError: `size` is not a square, or not a multiple of the patches.
        """
        found = super().fields(said) | {name: said[name] for name in ("patch_size", "max_fps")}
        if found["height"] != found["width"] or found["height"] % found["patch_size"]:
            raise ValueError(
                f"size of the video processor is {said['size']}; expected a square, a multiple of "
                f"patch_size {found['patch_size']}"
            )
        return found | {"pool": tuple(said["pooling_size"])}

    @property
    def side(self) -> int:
        """Patches along a side of a frame."""
        return self.height // self.patch_size

    def choose(
        self,
        clip: clips.Clip,
        do_sample_frames: bool | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
    ) -> clips.Clip:
        """Chooses frames of a clip, whose rate is `fps` or the maximum if it is not known."""
        is_chosen = self.do_sample_frames if do_sample_frames is None else do_sample_frames
        if clip.rate is None:
            rate = fps if is_chosen and fps is not None else self.max_fps
            clip = clip._replace(rate=rate)
        if not is_chosen:
            return clip
        chosen = super().choose(clip, True, num_frames, fps)
        # transformers has their numbers, and so their times, in float32.
        return chosen._replace(numbers=list(np.asarray(chosen.numbers, np.float32)))

    def numbers(self, clip: clips.Clip, num_frames: int | None, fps: float | None) -> np.ndarray:
        """Returns the numbers of the chosen frames, int[F]: at most as many as there are, and
        without `fps` no more per second than the maximum.
        """
        seconds = self.seconds(clip) if clip.duration is None else clip.duration
        if fps is not None:
            wanted = int(seconds * fps)
        else:
            wanted = num_frames or clip.total
            if clip.rate is not None and clip.rate > self.max_fps:
                wanted = min(wanted, int(seconds * self.max_fps))
        return clips.sampled_evenly(clip.total, max(min(wanted, clip.total), 1))

    def cut(self, frames: np.ndarray) -> np.ndarray:
        """Resizes frames uint8[F, height, width, 3] and cuts them to float32[F, P, values]."""
        resized = [resizing.bilinear(frame, self.height, self.width) for frame in frames]
        return _patches(self.scale(np.stack(resized)), self.patch_size)


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
    patches = _patches((np.stack(crops).astype(np.float32) - mean) / deviation, patch)
    numbers = np.arange(side**2, dtype=np.int32).reshape(side, side)
    whole, views = (
        _pooled(index, settings.pool)
        for index in (numbers, _tiling(rows, columns, settings) + side**2)
    )
    pooling = np.concatenate([view.reshape(-1, view.shape[-1]) for view in (whole, views)])
    return Crops(patches, pooling, (*whole.shape[:2], *views.shape[:2]))


def _patches(pixels: np.ndarray, size: int) -> np.ndarray:
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


def _pooled(index: np.ndarray, pool: tuple[int, int]) -> np.ndarray:
    """Groups a grid of patches, with -1 around it, to int32[rows, columns, K]."""
    # Of an odd number of missing patches, one more is after the grid.
    missing = [-length % side for length, side in zip(index.shape, pool, strict=True)]
    index = np.pad(index, [(n // 2, n - n // 2) for n in missing], constant_values=-1)
    rows, columns = (length // side for length, side in zip(index.shape, pool, strict=True))
    cells = index.reshape(rows, pool[0], columns, pool[1]).swapaxes(1, 2)
    return cells.reshape(rows, columns, pool[0] * pool[1])


class Processor(processor.VideoProcessor):
    """Converts texts, pictures and videos to the arrays that the model takes.

    Besides input_ids, attention_mask and mm_token_type_ids (1 at all tokens of pictures and
    frames), these are pixel_values float32[crops, P, values], image_token_pooling int32[F, K],
    image_grids int64[I, 4] and image_num_crops int64[I]; of videos pixel_values_videos,
    video_token_pooling and video_grids int64[V, 3], the frames and the rows and columns of each.

    Attributes:
        image_processor: how pictures are cut.
        whole_lines, lines: whether a token ends each row of features of the whole, of the tiling.
        frame_lines: whether one ends each row of a frame's features.
        start: the token before the whole.
        frame: the tokens around the features of a frame.
    """

    image_token, video_token = "<|image|>", "<|video|>"
    settings_class = VideoSettings

    def __init__(
        self,
        image_processor: ImageSettings,
        tokenizer: Any,
        chat_template: str | None = None,
        options: dict[str, Any] | None = None,
        video_values: Mapping[str, Any] | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template, video_values)
        said = options or {}
        self.lines = said.get("image_use_col_tokens", True)
        whole_lines = said.get("use_single_crop_col_tokens")
        self.whole_lines = self.lines if whole_lines is None else whole_lines
        own_start = said.get("use_single_crop_start_token", True)
        self.start = "<low_res_im_start>" if own_start else "<im_start>"
        self.frame_lines = said.get("video_use_col_tokens", False)
        kind = "frame" if said.get("use_frame_special_tokens", True) else "im"
        self.frame = f"<{kind}_start>", f"<{kind}_end>"

    @property
    def image_token_ids(self) -> list[int]:
        """Ids of all tokens that a picture may become, those of its features first."""
        return self.tokenizer.convert_tokens_to_ids(list(PICTURE_TOKENS))

    @property
    def video_token_ids(self) -> list[int]:
        """None: videos become tokens of pictures."""
        return []

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
        return [
            _view((self.start, "<im_end>"), rows, columns, self.whole_lines)
            + _view(("<im_start>", "<im_end>"), all_rows, all_columns, self.lines)
            for rows, columns, all_rows, all_columns in arrays["image_grids"].tolist()
        ]

    def process_videos(
        self, videos: Sequence[clips.Clip]
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """Returns the frames of videos with the patches of their features, and the text of each:
        the features of a frame come after its time in seconds.
        """
        settings = self.video_settings
        square = np.arange(settings.side**2, dtype=np.int32).reshape(settings.side, -1)
        pooled = _pooled(square, settings.pool)
        rows, columns = pooled.shape[:2]
        cuts = [settings.cut(clip.frames) for clip in videos]
        starts = settings.side**2 * np.arange(sum(map(len, cuts)), dtype=np.int32)[:, None, None]
        pooled = pooled.reshape(-1, pooled.shape[-1])
        arrays = {
            "pixel_values_videos": np.concatenate(cuts),
            "video_token_pooling": np.where(pooled >= 0, pooled + starts, -1).reshape(
                -1, pooled.shape[-1]
            ),
            "video_grids": np.array([[len(frames), rows, columns] for frames in cuts]),
        }
        frame = _view(self.frame, rows, columns, self.frame_lines)
        return arrays, [" ".join(f"{time:.1f} {frame}" for time in _times(clip)) for clip in videos]

    def _with_images(
        self, text: str | Sequence[str], images: Sequence[Any] | None
    ) -> tuple[list[str], dict[str, np.ndarray]]:
        """As the base class, with texts that begin with the tokenizer's first token.

        Raises:
            ValueError: as for the base class, or a text has several videos.
        """
        texts = [text] if isinstance(text, str) else text
        most = max((prompt.count(self.video_token) for prompt in texts), default=0)
        if most > 1:
            raise ValueError(
                f"a text contains {self.video_token} {most} times; expected one video per text"
            )
        first = self.tokenizer.bos_token or self.tokenizer.eos_token
        texts = [prompt if prompt.startswith(first) else first + prompt for prompt in texts]
        return super()._with_images(texts, images)


def _view(around: tuple[str, str], rows: int, columns: int, has_ends: bool) -> str:
    """Returns the tokens of a grid of features, with one at the end of each row if it has ends."""
    line = "<im_patch>" * columns + "<im_col>" * has_ends
    return around[0] + line * rows + around[1]


def _times(clip: clips.Clip) -> list[float]:
    """Returns the seconds of each frame; without their numbers, they are the first."""
    numbers = range(len(clip.frames)) if clip.numbers is None else clip.numbers
    return [number / (clip.rate or clips.DEFAULT_RATE) for number in numbers]


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
        of_videos = port.read_video_settings(directory)
    return Processor(cutting, port.read_tokenizer(directory), template, options, of_videos)
