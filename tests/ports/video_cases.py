"""Two drawn videos and a picture in prompts, and processors of the families that take videos.

Shared by the tests and by `tests.data.videos.make_expected`, which writes what transformers makes
of them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ports.inputs.processor import VideoProcessor
from ports.models import qwen2_5_vl, qwen3_vl_processor
from ports.models.qwen2_vl import processor as qwen2_vl_processor

from . import helpers, qwen2_vl_helpers

SPECIAL = {
    "<|vision_start|>": qwen2_vl_helpers.START,
    "<|vision_end|>": qwen2_vl_helpers.END,
    "<|video_pad|>": qwen2_vl_helpers.VIDEO,
    "<|image_pad|>": helpers.IMAGE,
}
TIMES = [f"<{tenths / 10:.1f}" for tenths in range(40)]
WORDS = ["what", "is", "in", "the", "picture", "seconds>", *TIMES]
SMALL = {"patch_size": 7, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
VIDEO, IMAGE = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("video", "image"))
TEXTS = [f"what {VIDEO} is {IMAGE}", f"in {VIDEO} the picture"]
RATES = [
    {"total_num_frames": 5, "fps": 2.0, "frames_indices": [0, 1, 2, 3, 4]},
    {"total_num_frames": 8, "fps": 3.0, "frames_indices": [0, 1, 2, 3, 4, 5, 6, 7]},
]
# Name -> options of the processor. The frames of "apart" are chosen from longer recordings before.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"video_metadata": RATES, "do_sample_frames": False},
    "apart": {
        "video_metadata": [
            {"total_num_frames": 40, "fps": 10.0, "frames_indices": [0, 9, 18, 27, 36]},
            {"total_num_frames": 24, "fps": 8.0, "frames_indices": [0, 3, 6, 9, 12, 15, 18, 21]},
        ],
        "do_sample_frames": False,
    },
    "per second": {"video_metadata": RATES, "do_sample_frames": True, "fps": 1.8},
    "counted": {
        "video_metadata": RATES,
        "do_sample_frames": True,
        "num_frames": 4,
        "fps": None,
    },
}


class Family(NamedTuple):
    """Our processor of a family, and transformers' class names for it and its videos."""

    ours: type[VideoProcessor]
    theirs: str
    theirs_of_videos: str
    values: Mapping[str, Any]


PER_FRAME = {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 42}, **SMALL}
TOGETHER = {"size": {"shortest_edge": 8 * 28 * 28, "longest_edge": 6 * 28 * 42}, **SMALL}
FAMILIES = {
    "qwen2_vl": Family(
        qwen2_vl_processor.Processor, "Qwen2VLProcessor", "Qwen2VLVideoProcessor", PER_FRAME
    ),
    "qwen2_5_vl": Family(
        qwen2_5_vl.Processor, "Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", PER_FRAME
    ),
    "qwen3_vl": Family(
        qwen3_vl_processor.Processor, "Qwen3VLProcessor", "Qwen3VLVideoProcessor", TOGETHER
    ),
}


def draw(frames: int, height: int, width: int) -> np.ndarray:
    """Returns uint8[frames, height, width, 3]: coloured tiles, and a bright square that moves
    to the right.
    """
    shape = (frames, -(-height // 8), -(-width // 8), 3)
    tiles = np.random.default_rng(frames).integers(0, 200, shape, np.uint8)
    video = tiles.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width].copy()
    for i, frame in enumerate(video):
        frame[4:11, 2 * i : 2 * i + 6] = 255
    return video


VIDEOS = [draw(5, 37, 23), draw(8, 30, 61)]


def make_processor(name: str) -> VideoProcessor:
    """Returns our processor of a family: images of 14 x 14 to 56 x 70 pixels, words and times."""
    family = FAMILIES[name]
    return family.ours(
        Qwen2VLImageProcessorPil(
            patch_size=7, size={"shortest_edge": 14 * 14, "longest_edge": 56 * 70}
        ),
        helpers.make_tokenizer(WORDS, SPECIAL),
        None,
        family.values,
    )


def process(processor: Any, **options: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of the prompts with both videos and a picture, of any processor."""
    given = {"text": list(TEXTS), "images": [[VIDEOS[1][0]], []], "videos": list(VIDEOS)}
    made = processor(**given, padding=True, return_tensors="np", **options)
    return {name: np.asarray(value) for name, value in made.items()}


def theirs(name: str) -> Any:
    """Returns transformers' processor of a family, which needs torchvision."""
    family, ours = FAMILIES[name], make_processor(name)
    of_videos = getattr(transformers, family.theirs_of_videos)(**family.values)
    return getattr(transformers, family.theirs)(
        image_processor=ours.image_processor, tokenizer=ours.tokenizer, video_processor=of_videos
    )
