"""InternVL's processor: tiles of images and frames of videos, which the model sees alike."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image

from ports.inputs import processor
from ports.inputs import videos as clips
from ports.models import port


@dataclasses.dataclass(frozen=True)
class VideoSettings(clips.SquareSettings):
    """How videos become frames; those chosen are in the middle of equal parts of a video."""

    initial_shift: bool | float  # number of the first chosen frame; True for half a part
    defaults: ClassVar[Mapping[str, Any]] = {
        **clips.SquareSettings.defaults,
        "initial_shift": True,
    }

    @classmethod
    def fields(cls, said: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of this class, from the values of a file and the defaults.

        Raises:
            ValueError: `size` is not a height and a width.
        """
        return super().fields(said) | {"initial_shift": said["initial_shift"]}

    def numbers(self, clip: clips.Clip, num_frames: int | None, fps: float | None) -> np.ndarray:
        """Returns the numbers of the chosen frames, int[F]."""
        if num_frames is None:
            num_frames = clip.total if fps is None else int(self.seconds(clip) * fps)
        self.check_count(clip, num_frames)
        half = clip.total / num_frames / 2
        first = half if self.initial_shift is True else float(self.initial_shift)
        return clips.sampled_evenly(clip.total, num_frames, first)


class Processor(processor.VideoProcessor):
    """Converts texts, images and videos to the arrays that the model takes.

    transformers' own class requires torchvision, because of its video processor.

    Besides input_ids, attention_mask and mm_token_type_ids, these are pixel_values float32[tiles,
    3, height, width], and tile_grids int[N, 2], the rows and columns of tiles of each image. An
    image of several tiles also has itself, made smaller, as the last one; the frames of a video are
    images of one tile each, in the order of the prompts. transformers' class makes no tile_grids,
    by which `VLM.patch_layout` knows where in its image a tile is.
    """

    image_token, video_token = "<IMG_CONTEXT>", "<video>"
    settings_class = VideoSettings

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        chat_template: str | None = None,
        tokens_per_tile: int = 256,
        video_values: Mapping[str, Any] | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template, video_values)
        self.image_token = getattr(tokenizer, "context_image_token", type(self).image_token)
        self.start_token = getattr(tokenizer, "start_image_token", "<img>")
        self.end_token = getattr(tokenizer, "end_image_token", "</img>")
        self.tokens_per_tile = tokens_per_tile

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Loads the processor of a checkpoint.

        Raises:
            ValueError: the processor does not load.
        """
        settings = port.read_settings(directory, "processor_config.json")
        return cls(
            *port.read_parts(directory),
            settings.get("image_seq_length", 256),
            port.read_video_settings(directory),
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What the processor has of processor_config.json."""
        return {"image_seq_length": self.tokens_per_tile}

    @property
    def video_token_ids(self) -> list[int]:
        """None: videos become image tokens."""
        return []

    def process_images(self, images: list[Any]) -> dict[str, np.ndarray]:
        """Returns pixel_values, num_patches, the tiles of each image, and tile_grids of a list."""
        options = {"crop_to_patches": True, "return_tensors": "np"}
        arrays = dict(self.image_processor(images=images, **options))
        counts = np.asarray(arrays["num_patches"]).tolist()
        grids = [tile_grid(n, _size(image)) for n, image in zip(counts, images, strict=True)]
        return arrays | {"tile_grids": np.array(grids)}

    def expand(self, arrays: dict[str, np.ndarray]) -> list[str]:
        """Returns the tokens of all tiles of an image, between start and end."""
        return [self._write(int(tiles)) for tiles in arrays["num_patches"]]

    def process_videos(
        self, videos: Sequence[clips.Clip]
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """Returns the frames of a flat list of videos, and the numbered frames of each as text."""
        pixels = [self.video_settings.pixels([clip])[0] for clip in videos]
        counts = [len(frames) for frames in pixels]
        frame = self._write(1)
        written = ["\n".join(f"Frame{i + 1}: {frame}" for i in range(frames)) for frames in counts]
        arrays = {"pixel_values_videos": np.concatenate(pixels), "num_frames": np.array(counts)}
        return arrays, written

    def _write(self, tiles: int) -> str:
        return self.start_token + self.image_token * self.tokens_per_tile * tiles + self.end_token

    def join(
        self, prompts: Sequence[str], arrays: dict[str, np.ndarray]
    ) -> Mapping[str, np.ndarray]:
        """Puts the tiles of images and the frames of videos in the order of the prompts."""
        tiles = _parts(arrays, "pixel_values", "num_patches")
        frames = _parts(arrays, "pixel_values_videos", "num_frames")
        either = f"({re.escape(self.image_token)})|{re.escape(self.video_token)}"
        order = [match[1] for prompt in prompts for match in re.finditer(either, prompt)]
        parts = [next(tiles if is_image else frames) for is_image in order]
        of_images = iter(arrays.get("tile_grids", ()))
        grids = [
            next(of_images)[None] if is_image else np.ones((len(part), 2), int)
            for is_image, part in zip(order, parts, strict=True)
        ]
        if not parts:
            return {}
        return {"pixel_values": np.concatenate(parts), "tile_grids": np.concatenate(grids)}


def tile_grid(count: int, size: tuple[int, int]) -> tuple[int, int]:
    """Returns the rows and columns of an image's tiles, whose ratio is nearest to the image's.

    Args:
        count: tiles of the image, with the whole if there are several.
        size: height and width of the image.
    """
    tiles, (height, width) = count - (count > 1), size
    divisors = (n for n in range(1, tiles + 1) if tiles % n == 0)
    columns = min(divisors, key=lambda n: abs(width / height - n * n / tiles))
    return tiles // columns, columns


def _size(image: Any) -> tuple[int, int]:
    """Returns the height and width of a PIL image, an array or a file's image."""
    from transformers import image_utils

    if isinstance(image, str):
        image = image_utils.load_image(image)
    if isinstance(image, Image.Image):
        return image.height, image.width
    if np.ndim(image) == 2:
        return np.shape(image)
    pixels = np.asarray(image)
    axis = image_utils.infer_channel_dimension_format(pixels, num_channels=(1, 3, 4))
    return image_utils.get_image_size(pixels, axis)


def _parts(arrays: Mapping[str, np.ndarray], pixels: str, counts: str) -> Iterator[np.ndarray]:
    """Splits the tiles of all images, or the frames of all videos, into those of each."""
    if pixels not in arrays:
        return iter(())
    return iter(np.split(arrays[pixels], np.cumsum(arrays[counts])[:-1]))
