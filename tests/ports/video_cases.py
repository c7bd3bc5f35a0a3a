"""Two drawn videos and a picture in prompts, and processors of the families that take videos.

Shared by the tests and by `tests.data.videos.make_expected`, which writes what transformers makes
of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import transformers
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from ports.inputs.processor import VideoProcessor
from ports.models import (
    internvl_processor,
    llava_onevision,
    qwen2_5_vl,
    qwen3_vl_processor,
    smolvlm_processor,
)
from ports.models.molmo2 import crops as molmo2_crops
from ports.models.molmo2 import processor as molmo2_processor
from ports.models.qwen2_vl import processor as qwen2_vl_processor

from . import helpers, idefics3_helpers, qwen2_vl_helpers
from .models import test_internvl, test_llava_next, test_molmo2

TIMES = [f"<{tenths / 10:.1f}" for tenths in range(40)]
FRAMES = [f"Frame{i + 1}:" for i in range(8)]
WORDS = ["what", "is", "in", "the", "picture", "seconds>", *TIMES, *FRAMES]
# Words of SmolVLM's and Molmo2's texts of videos.
SMOL = [
    *("You", "are", "provided", "the", "following", "series", "frames", "from", "a"),
    *("[H:MM:SS]", "video.", "Frame", *map(smolvlm_processor.in_words, range(9))),
    *(f"0:00:{seconds:02d}" for seconds in range(5)),
    *(f"00:{seconds:02d}:" for seconds in range(5)),
]
SECONDS = [f"{tenths / 10:.1f}" for tenths in range(40)]
SMALL = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
RATES = [
    {"total_num_frames": 5, "fps": 2.0, "frames_indices": [0, 1, 2, 3, 4], "duration": 2.5},
    {"total_num_frames": 8, "fps": 3.0, "frames_indices": [*range(8)], "duration": 8 / 3},
]
# Name -> options of the processor. The frames of "apart" were chosen from longer recordings.
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
    "per second": {
        "video_metadata": RATES,
        "do_sample_frames": True,
        "fps": 1.8,
        "num_frames": None,
    },
    "counted": {
        "video_metadata": RATES,
        "do_sample_frames": True,
        "num_frames": 4,
        "fps": None,
    },
}


class Family(NamedTuple):
    """The processors of a family."""

    ours: type[VideoProcessor]
    theirs: str  # name of transformers' class, and of that for videos
    theirs_of_videos: str
    values: Mapping[str, Any]  # of the video processor
    image: str  # in a prompt; "" without an image
    video: str
    # Cases in which transformers makes arrays; some families need videos of one length.
    cases: Sequence[str] = tuple(CASES)

    @property
    def texts(self) -> list[str]:
        """A prompt with a video and a picture, and one with a video."""
        return [f"what {self.video} is {self.image}", f"in {self.video} the picture"]


PER_FRAME = {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 42}, "patch_size": 7, **SMALL}
TOGETHER = {**PER_FRAME, "size": {"shortest_edge": 8 * 28 * 28, "longest_edge": 6 * 28 * 42}}
QWEN = [f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")]
SAMPLED = ("per second", "counted")
FAMILIES = {
    "qwen2_vl": Family(
        qwen2_vl_processor.Processor,
        "Qwen2VLProcessor",
        "Qwen2VLVideoProcessor",
        PER_FRAME,
        *QWEN,
    ),
    "qwen2_5_vl": Family(
        qwen2_5_vl.Processor,
        "Qwen2_5_VLProcessor",
        "Qwen2VLVideoProcessor",
        PER_FRAME,
        *QWEN,
    ),
    "qwen3_vl": Family(
        qwen3_vl_processor.Processor,
        "Qwen3VLProcessor",
        "Qwen3VLVideoProcessor",
        TOGETHER,
        *QWEN,
    ),
    "llava_onevision": Family(
        llava_onevision.Processor,
        "LlavaOnevisionProcessor",
        "LlavaOnevisionVideoProcessor",
        {"size": {"height": 28, "width": 28}, **SMALL},
        "<image>",
        "<video>",
        SAMPLED,
    ),
    "internvl": Family(
        internvl_processor.Processor,
        "InternVLProcessor",
        "InternVLVideoProcessor",
        {"size": {"height": 29, "width": 29}, **SMALL},
        "<image>",
        "<video>",
        SAMPLED,
    ),
    # Beside a video, transformers loses the image.
    "smolvlm": Family(
        smolvlm_processor.Processor,
        "SmolVLMProcessor",
        "SmolVLMVideoProcessor",
        {
            "size": {"longest_edge": 70},
            "max_image_size": {"longest_edge": idefics3_helpers.SIDE},
            "video_sampling": {"max_frames": 6, "fps": 1, "video_size": {"longest_edge": 70}},
        },
        "",
        "<video>",
    ),
    "molmo2": Family(
        molmo2_processor.Processor,
        "Molmo2Processor",
        "Molmo2VideoProcessor",
        {
            "size": {"height": 35, "width": 35},
            "patch_size": 7,
            "num_frames": 7,
            # Without these, transformers gives whole numbers from 0 to 255.
            "do_rescale": True,
            "do_normalize": True,
            **SMALL,
        },
        "<|image|>",
        "<|video|>",
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
    """Returns our small processor of a family, with words and times."""
    values = FAMILIES[name].values
    if name == "llava_onevision":
        special = {"<image>": helpers.IMAGE, "<video>": qwen2_vl_helpers.VIDEO}
        images = LlavaOnevisionImageProcessorPil(
            **values, image_grid_pinpoints=test_llava_next.CANVASES
        )
        tokenizer = helpers.make_tokenizer(WORDS, special)
        made = llava_onevision.Processor(images, tokenizer, None, values)
        made.sizes = llava_onevision.Config.from_hf(test_llava_next.make_config("onevision"))
        return made
    if name == "internvl":
        special = {"<image>": helpers.IMAGE, "<video>": 100, "<a>": 99, "<b>": 98}
        tokenizer = helpers.make_tokenizer(
            WORDS,
            special,
            context_image_token="<image>",
            video_token="<video>",
            start_image_token="<a>",
            end_image_token="<b>",
        )
        images = GotOcr2ImageProcessorPil(**values, min_patches=1, max_patches=6)
        tokens = test_internvl.TOKENS
        return internvl_processor.Processor(images, tokenizer, None, tokens, values)
    if name == "smolvlm":
        images = SmolVLMImageProcessorPil(
            size={"longest_edge": 2 * idefics3_helpers.SIDE},
            max_image_size={"longest_edge": idefics3_helpers.SIDE},
        )
        # A "<video>" is replaced before there are tokens.
        tokenizer = helpers.make_tokenizer([*WORDS[:5], *SMOL], idefics3_helpers.SPECIAL)
        return smolvlm_processor.Processor(images, tokenizer, None, 9, values)
    if name == "molmo2":
        cutting = molmo2_crops.ImageSettings.from_json(test_molmo2.IMAGES)
        tokenizer = helpers.make_tokenizer([*WORDS[:5], *SECONDS], test_molmo2.SPECIAL)
        return molmo2_processor.Processor(cutting, tokenizer, None, None, values)
    special = {
        "<|vision_start|>": qwen2_vl_helpers.START,
        "<|vision_end|>": qwen2_vl_helpers.END,
        "<|video_pad|>": qwen2_vl_helpers.VIDEO,
        "<|image_pad|>": helpers.IMAGE,
    }
    images = Qwen2VLImageProcessorPil(
        patch_size=7, size={"shortest_edge": 14 * 14, "longest_edge": 56 * 70}
    )
    return FAMILIES[name].ours(images, helpers.make_tokenizer(WORDS, special), None, values)


def process(name: str, processor: Any, **options: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of a family's prompts, by our processor or transformers'."""
    given: dict[str, Any] = {"videos": list(VIDEOS)}
    if FAMILIES[name].image:
        given["images"] = [[VIDEOS[1][0]], []]
    # transformers' class of InternVL fails with "np", ours with anything else.
    kind = "np" if isinstance(processor, VideoProcessor) or name != "internvl" else "pt"
    if name == "molmo2" and not isinstance(processor, VideoProcessor):
        given["images"] = [VIDEOS[1][0]]
    texts = FAMILIES[name].texts
    made = processor(text=texts, **given, padding=True, return_tensors=kind, **options)
    return {name: np.asarray(value) for name, value in made.items()}


# Further options of transformers' classes.
SETTINGS = {
    "llava_onevision": {
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_2",
    },
    "internvl": {"image_seq_length": test_internvl.TOKENS},
    "smolvlm": {"image_seq_len": 9},
}


def theirs(name: str) -> Any:
    """Returns transformers' processor of a family, which needs torchvision."""
    family, ours = FAMILIES[name], make_processor(name)
    if name == "molmo2":
        # Our class of images is not transformers'.
        ours.image_processor = transformers.Molmo2ImageProcessor(**test_molmo2.IMAGES)
    return getattr(transformers, family.theirs)(
        image_processor=ours.image_processor,
        tokenizer=ours.tokenizer,
        video_processor=getattr(transformers, family.theirs_of_videos)(**family.values),
        **SETTINGS.get(name, {}),
    )
