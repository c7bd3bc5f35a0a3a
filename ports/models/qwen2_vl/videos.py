"""Qwen2-VL's videos: the size of their frames, and the patches that the tower takes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from ports.inputs import resizing, videos


@dataclasses.dataclass(frozen=True)
class VideoSettings(videos.Settings):
    """How videos become patches."""

    min_pixels: int  # of a frame
    max_pixels: int
    patch_size: int  # pixels per side
    temporal_patch_size: int  # frames per patch
    merge_size: int  # patches per side of a token
    min_frames: int  # that are taken from a video
    max_frames: int
    defaults: ClassVar[Mapping[str, Any]] = {
        **videos.Settings.defaults,
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_frames": 4,
        "max_frames": 768,
    }

    @classmethod
    def fields(cls, said: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of this class, from the values of a file and the defaults.

        Raises:
            ValueError: `size` lacks a value.
        """
        smallest, largest = cls.limits(said)
        if not smallest or not largest:
            raise ValueError(
                f"size of the video processor is {said['size']}; expected the pixels of the "
                "smallest and of the largest video, shortest_edge and longest_edge"
            )
        same = ("patch_size", "temporal_patch_size", "merge_size", "min_frames", "max_frames")
        return {
            **super().fields(said),
            **{name: said[name] for name in same},
            "min_pixels": smallest,
            "max_pixels": largest,
        }

    @classmethod
    def limits(cls, said: Mapping[str, Any]) -> tuple[int | None, int | None]:
        """Returns the pixels of the smallest and of the largest frame."""
        size = said["size"]
        return (
            said.get("min_pixels", size.get("shortest_edge")),
            said.get("max_pixels", size.get("longest_edge")),
        )

    @property
    def token_side(self) -> int:
        """Pixels along a side of a token."""
        return self.patch_size * self.merge_size

    def numbers(self, clip: videos.Clip, num_frames: int | None, fps: float | None) -> np.ndarray:
        """Returns the numbers of the chosen frames, int[F]: an even spacing from the first, of as
        many as fill patches.
        """
        if num_frames is not None:
            count = round(num_frames / self.temporal_patch_size) * self.temporal_patch_size
        elif fps is not None:
            most = min(self.max_frames, clip.total)
            most = most // self.temporal_patch_size * self.temporal_patch_size
            wanted = min(max(self.seconds(clip) * fps, self.min_frames), most)
            count = int(wanted / self.temporal_patch_size) * self.temporal_patch_size
        else:
            count = clip.total
        self.check_count(clip, count)
        return videos.sampled_evenly(clip.total, count)

    def fit(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width that the frames of a video are resized to.

        Args:
            frames: number of frames.
            height: pixels of a frame.
            width: pixels of a frame.

        Raises:
            ValueError: one side is over 200 times the other.
        """
        return self._fit(height, width, 1, 1)

    def _fit(self, height: int, width: int, frames: int, rounded: int) -> tuple[int, int]:
        """Returns multiples of a token's side with about the same ratio, so that `rounded` frames
        have a number of pixels within the limits.
        """
        if max(height, width) > 200 * min(height, width):
            raise ValueError(
                f"a video has frames of {height} x {width} pixels; expected one side at most 200 "
                "times the other: crop them, or leave the video out"
            )
        side = self.token_side
        high, wide = (round(length / side) * side for length in (height, width))
        if rounded * high * wide > self.max_pixels:
            shrink = math.sqrt(frames * height * width / self.max_pixels)
            high, wide = (
                max(side, math.floor(length / shrink / side) * side) for length in (height, width)
            )
        elif rounded * high * wide < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (frames * height * width))
            high, wide = (math.ceil(length * grow / side) * side for length in (height, width))
        return high, wide

    def cut(self, frames: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Resizes the frames of a video and cuts them into patches.

        Args:
            frames: uint8[F, height, width, 3].

        Returns:
            Patches float32[P, values], and the grid: patches in time, in rows and in columns. A
            last patch that is not full repeats the last frame.

        Raises:
            ValueError: as for `fit`.
        """
        high, wide = self.fit(*frames.shape[:3])
        time, side, merge = self.temporal_patch_size, self.patch_size, self.merge_size
        scaled = self.scale(np.stack([resizing.bicubic(frame, high, wide) for frame in frames]))
        scaled = np.pad(scaled, [(0, -len(scaled) % time), *[(0, 0)] * 3], "edge")
        grid = (len(scaled) // time, high // side, wide // side)
        cells = scaled.reshape(
            *(grid[0], time),
            *(grid[1] // merge, merge, side),
            *(grid[2] // merge, merge, side),
            3,
        )
        # Tokens in order, the patches of each, and the values of each: colour, time, row, column.
        cells = cells.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
        return cells.reshape(math.prod(grid), -1), grid
