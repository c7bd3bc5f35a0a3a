"""Molmo2's videos: which frames are taken, and their patches."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ports.inputs import resizing
from ports.inputs import videos as clips
from ports.models.molmo2 import crops


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
        return crops.cut_patches(self.scale(np.stack(resized)), self.patch_size)
