"""The configuration of Qwen2-VL, from which those of the later Qwens derive."""

import dataclasses
from typing import Any, ClassVar, Self

import jax

from ports.models.qwen2_vl import vision as qwen2_vision
from ports.nn import decoder

Array = jax.Array

# First position of the text after a video: "original", as in the original code, transformers 4 and
# vLLM, is after the largest position along all three axes. "transformers-5" ignores time, so if
# there are more frames than rows and columns, the text has positions inside the video.
VIDEO_POSITIONS = ("original", "transformers-5")


@dataclasses.dataclass(frozen=True)
class Config:
    """The values that the port needs from a transformers Qwen2VLConfig."""

    text: decoder.DecoderConfig
    vision: qwen2_vision.VisionConfig
    image_tokens: tuple[int, int]  # ids of the image token and the video token
    video_positions: str = VIDEO_POSITIONS[0]
    text_type: ClassVar[str] = "qwen2_vl_text"
    vision_class: ClassVar[type[qwen2_vision.VisionConfig]] = qwen2_vision.VisionConfig
    # Whether there is text (a time) between the frames of a video in the prompt.
    frames_apart: ClassVar[bool] = False

    @classmethod
    def from_hf(cls, config: Any) -> Self:
        """Reads a transformers Qwen2VLConfig, or that of a later Qwen.

        Raises:
            ValueError: a value is not implemented.
        """
        text = decoder.DecoderConfig.from_hf(
            config.text_config, bool(config.tie_word_embeddings), cls.text_type
        )
        if text.rope.sections is None:
            raise ValueError(
                "text_config has no mrope_section; expected the numbers of rotary frequencies for "
                "time, height and width, such as [16, 24, 24]"
            )
        vision = cls.vision_class.from_hf(config.vision_config)
        if vision.output_size != text.hidden_size:
            raise ValueError(
                f"vision_config.{vision.output_name} is {vision.output_size}; expected the "
                f"decoder's width, {text.hidden_size}"
            )
        return cls(text, vision, (config.image_token_id, config.video_token_id))

    def video_interval(self, seconds: Array | None) -> Array | float:
        """Returns the rotary positions from a frame of a video to the next.

        Args:
            seconds: float[videos], the time between two frames, if the inputs have it.
        """
        return 1.0
