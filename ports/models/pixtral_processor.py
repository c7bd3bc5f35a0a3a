"""Pixtral's processor for text and images.

transformers' own class requires torch and torchvision. This class combines the same image processor
(with its PIL backend) and tokenizer without them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ports.inputs import processor
from ports.models import port


class Processor(processor.Processor):
    """Converts texts and images to the arrays that the model takes.

    Besides input_ids, attention_mask and mm_token_type_ids, these are pixel_values float32[I, 3,
    height, width], padded on the right and at the bottom, and image_sizes int[I, 2].
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        chat_template: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template)
        said = self._settings = dict(settings or {})
        self.image_token = said.get("image_token", "[IMG]")
        self.image_break_token = said.get("image_break_token", "[IMG_BREAK]")
        self.image_end_token = said.get("image_end_token", "[IMG_END]")
        self.side = said.get("patch_size", 16) * said.get("spatial_merge_size", 1)

    @property
    def settings(self) -> dict[str, Any]:
        """What the processor has of processor_config.json."""
        return self._settings

    def process_images(self, images: list[Any]) -> dict[str, np.ndarray]:
        """Returns pixel_values and image_sizes for a flat list of images."""
        patch = {"height": self.side, "width": self.side}
        return dict(self.image_processor(images=images, patch_size=patch, return_tensors="np"))

    def expand(self, arrays: dict[str, np.ndarray]) -> list[str]:
        """Returns a token for each patch, row by row, with tokens between rows and at the end."""
        grids = np.asarray(arrays["image_sizes"]) // self.side
        return [
            self.image_break_token.join([self.image_token * int(width)] * int(height))
            + self.image_end_token
            for height, width in grids
        ]


def read_processor(directory: Path) -> Processor:
    """Loads the processor of a checkpoint.

    Raises:
        ValueError: the processor does not load.
    """
    settings = port.read_settings(directory, "processor_config.json")
    return Processor(*port.read_parts(directory), settings)
