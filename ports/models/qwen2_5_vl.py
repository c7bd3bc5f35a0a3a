"""Qwen2.5-VL (Bai et al. 2025): Qwen2-VL with windows in the tower and videos on a time scale.

F rows of P patches, W patches per window at most, H heads, C head width.

Most blocks of the tower attend within windows, squares of patches that are cut at the image's right
and lower edge; the rest attend to the whole frame. The states of all blocks have the processor's
order, as in Qwen2-VL (in transformers they have the order of the windows; only the merger's
features are put back in order).

Frames of a video are `tokens_per_second` x their distance in seconds apart in the rotary positions;
a still image has no such distance.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from ports.inputs.videos import Clip
from ports.models.port import Port
from ports.models.qwen2_vl import model as qwen2_vl
from ports.models.qwen2_vl import processor as qwen2_processor
from ports.models.qwen2_vl import vision as qwen2_vision
from ports.nn import attention
from ports.parallel import sharding

Array = jax.Array

# Sharding rules of the parameters.
AXES: sharding.Axes = qwen2_vl.AXES
INPUTS = (*qwen2_vl.INPUTS, "second_per_grid_ts")
# The other order of `qwen2_vl.VIDEO_POSITIONS`, since on a time scale nearly every video is longer
# than it is wide: by default, positions are those of today's transformers.
VIDEO_POSITIONS = qwen2_vl.VIDEO_POSITIONS[::-1]


@dataclasses.dataclass(frozen=True)
class VisionConfig(qwen2_vision.VisionConfig):
    """Sizes and constants of the tower."""

    window: int = 0  # patches per side of a window
    full_blocks: tuple[int, ...] = ()  # blocks without windows
    tokens_per_second: int = 0
    output_name: ClassVar[str] = "out_hidden_size"

    @classmethod
    def from_hf(cls, config: Any) -> Self:
        """Reads a transformers Qwen2_5_VLVisionConfig.

        Raises:
            ValueError: a value is not implemented.
        """
        tokens = config.window_size // config.spatial_merge_size // config.patch_size
        if tokens < 1:
            raise ValueError(
                f"vision_config.window_size is {config.window_size}; expected the pixels of at "
                f"least one token, {config.spatial_merge_size * config.patch_size}"
            )
        return cls.read(
            config,
            "hidden_size",
            mlp_width=config.intermediate_size,
            output_size=config.out_hidden_size,
            rms_norm=True,
            gated_mlp=True,
            window=tokens * config.spatial_merge_size,
            full_blocks=tuple(config.fullatt_block_indexes),
            tokens_per_second=config.tokens_per_second,
        )


@dataclasses.dataclass(frozen=True)
class Config(qwen2_vl.Config):
    """The values that the port needs from a transformers Qwen2_5_VLConfig."""

    vision: VisionConfig
    video_positions: str = VIDEO_POSITIONS[0]
    text_type: ClassVar[str] = "qwen2_5_vl_text"
    vision_class: ClassVar[type[qwen2_vision.VisionConfig]] = VisionConfig

    def video_interval(self, seconds: Array | None) -> Array | float:
        """Returns the rotary positions from a frame of a video to the next; without the inputs'
        `seconds`, frames are a second apart.
        """
        return self.vision.tokens_per_second * (1.0 if seconds is None else jnp.asarray(seconds))


class Windows(NamedTuple):
    """The patches of each row, sorted by window."""

    order: Array  # int[F, P], index of each sorted patch
    place: Array  # int[F, P], its inverse
    number: Array  # int[F, P], window of each sorted patch, ascending


def sort_windows(places: qwen2_vision.Places, side: int) -> Windows:
    """Sorts patches by windows of `side` x `side` patches, of each frame by itself."""
    keys = (places.column // side, places.row // side, places.frame)  # the last counts most
    order = jnp.lexsort(keys, axis=-1)
    keys = jnp.stack([jnp.take_along_axis(key, order, axis=1) for key in keys])
    begins = (keys[..., 1:] != keys[..., :-1]).any(0)
    number = jnp.pad(jnp.cumsum(begins, axis=1), ((0, 0), (1, 0)))
    return Windows(order, jnp.argsort(order, axis=1), number)


def attend_in_windows(
    query: Array, key: Array, value: Array, *, windows: Windows, longest: int
) -> Array:
    """Computes attention within windows.

    The sorted patches are cut into pieces as long as the longest window: a window lies within a
    piece and its two neighbours, which are all that is compared with a piece.

    Args:
        query: [F, P, H, C].
        key: [F, P, H, C].
        value: [F, P, H, C].
        windows: the windows.
        longest: W.

    Returns:
        [F, P, H, C].
    """
    rows, length = windows.number.shape
    pieces = -(-length // longest)
    missing = pieces * longest - length

    def cut(x: Array, fill: int = 0) -> Array:
        """Cuts x[F, P, ...] into [F, pieces, W, ...]."""
        edges = [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, edges, constant_values=fill)
        return x.reshape(rows, pieces, longest, *x.shape[2:])

    def beside(x: Array, fill: int = 0) -> Array:
        """Joins each of the pieces [F, pieces, W, ...] to its neighbours: [..., 3 W, ...]."""
        edges = [(0, 0), (1, 1), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, edges, constant_values=fill)
        return jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=2)

    sorted_ = [
        jnp.take_along_axis(x, windows.order[..., None, None], axis=1) for x in (query, key, value)
    ]
    query, key, value = map(cut, sorted_)
    number = cut(windows.number, -1)
    mask = number[..., None] == beside(number, -1)[..., None, :]
    key, value = beside(key), beside(value)
    query, key, value = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value))
    y = attention.attend(query, key, value, mask.reshape(-1, 1, *mask.shape[2:]))
    y = y.reshape(rows, -1, *y.shape[2:])
    return jnp.take_along_axis(y, windows.place[..., None, None], axis=1)


class Qwen25Vision(qwen2_vision.Qwen2Vision):
    """The tower and its merger."""

    def attention(self, places: qwen2_vision.Places) -> list[qwen2_vision.Attend]:
        """Returns each block's attention: to the frame in the full blocks, else to a window."""
        cfg: VisionConfig = self.config
        full = qwen2_vision.within_frames(places)
        windows = sort_windows(places, cfg.window)
        within = functools.partial(attend_in_windows, windows=windows, longest=cfg.window**2)
        return [full if i in cfg.full_blocks else within for i in range(cfg.num_layers)]


class Qwen25VL(qwen2_vl.Qwen2VL):
    """Replaces image and video tokens by the features from the tower."""

    axes = AXES
    tower: ClassVar[type[qwen2_vision.Qwen2Vision]] = Qwen25Vision


class Processor(qwen2_processor.Processor):
    """Converts texts, images and videos to the arrays that the model takes.

    These are Qwen2-VL's, and for videos also second_per_grid_ts float[videos], the seconds from a
    patch to the next in time.
    """

    def process_videos(self, videos: Sequence[Clip]) -> tuple[dict[str, np.ndarray], list[str]]:
        """Returns the arrays of a flat list of videos, and the tokens of each."""
        arrays, written = super().process_videos(videos)
        frames = self.video_settings.temporal_patch_size
        seconds = np.array([frames / clip.frame_rate for clip in videos])
        return arrays | {"second_per_grid_ts": seconds}, written


def prepare_inputs(config: Config, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checks the processor's arrays and prepares them for the module, as for Qwen2-VL.

    Raises:
        ValueError: grids, patches, image tokens and times do not match.
    """
    arrays = qwen2_vl.prepare_inputs(config, inputs)
    seconds, videos = arrays.get("second_per_grid_ts"), len(arrays.get("video_grid_thw", ()))
    if seconds is not None and seconds.shape != (videos,):
        raise ValueError(
            f"second_per_grid_ts has shape {seconds.shape}; expected ({videos},), the seconds "
            "between two frames of each video in video_grid_thw"
        )
    return arrays


PORT = Port(
    config=Config,
    module=Qwen25VL,
    inputs=INPUTS,
    example_inputs=qwen2_vl.example_inputs,
    prepare_inputs=prepare_inputs,
    canonical_name=qwen2_vl.canonical_name,
    transformers_name=qwen2_vl.transformers_name,
    read_processor=Processor.read,
    takes_videos=True,
    image_text=qwen2_vl.PORT.image_text,
    pieces=qwen2_vl.PIECES,
    patch_layout=qwen2_vl.patch_layout,
    options={"video_positions": VIDEO_POSITIONS},
)
