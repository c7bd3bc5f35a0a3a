"""Qwen2-VL's processor for text, images and videos.

transformers' own class requires torchvision, because of its video processor. This class combines
the same image processor (with its PIL backend) and tokenizer with videos in numpy.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from ports.inputs import processor
from ports.inputs.videos import Clip
from ports.models import port
from ports.models.qwen2_vl.videos import VideoSettings


class Processor(processor.VideoProcessor):
    """Converts texts, images and videos to the arrays that the model takes.

    Besides input_ids, attention_mask and mm_token_type_ids, these are pixel_values
    float32[patches, values] and image_grid_thw int[I, 3], and for videos pixel_values_videos and
    video_grid_thw.
    """

    image_token, video_token = "<|image_pad|>", "<|video_pad|>"
    settings_class = VideoSettings

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Loads the processor of a checkpoint.

        Raises:
            ValueError: the processor does not load.
        """
        return cls(*port.read_parts(directory), port.read_video_settings(directory))

    def expand(self, arrays: dict[str, np.ndarray]) -> list[str]:
        """Returns an image token for each square of merged patches."""
        square = self.image_processor.merge_size**2
        counts = arrays["image_grid_thw"].prod(axis=1) // square
        return [self.image_token * int(count) for count in counts]

    def process_videos(self, videos: Sequence[Clip]) -> tuple[dict[str, np.ndarray], list[str]]:
        """Returns the patches and grids of a flat list of videos, and the tokens of each."""
        cuts = [self.video_settings.cut(clip.frames) for clip in videos]
        arrays = {
            "pixel_values_videos": np.concatenate([patches for patches, _ in cuts]),
            "video_grid_thw": np.array([grid for _, grid in cuts]),
        }
        square = self.video_settings.merge_size**2
        written = [
            self.write_video(clip, frames, rows * columns // square)
            for clip, (_, (frames, rows, columns)) in zip(videos, cuts, strict=True)
        ]
        return arrays, written

    def write_video(self, clip: Clip, frames: int, tokens: int) -> str:
        """Returns the text of a video in a prompt.

        Args:
            clip: its frames.
            frames: number of patches in time.
            tokens: number of tokens for each of them.
        """
        return self.video_token * (frames * tokens)
