"""Qwen3-VL's processor: Qwen2-VL's, with the time of each frame of a video in the prompt."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from ports.inputs import videos
from ports.inputs.videos import Clip
from ports.models.qwen2_vl import processor as qwen2_processor
from ports.models.qwen2_vl.videos import VideoSettings as Qwen2Settings


@dataclasses.dataclass(frozen=True)
class VideoSettings(Qwen2Settings):
    """How videos become patches; the limits are pixels of all frames together."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **Qwen2Settings.defaults,
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "patch_size": 16,
        "do_sample_frames": True,
        "fps": 2,
    }

    @classmethod
    def limits(cls, said: Mapping[str, Any]) -> tuple[int | None, int | None]:
        """Returns the pixels of the smallest and of the largest video."""
        return said["size"].get("shortest_edge"), said["size"].get("longest_edge")

    def numbers(self, clip: Clip, num_frames: int | None, fps: float | None) -> np.ndarray:
        """Returns the numbers of the chosen frames, int[F]: an even spacing from the first to the
        last, with some frames repeated if more are asked for than there are.
        """
        most = min(self.max_frames, clip.total)
        if num_frames is None:
            wanted = clip.total
            if fps is not None:
                wanted = int(clip.total / (clip.rate or videos.DEFAULT_RATE) * fps)
            num_frames = min(max(wanted, self.min_frames), most)
        return np.linspace(0, clip.total - 1, num_frames).round().astype(int)

    def fit(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width that the frames of a video are resized to.

        Args:
            frames: number of frames.
            height: pixels of a frame.
            width: pixels of a frame.

        Raises:
            ValueError: there are too few frames, or one side is over 200 times the other.
        """
        time, side = self.temporal_patch_size, self.token_side
        if frames < time:
            raise ValueError(
                f"a video has {frames} of the {time} frames of a patch; pass more, or an image"
            )
        if min(height, width) < side:
            grow = max(side / height, side / width)
            height, width = int(height * grow), int(width * grow)
        return self._fit(height, width, frames, round(frames / time) * time)


class Processor(qwen2_processor.Processor):
    """Converts texts, images and videos to the arrays that the model takes.

    These are Qwen2-VL's. In the prompt, each patch of a video in time comes after its time, such as
    "<1.5 seconds>", and is enclosed like an image.
    """

    settings_class = VideoSettings

    def write_video(self, clip: Clip, frames: int, tokens: int) -> str:
        """Returns the times of a video and the tokens after each.

        Args:
            clip: its frames.
            frames: number of patches in time.
            tokens: number of tokens for each of them.
        """
        start = getattr(self.tokenizer, "vision_start_token", "<|vision_start|>")
        end = getattr(self.tokenizer, "vision_end_token", "<|vision_end|>")
        shown = start + self.video_token * tokens + end
        times = patch_times(clip, frames, self.video_settings.temporal_patch_size)
        return "".join(f"<{time:.1f} seconds>{shown}" for time in times)


def patch_times(clip: Clip, patches: int, frames: int) -> list[float]:
    """Returns the middle of the first and last frame's seconds, for each of the patches in time.

    Args:
        clip: the frames; without their numbers, they are the first of the recording.
        patches: number of patches.
        frames: frames per patch. A last patch that is not full repeats the last frame.
    """
    numbers = range(len(clip.frames)) if clip.numbers is None else clip.numbers
    seconds = np.array(numbers) / (clip.rate or videos.DEFAULT_RATE)
    full = np.pad(seconds, (0, patches * frames - len(seconds)), "edge").reshape(patches, frames)
    return [(first + last) / 2 for first, last in full[:, [0, -1]].tolist()]
