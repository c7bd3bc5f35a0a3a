"""Small random Idefics3 and SmolVLM checkpoints, their inputs and processors."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from ports.models import idefics3

from . import helpers

FAKE, WHOLE, UTTERANCE = 100, 99, 98  # around images, before the whole picture, after a turn
# 6 x 6 patches of 7 pixels, and 2 pixels at the edge; the shuffle makes 2 x 2 or 3 x 3 tokens.
SIDE = 44
VISION = {**helpers.VISION, "image_size": SIDE}
KINDS = {
    "idefics3": (
        transformers.Idefics3Config,
        transformers.Idefics3ForConditionalGeneration,
        idefics3.PORT,
        3,
        Idefics3ImageProcessorPil,
    ),
    "smolvlm": (
        transformers.SmolVLMConfig,
        transformers.SmolVLMForConditionalGeneration,
        idefics3.SMOLVLM,
        2,
        SmolVLMImageProcessorPil,
    ),
}


TAGS = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
SPECIAL = {tag: 90 + i for i, tag in enumerate(TAGS)} | {
    "<end_of_utterance>": UTTERANCE,
    "<global-img>": WHOLE,
    "<fake_token_around_image>": FAKE,
    "<image>": helpers.IMAGE,
}


def make_config(kind: str, **changes: Any) -> Any:
    """Returns the small configuration of a family with changes."""
    config, _, _, scale, _ = KINDS[kind]
    values = {
        "text_config": transformers.LlamaConfig(**helpers.TEXT),
        "vision_config": VISION,
        "image_token_id": helpers.IMAGE,
        "scale_factor": scale,
    }
    return config(**(values | changes))


def make_idefics3(directory: Path, kind: str) -> helpers.Pair:
    """Saves a random checkpoint of a family."""
    return helpers.make_pair(directory, KINDS[kind][1](make_config(kind)))


def make_inputs(
    images: Sequence[Sequence[tuple[int, int]]], texts: Sequence[int], tokens: int
) -> dict[str, np.ndarray]:
    """Returns rows of images that fill these shares of their squares, and of text tokens."""
    counts = [len(row) for row in images]
    inputs = helpers.make_inputs(counts, texts, tokens_per_image=tokens)
    inputs.pop("pixel_values", None)
    random = np.random.default_rng(0)
    pixels = np.zeros((len(images), max(counts), 3, SIDE, SIDE), np.float32)
    mask = np.zeros((len(images), max(counts), SIDE, SIDE), np.int64)
    for i, row in enumerate(images):
        for j, (h, w) in enumerate(row):
            pixels[i, j, :, :h, :w] = random.standard_normal((3, h, w), np.float32)
            mask[i, j, :h, :w] = 1
    if not sum(counts):
        return inputs
    return {**inputs, "pixel_values": pixels, "pixel_attention_mask": mask}


def save_processor(kind: str, directory: Path) -> None:
    """Writes the files of a processor that cuts pictures into up to 2 x 2 tiles."""
    tokenizer = helpers.make_tokenizer(["User:", "Assistant:", "what", "is", "it"], SPECIAL)
    tokenizer.chat_template = (
        "{% for m in messages %}User: {% for part in m.content %}"
        "{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %} "
        "<end_of_utterance> {% endfor %}Assistant:"
    )
    *_, scale, images = KINDS[kind]
    images(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}).save_pretrained(
        directory
    )
    tokenizer.save_pretrained(directory)
    own = {"idefics3": "Idefics3Processor", "smolvlm": "SmolVLMProcessor"}
    values = {"processor_class": own[kind], "image_seq_len": (6 // scale) ** 2}
    (directory / "processor_config.json").write_text(json.dumps(values))
