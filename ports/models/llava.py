"""LLaVA-1.5 (Liu et al. 2023): a CLIP tower, a two-layer projector, a Llama decoder.

B batch, T positions, D width, I images, P patches per image.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ports import checkpoint
from ports.inputs import patch_layout as patches
from ports.inputs.patch_layout import Layouts
from ports.models.port import Port
from ports.nn import clip_vision as vision
from ports.nn import decoder, layers, vision_language
from ports.parallel import sharding

Array = jax.Array

# Sharding rules of the parameters.
AXES: sharding.Axes = {
    **decoder.AXES,
    **vision.AXES,
    "linear_1": ("embed", "mlp"),
    "linear_2": ("mlp", "embed"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The values that the port needs from a transformers LlavaConfig."""

    text: decoder.DecoderConfig
    vision: vision.VisionConfig
    image_tokens: tuple[int, ...]
    feature_layers: tuple[int, ...]
    keep_class_position: bool
    projector_act: str
    projector_bias: bool

    @classmethod
    def from_hf(cls, config: Any) -> "Config":
        """Reads a transformers LlavaConfig.

        Raises:
            ValueError: a value is not implemented.
        """
        strategy = config.vision_feature_select_strategy
        if strategy not in ("default", "full"):
            raise ValueError(
                f"vision_feature_select_strategy is {strategy!r}; expected 'default' or 'full'"
            )
        tower = vision.VisionConfig.from_hf(config.vision_config)
        chosen = config.vision_feature_layer
        chosen = (chosen,) if isinstance(chosen, int) else tuple(chosen)
        for layer in chosen:
            if not -tower.num_layers - 1 <= layer <= tower.num_layers:
                raise ValueError(
                    f"vision_feature_layer is {layer}; the vision tower has {tower.num_layers} "
                    f"layers, expected {-tower.num_layers - 1} to {tower.num_layers}"
                )
        layers.activation(config.projector_hidden_act)
        # Older checkpoints have it in text_config, newer ones at the top level.
        tied = bool(config.tie_word_embeddings or config.text_config.tie_word_embeddings)
        return cls(
            text=decoder.DecoderConfig.from_hf(config.text_config, tied, "llama"),
            vision=tower,
            image_tokens=(config.image_token_index,),
            feature_layers=chosen,
            keep_class_position=strategy == "full",
            projector_act=config.projector_hidden_act,
            projector_bias=config.multimodal_projector_bias,
        )

    @property
    def tokens_per_image(self) -> int:
        """Image tokens per image in a prompt."""
        return self.vision.num_patches + self.keep_class_position


class Projector(nn.Module):
    """Two-layer perceptron from the tower's width to the decoder's."""

    config: Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """Maps features[I, P, tower width x chosen layers] to [I, P, D]."""
        cfg = self.config

        def linear(name: str) -> nn.Dense:
            return layers.dense(cfg.text.hidden_size, cfg.projector_bias, self.dtype, name)

        return linear("linear_2")(
            layers.activation(cfg.projector_act)(linear("linear_1")(features))
        )


# The processor's arrays that the port uses; the rest are ignored.
INPUTS = ("input_ids", "attention_mask", "position_ids", "pixel_values")


class Llava(vision_language.VisionLanguageModel):
    """Replaces image tokens by the projected features of the chosen layers of the tower."""

    config: Config
    decoder_path = ("language_model", "model")
    head_path = ("language_model", "lm_head")
    axes = AXES

    def setup(self):
        self.vision_tower = vision.CLIPVisionModel(self.config.vision, self.dtype)
        self.multi_modal_projector = Projector(self.config, self.dtype)
        self.language_model = decoder.CausalLM(self.config.text, self.dtype)

    @property
    def text_decoder(self) -> decoder.Decoder:
        """The Llama decoder."""
        return self.language_model.model

    def unembed(self, x: Array) -> Array:
        """Maps x[..., D] to logits float32[..., V] with the head only."""
        return self.language_model.unembed(x)

    def image_features(self, pixels: Array) -> Array:
        """Maps pixels[I, 3, height, width] to the decoder's inputs [I, P, D]."""
        states = self.vision_tower(pixels).states
        features = jnp.concatenate([states[i] for i in self.config.feature_layers], axis=-1)
        if not self.config.keep_class_position:
            features = features[:, 1:]
        return self.multi_modal_projector(features)

    def embed_inputs(self, inputs: vision_language.Inputs) -> Array:
        """Maps input_ids int[B, T] and optional pixel_values[I, 3, height, width] to [B, T, D]."""
        tokens = jnp.asarray(inputs["input_ids"])
        is_image = vision_language.is_image(tokens, self.config.image_tokens)
        # The image token may be outside the embedding table.
        x = self.text_decoder.embed_tokens(jnp.where(is_image, 0, tokens))
        if inputs.get("pixel_values") is None:
            return x
        features = self.image_features(jnp.asarray(inputs["pixel_values"]))
        return vision_language.place_images(x, is_image, features.reshape(-1, features.shape[-1]))


def example_inputs(config: Config, batch: int = 1, length: int | None = None) -> dict[str, Any]:
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


def prepare_inputs(config: Config, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checks the processor's arrays, which the module takes as they are.

    Args:
        config: the model's configuration.
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


def complete_processor(processor: Any, config: Config, directory: Path) -> None:
    """Sets the image-token settings that a processor's files lack, from config.json.

    Before 2025, transformers expanded the image token in the model, and checkpoints had no
    processor_config.json, or one with fewer values. Values in the file are kept.

    Args:
        processor: the processor from transformers; changed in place.
        config: the model's configuration.
        directory: the checkpoint.
    """
    file = directory / "processor_config.json"
    said = checkpoint.read_json(file) if file.exists() else {}
    for name, value in {
        "patch_size": config.vision.patch_size,
        "vision_feature_select_strategy": "full" if config.keep_class_position else "default",
        "num_additional_image_tokens": 1,  # the class position of CLIP's tower
    }.items():
        if said.get(name) is None:
            setattr(processor, name, value)


def canonical_name(name: str) -> str | None:
    """Converts a tensor's name in any known checkpoint to the port's; None for buffers.

    The port has the Hub's names. transformers 5 writes `model.vision_tower.`,
    `model.language_model.` (the decoder without its own `model.`) and `lm_head.`, and drops the
    `vision_model.` in the tower.
    """
    if name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")):
        return None
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if name.startswith("model."):
        name = name.removeprefix("model.")
        if name.startswith("language_model.") and not name.startswith("language_model.model."):
            name = name.replace("language_model.", "language_model.model.", 1)
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name


def transformers_name(name: str) -> str:
    """Converts the port's name of a tensor to that in transformers 5 (see `canonical_name`)."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    name = name.replace("language_model.model.", "language_model.", 1)
    return "model." + name.replace("vision_tower.vision_model.", "vision_tower.", 1)


def patch_layout(
    config: Config, arrays: Mapping[str, np.ndarray], read_processor: Callable[[], Any]
) -> Layouts:
    """Lays out square grids of patches; a class position, where the model keeps it, has no cell."""
    side = math.isqrt(config.vision.num_patches)
    return [
        [
            patches.grid(places[-(side**2) :], side, side)
            for places in patches.equal_runs(row, config.image_tokens[0], config.tokens_per_image)
        ]
        for row in arrays["input_ids"]
    ]


PORT = Port(
    config=Config,
    module=Llava,
    inputs=INPUTS,
    example_inputs=example_inputs,
    prepare_inputs=prepare_inputs,
    canonical_name=canonical_name,
    transformers_name=transformers_name,
    complete_processor=complete_processor,
    patch_layout=patch_layout,
)
