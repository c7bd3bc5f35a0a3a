"""What the families with LLaVA's layout share: a tower, a projector, a decoder, and their names.

B batch, T positions, D width, I images, P features per image.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ports.inputs import patch_layout as patches
from ports.inputs.patch_layout import Layouts
from ports.nn import decoder, vision_language

Array = jax.Array


class LlavaLike(vision_language.VisionLanguageModel):
    """Replaces image tokens by projected features. Subclasses define `image_features` and a `setup`
    with `vision_tower`, `multi_modal_projector` and `language_model`, a `decoder.CausalLM`.
    """

    decoder_path = ("language_model", "model")
    head_path = ("language_model", "lm_head")

    @property
    def text_decoder(self) -> decoder.Decoder:
        """The decoder."""
        return self.language_model.model

    def unembed(self, x: Array) -> Array:
        """Maps x[..., D] to logits float32[..., V] with the head only."""
        return self.language_model.unembed(x)

    def image_features(self, pixels: Array) -> Array:
        """Maps pixels[I, 3, height, width] to the decoder's inputs [I, P, D]."""
        raise NotImplementedError

    def embed_inputs(self, inputs: vision_language.Inputs) -> Array:
        """Maps input_ids int[B, T] and optional pixel_values[I, 3, height, width] to [B, T, D]."""
        pixels = inputs.get("pixel_values")
        features = None if pixels is None else self.image_features(jnp.asarray(pixels))
        return self.place(inputs, features)

    def place(
        self, inputs: vision_language.Inputs, features: Array | None, valid: Array | None = None
    ) -> Array:
        """Embeds tokens and puts the features [I, P, D] at the image tokens; [B, T, D].

        `valid` bool[I, P] selects features; None for all.
        """
        tokens = jnp.asarray(inputs["input_ids"])
        is_image = vision_language.is_image(tokens, self.config.image_tokens)
        # The image token may be outside the embedding table.
        x = self.text_decoder.embed_tokens(jnp.where(is_image, 0, tokens))
        if features is None:
            return x
        flat = features.reshape(-1, features.shape[-1])
        valid = None if valid is None else valid.reshape(-1)
        return vision_language.place_images(x, is_image, flat, valid)


def example_inputs(config: Any, batch: int = 1, length: int | None = None) -> dict[str, Any]:
    """Returns shapes and dtypes of a batch with one image per row, to trace initialisation with."""
    cfg = config.vision
    length = length or config.tokens_per_image + vision_language.EXAMPLE_TEXT
    ids = jax.ShapeDtypeStruct((batch, length), np.int32)
    pixels = (batch, cfg.num_channels, cfg.image_size, cfg.image_size)
    return {
        "input_ids": ids,
        "attention_mask": ids,
        "pixel_values": jax.ShapeDtypeStruct(pixels, np.float32),
    }


def prepare_inputs(config: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checks the processor's arrays, which the module takes as they are: square images.

    Args:
        config: the model's configuration, with `tokens_per_image`.
        inputs: the processor's arrays.

    Returns:
        The same arrays.

    Raises:
        ValueError: images and image tokens do not match.
    """
    pixels = inputs.get("pixel_values")
    num_images = 0 if pixels is None else len(pixels)
    vision_language.check_image_tokens(
        inputs["input_ids"],
        config.image_tokens,
        num_images,
        num_images * config.tokens_per_image,
        f"{config.tokens_per_image} per image "
        "(a processor without patch_size does not expand the image token)",
    )
    if pixels is not None and num_images:
        size = (config.vision.num_channels, config.vision.image_size, config.vision.image_size)
        if tuple(pixels.shape[1:]) != size:
            raise ValueError(
                f"pixel_values has shape {tuple(pixels.shape)}; expected [images, "
                f"{', '.join(map(str, size))}]"
            )
    return dict(inputs)


def patch_layout(
    config: Any, arrays: Mapping[str, np.ndarray], read_processor: Callable[[], Any]
) -> Layouts:
    """Lays out square grids; a class position has no cell, nor has a first patch that is left out.

    A crop or tile of a picture is a picture of its own.
    """
    count = config.tokens_per_image
    side = math.isqrt(count + 1)  # the square of patches, of which the first may be missing
    missing = max(side**2 - count, 0)
    inside = on_cells(config.vision, side)

    def cells(places: np.ndarray) -> np.ndarray:
        return np.concatenate([np.full(missing, -1), places[max(count - side**2, 0) :]])

    return [
        [
            patches.grid(cells(places), side, side, inside)
            for places in patches.equal_runs(row, config.image_tokens[0], count)
        ]
        for row in arrays["input_ids"]
    ]


def on_cells(vision: Any, side: int) -> patches.Box:
    """Returns where a picture is on its side x side cells: it reaches beyond them if they do not
    cover all of its pixels.

    Args:
        vision: configuration of the tower, with its image_size, its patch_size and its `side`.
        side: cells along a side, each of one or several patches.
    """
    covered = side * (vision.side // side) * vision.patch_size
    return 0.0, 0.0, vision.image_size / covered, vision.image_size / covered


def canonical_name(name: str, level: str = "vision_model.") -> str | None:
    """Converts a tensor's name in any known checkpoint to the port's; None for what is not used.

    The ports have the Hub's names. transformers 5 writes `model.vision_tower.`,
    `model.language_model.` (the decoder without its own `model.`) and `lm_head.`, and drops the
    `vision_model.` in the towers of CLIP and SigLIP; that of Pixtral has no such level. Not used
    are buffers, and the pooling head of SigLIP's tower. `level` is what the Hub's names of the
    tower have before its parts.
    """
    if name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")):
        return None
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if name.startswith("model."):
        name = name.removeprefix("model.")
        if name.startswith("language_model.") and not name.startswith("language_model.model."):
            name = name.replace("language_model.", "language_model.model.", 1)
    before, _, rest = name.partition("vision_tower.")
    if before or not rest or rest.startswith(("patch_conv.", "ln_pre.", "transformer.")):
        return name
    rest = rest.removeprefix(level)
    return None if rest.startswith("head.") else f"vision_tower.{level}{rest}"


def transformers_name(name: str) -> str:
    """Converts the port's name of a tensor to that in transformers 5 (see `canonical_name`)."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    name = name.replace("language_model.model.", "language_model.", 1)
    return "model." + name.replace("vision_tower.vision_model.", "vision_tower.", 1)
