"""LLaVA-OneVision (Li et al. 2024): one picture in tiles, several pictures whole, videos.

B batch, T positions, D width, I pictures, V videos, F features.

As LLaVA-NeXT, but a picture with very many features is resized to fewer (bilinear interpolation),
and a picture among several of one prompt is shown whole only. The frames of a video have a quarter
of the features each. `image_newline` ends each row of a picture in tiles, each whole picture and
each video.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from ports.inputs import patch_layout as patches
from ports.inputs import processor
from ports.inputs.patch_layout import Layouts, PatchLayout
from ports.inputs.videos import Clip, SquareSettings
from ports.models import anyres, llava_like, llava_next, port
from ports.models.anyres import Features
from ports.models.port import Port
from ports.nn import vision_language

# Features may exceed those of so many tiles by this factor before they are resized.
_TOLERATED = 1.1


@dataclasses.dataclass(frozen=True)
class Config(llava_next.Config):
    """The values that the port needs from a transformers LlavaOnevisionConfig."""

    most_tiles: int = 9  # as many tiles' features are kept

    @classmethod
    def from_hf(cls, config: Any) -> "Config":
        """Reads a transformers LlavaOnevisionConfig.

        Raises:
            ValueError: a value is not implemented.
        """
        said = getattr(config, "vision_aspect_ratio", None) or "anyres_max_9"
        found = re.fullmatch(r"anyres_max_(\d+)", said)
        if found is None:
            raise ValueError(
                f"vision_aspect_ratio is {said!r}; expected 'anyres_max_9' or the like"
            )
        tied = bool(config.tie_word_embeddings or config.text_config.tie_word_embeddings)
        found_config = cls.of(config, tied, most_tiles=int(found[1]))
        tokens = (config.image_token_index, config.video_token_index)
        return dataclasses.replace(found_config, image_tokens=tokens)

    def shape(self, size: anyres.Size) -> tuple[int, int]:
        """Returns the rows and columns of features that a picture's tiles give."""
        height, width = super().shape(size)
        ratio = math.sqrt(height * width / (self.most_tiles * self.vision.num_patches))
        if ratio > _TOLERATED:
            return int(height // ratio), int(width // ratio)
        return height, width

    def whole(self, first: int, end: int) -> Features:
        """Returns the features of a picture that is shown whole only."""
        index = first + np.arange(self.vision.num_patches)
        return Features.of_rows(np.append(index, end))

    def video(self, frames: int, first: int, end: int) -> Features:
        """Returns the features of a video: a quarter of each frame's patches, and one end."""
        side = self.vision.side
        half = math.ceil(side / 2)
        index = first + np.arange(frames * side * side).reshape(frames, side, side)
        pooled = [anyres.resampled(frame, half, half) for frame in index]
        return Features.joined([*pooled, Features.of_rows(np.array([end]))])


INPUTS = (
    *llava_next.INPUTS,
    "batch_num_images",
    "pixel_values_videos",
)


class LlavaOnevision(llava_next.LlavaNext):
    """Replaces image and video tokens by the features of pictures and frames."""

    def embed_inputs(self, inputs: vision_language.Inputs) -> Any:
        """Maps input_ids int[B, T], and tiles or frames with their features' rows, to [B, T, D].

        The arrays are those of `prepare_inputs`; videos have `frames`, `video_rows` and
        `video_weights` as pictures have pixel_values, feature_rows and feature_weights.
        """
        inputs = anyres.prepared(inputs, self.config, prepare_inputs)
        tokens = jnp.asarray(inputs["input_ids"])
        special = vision_language.is_image(tokens, self.config.image_tokens)
        # These tokens may be outside the embedding table.
        x = self.text_decoder.embed_tokens(jnp.where(special, 0, tokens))
        names = (
            ("pixel_values", "feature_rows", "feature_weights"),
            ("frames", "video_rows", "video_weights"),
        )
        for (pixels, rows, weights), token in zip(names, self.config.image_tokens, strict=True):
            if inputs.get(pixels) is not None:
                features = anyres.gather(
                    self.table(jnp.asarray(inputs[pixels])),
                    jnp.asarray(inputs[rows]),
                    jnp.asarray(inputs[weights]),
                )
                x = vision_language.place_images(x, tokens == token, features)
        return x


def prepare_inputs(config: Config, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checks the processor's arrays, drops tiles of padding, and finds each feature's patches.

    Args:
        config: the model's configuration.
        inputs: the processor's arrays.

    Returns:
        The arrays that the module takes.

    Raises:
        ValueError: images, videos and their tokens do not match.
    """
    arrays = dict(inputs)
    sizes, in_tiles = _pictures(config, arrays)
    pixels = arrays.pop("pixel_values", None)
    for name in ("image_sizes", "batch_num_images"):
        arrays.pop(name, None)
    counts = [
        1 + math.prod(config.tiles(size)) if tiled else 1
        for size, tiled in zip(sizes, in_tiles, strict=True)
    ]
    tiles, end = llava_next.tiles_of(pixels, counts), llava_next.LAST
    starts = config.vision.num_patches * np.cumsum([0, *counts])
    features = Features.joined(
        config.features(size, int(first), end) if tiled else config.whole(int(first), end)
        for size, tiled, first in zip(sizes, in_tiles, starts[:-1], strict=True)
    )
    vision_language.check_image_tokens(
        arrays["input_ids"],
        config.image_tokens[:1],
        len(sizes),
        len(features.rows),
        "as many as the sizes of the images give",
    )
    if tiles is not None:
        index, weight = features.padded()
        arrays |= {"pixel_values": tiles, "feature_rows": index, "feature_weights": weight}
    return _with_videos(config, arrays)


def _pictures(
    config: Config, arrays: Mapping[str, np.ndarray]
) -> tuple[list[tuple[int, int]], list[bool]]:
    """Returns the sizes of the pictures, and whether each is shown in tiles.

    A picture among several of one prompt is not, where the processor counts them per prompt.
    """
    sizes = llava_next.check_sizes(config, arrays.get("pixel_values"), arrays.get("image_sizes"))
    numbers = arrays.get("batch_num_images")
    if numbers is None:
        return sizes, [True] * len(sizes)
    in_tiles = [number == 1 for number in np.ravel(numbers).tolist() for _ in range(number)]
    if len(in_tiles) != len(sizes):
        raise ValueError(
            f"batch_num_images counts {len(in_tiles)} images, and pixel_values has {len(sizes)}; "
            "pass the arrays of one call of the processor"
        )
    return sizes, in_tiles


def _with_videos(config: Config, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checks the videos and finds the patches of their features."""
    videos = arrays.pop("pixel_values_videos", None)
    side = config.vision.image_size
    if videos is not None and (videos.ndim != 5 or videos.shape[3:] != (side, side)):
        raise ValueError(
            f"pixel_values_videos has shape {videos.shape}; expected [videos, frames, "
            f"{config.vision.num_channels}, {side}, {side}]"
        )
    count, frames = (0, 0) if videos is None else videos.shape[:2]
    per_video = frames * config.vision.num_patches
    features = Features.joined(
        config.video(frames, i * per_video, llava_next.LAST) for i in range(count)
    )
    vision_language.check_image_tokens(
        arrays["input_ids"],
        config.image_tokens[1:],
        count,
        len(features.rows),
        f"{len(features.rows) // max(count, 1)} per video of {frames} frames",
        what="video",
    )
    if videos is None or not count:
        return arrays
    flat = videos.reshape(-1, *videos.shape[2:])
    index, weight = features.padded()
    return arrays | {"frames": flat, "video_rows": index, "video_weights": weight}


class Processor(processor.VideoProcessor):
    """Converts texts, images and videos to the arrays that the model takes.

    transformers' own class requires torchvision, because of its video processor.
    Besides input_ids and attention_mask, the arrays are pixel_values float32[I, tiles, 3, height,
    width], image_sizes int[I, 2] and batch_num_images, the number of images per text, and
    pixel_values_videos float32[V, frames, 3, height, width].
    """

    sizes: Config  # set by `complete_processor`
    image_token, video_token = "<image>", "<video>"
    settings_class = SquareSettings

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Loads the processor of a checkpoint.

        Raises:
            ValueError: the processor does not load.
        """
        return cls(*port.read_parts(directory), port.read_video_settings(directory))

    def process_groups(self, groups: list[list[Any]]) -> dict[str, np.ndarray]:
        """Returns the arrays of the images of each text; several of one text are shown whole."""
        given = [group for group in groups if group]
        arrays = dict(self.image_processor(images=given, return_tensors="np"))
        return {name: np.asarray(value) for name, value in arrays.items()}

    def expand(self, arrays: dict[str, np.ndarray]) -> list[str]:
        """Returns an image token for each feature."""
        sizes, in_tiles = _pictures(self.sizes, arrays)
        return [
            self.image_token * _length(self.sizes, size, tiled)
            for size, tiled in zip(sizes, in_tiles, strict=True)
        ]

    def process_videos(self, videos: Sequence[Clip]) -> tuple[dict[str, np.ndarray], list[str]]:
        """Returns the frames of a flat list of videos, and a video token for each feature."""
        pixels = self.video_settings.pixels(videos)
        count = len(self.sizes.video(pixels.shape[1], 0, 0).rows)
        return {"pixel_values_videos": pixels}, [self.video_token * count] * len(videos)


def complete_processor(found: Any, config: Config, directory: Path) -> None:
    """Gives our processor the configuration, which decides how many tokens an image has."""
    if isinstance(found, Processor):
        found.sizes = config


def _length(config: Config, size: anyres.Size, tiled: bool) -> int:
    """Returns the number of features of a picture."""
    return len((config.features(size, 0, 0) if tiled else config.whole(0, 0)).rows)


def patch_layout(
    config: Config, arrays: Mapping[str, np.ndarray], read_processor: Callable[[], Any]
) -> Layouts:
    """Lays out tiles, with the whole as `whole`; whole pictures; and videos, frame by frame."""
    sizes, in_tiles = _pictures(config, arrays)
    side = config.vision.side
    half, inside = math.ceil(side / 2), llava_like.on_cells(config.vision, side)
    videos = arrays.get("pixel_values_videos")
    pictures = list(zip(sizes, in_tiles, strict=True))
    lengths = (_length(config, size, tiled) for size, tiled in pictures)
    frames = 0 if videos is None else videos.shape[1]
    of_videos = iter([frames * half * half + 1] * (0 if videos is None else len(videos)))
    given = iter(pictures)
    image, video = config.image_tokens

    def of_picture(places: np.ndarray) -> PatchLayout:
        size, tiled = next(given)
        if not tiled:
            return patches.grid(places[:-1], side, side, inside)
        return anyres.layout_of(size, config.tiles(size), config.vision, config.shape(size), places)

    rows = []
    for ids in arrays["input_ids"]:
        found = [of_picture(places) for places in patches.runs(ids, image, lengths)]
        for places in patches.runs(ids, video, of_videos):
            each_frame = np.split(places[:-1], frames)
            found += [patches.grid(each, half, half, inside) for each in each_frame]
        rows.append(sorted(found, key=_first))
    return rows


def _first(layout: PatchLayout) -> int:
    return int((layout.whole or layout).positions[0, 0])


PORT = Port(
    config=Config,
    module=LlavaOnevision,
    inputs=INPUTS,
    example_inputs=llava_next.example_inputs,
    prepare_inputs=prepare_inputs,
    canonical_name=llava_like.canonical_name,
    transformers_name=llava_like.transformers_name,
    read_processor=Processor.read,
    takes_videos=True,
    complete_processor=complete_processor,
    pieces=("pixel_values", "frames"),
    patch_layout=patch_layout,
)
