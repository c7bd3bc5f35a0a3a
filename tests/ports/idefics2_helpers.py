"""Small random Idefics2 checkpoints, inputs with images of all sizes, and comparisons.

Sizes are odd on purpose: a tower whose patches do not fill its image, heads of 11 in a resampler of
width 60, images that end within a patch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

import ports
from ports.models import idefics2
from ports.nn import siglip

from . import helpers

LATENTS = 5
FAKE, UTTERANCE = 100, 99  # what stands around an image, and what ends a turn
VISION = {**helpers.VISION, "image_size": 215}  # 30 patches of 7 pixels a side
PERCEIVER = {
    "hidden_size": helpers.TEXT["hidden_size"],
    "resampler_n_latents": LATENTS,
    "resampler_depth": 2,
    "resampler_n_heads": 6,
    "resampler_head_dim": 11,
    "num_key_value_heads": 2,
}

# Name -> changes to (the text configuration, the perceiver's, the whole configuration).
VARIANTS: dict[str, tuple[dict, dict, dict]] = {
    "grouped queries": ({}, {}, {}),
    "tied embeddings, sliding window": (
        {"num_key_value_heads": 6, "head_dim": 10, "sliding_window": 9},
        {"num_key_value_heads": 6},
        {"tie_word_embeddings": True},
    ),
    "no window, other activations": (
        {"sliding_window": None, "hidden_act": "relu", "rope_theta": 500.0},
        {"num_key_value_heads": 1, "hidden_act": "gelu", "rms_norm_eps": 1e-3},
        {},
    ),
}

# Name -> (heights and widths of the images in each row, text tokens in each row).
PROMPTS: dict[str, tuple[list[list[tuple[int, int]]], list[int]]] = {
    "images of several sizes": ([[(21, 230), (64, 35), (7, 7)]], [7]),
    "padded on the left, two, no and one image": (
        [[(30, 61), (99, 14)], [], [(50, 64)]],
        [4, 9, 8],
    ),
    "no image": ([[], []], [5, 12]),
}


def make_config(
    text: Mapping[str, Any] | None = None,
    perceiver: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    **top: Any,
) -> transformers.Idefics2Config:
    """Returns the small configuration with changes to its parts."""
    return transformers.Idefics2Config(
        text_config=transformers.MistralConfig(**{**helpers.TEXT, **(text or {})}),
        perceiver_config={**PERCEIVER, **(perceiver or {})},
        vision_config={**VISION, **(vision or {})},
        image_token_id=helpers.IMAGE,
        **top,
    )


def make_idefics2(
    directory: Path, config: transformers.Idefics2Config | None = None, **options: Any
) -> helpers.Pair:
    """Saves a random Idefics2; options go to save_pretrained."""
    model = transformers.Idefics2ForConditionalGeneration(config or make_config())
    return helpers.make_pair(directory, model, **options)


def make_inputs(
    images: Sequence[Sequence[tuple[int, int]]],
    texts: Sequence[int],
    *,
    tokens_per_image: int = LATENTS,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Returns what the processor would, for these images and text tokens per row, padded left."""
    counts = [len(row) for row in images]
    inputs = helpers.make_inputs(counts, texts, tokens_per_image=tokens_per_image, seed=seed)
    inputs.pop("pixel_values", None)
    if not sum(counts):
        return inputs
    random = np.random.default_rng(seed)
    height, width = (max(size[axis] for row in images for size in row) for axis in (0, 1))
    shape = (len(images), max(counts))
    pixels = np.zeros((*shape, 3, height, width), np.float32)
    mask = np.zeros((*shape, height, width), np.int64)
    for i, row in enumerate(images):
        for j, (h, w) in enumerate(row):
            pixels[i, j, :, :h, :w] = random.standard_normal((3, h, w), np.float32)
            mask[i, j, :h, :w] = 1
    return {**inputs, "pixel_values": pixels, "pixel_attention_mask": mask}


def torch_forward(model: Any, inputs: Mapping[str, np.ndarray]) -> Any:
    """Does what `helpers.torch_forward` does, with this port's names."""
    return helpers.torch_forward(model, inputs, idefics2.canonical_name)


def _patches(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns bool[I, P]: which patches of the images that are not padding count."""
    mask = inputs["pixel_attention_mask"]
    mask = mask.reshape(-1, *mask.shape[2:])
    return siglip.patch_mask(mask[mask.any((1, 2))], VISION["patch_size"]).reshape(
        -1, (mask.shape[1] // 7) * (mask.shape[2] // 7)
    )


def _rows(site: str, states: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns [rows, width]: a site's states at the tokens and patches that count, row by row."""
    states = np.asarray(states)
    if site.startswith(("model.text_model", "lm_head")):
        return states[inputs["attention_mask"].astype(bool)]
    patches = _patches(inputs)
    states = states.reshape(len(patches), -1, states.shape[-1])
    if states.shape[1] == patches.shape[1]:
        return states[patches]
    if states.shape[1] == patches.shape[1] + LATENTS:
        latents = np.ones((len(patches), LATENTS), bool)
        return states[np.concatenate([patches, latents], axis=1)]
    assert states.shape[1] == LATENTS
    return states.reshape(-1, states.shape[-1])


def site_errors(
    vlm: ports.VLM,
    ours: Mapping[str, Any],
    theirs: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
) -> dict[str, float]:
    """Returns site -> relative error at the tokens and at the patches that count.

    The port pads the grid of patches further, so the same patches are in other rows.
    """
    laid_out = {**inputs, **{k: v for k, v in vlm.prepare(inputs).items() if "pixel" in k}}
    errors = {}
    for site, states in ours.items():
        expected = theirs[site]
        if expected.ndim == 4:
            expected = np.moveaxis(expected, 1, -1)  # a convolution's channels
        errors[site] = helpers.relative_error(
            _rows(site, states, laid_out), _rows(site, expected, inputs)
        )
    return errors


def make_processor(**image_options: Any) -> transformers.Idefics2Processor:
    """Returns a real processor: images of 30 to 120 pixels per side, a tokenizer of whole words."""
    special = {
        "<end_of_utterance>": UTTERANCE,
        "<fake_token_around_image>": FAKE,
        "<image>": helpers.IMAGE,
    }
    return transformers.Idefics2Processor(
        image_processor=Idefics2ImageProcessorPil(
            size={"shortest_edge": 30, "longest_edge": 120}, **image_options
        ),
        tokenizer=helpers.make_tokenizer(
            ["User:", "Assistant:", "what", "is", "in", "the", "picture"], special
        ),
        image_seq_len=LATENTS,
        chat_template=(
            "{% for m in messages %}{{ m.role.capitalize() }}:{% for part in m.content %}"
            "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
            "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
        ),
    )
