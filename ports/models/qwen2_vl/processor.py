"""Qwen2-VL's processor for text and images.

transformers' own class requires torchvision, because of its video processor. This class combines
the same image processor (with its PIL backend) and tokenizer without it.
"""

from pathlib import Path
from typing import Any

import numpy as np

from ports.inputs import processor
from ports.models import port


class Processor(processor.Processor):
    """Converts texts and images to the arrays that the model takes.

    Besides input_ids, attention_mask and mm_token_type_ids, these are pixel_values
    float32[patches, values] and image_grid_thw int[I, 3].
    """

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None):
        super().__init__(image_processor, tokenizer, chat_template)
        self.image_token = getattr(tokenizer, "image_token", "<|image_pad|>")

    def expand(self, arrays: dict[str, np.ndarray]) -> list[str]:
        """Returns an image token for each square of merged patches."""
        square = self.image_processor.merge_size**2
        counts = arrays["image_grid_thw"].prod(axis=1) // square
        return [self.image_token * int(count) for count in counts]


def read_processor(directory: Path) -> Processor:
    """Loads the processor of a checkpoint.

    Raises:
        ValueError: the processor does not load.
    """
    return Processor(*port.read_parts(directory))
