"""Gemma 3 (Gemma Team 2025): a SigLIP tower, averaged features, a decoder with local layers.

B batch, T positions, D width, I images, P features per image.

The tokens of an image see each other both ways. Pan-and-scan crops are images like others.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from ports.models import llava_like
from ports.models.port import Port
from ports.nn import clip_vision, decoder, layers, siglip, vision_language
from ports.parallel import sharding

Array = jax.Array

# Sharding rules of the parameters.
AXES: sharding.Axes = {
    **decoder.AXES,
    **siglip.AXES,
    **dict.fromkeys(("mm_input_projection_weight", "mm_soft_emb_norm"), ()),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The values that the port needs from a transformers Gemma3Config."""

    text: decoder.DecoderConfig
    vision: clip_vision.VisionConfig
    image_tokens: tuple[int, ...]
    pool: int  # side of the square of patches that becomes one token

    @classmethod
    def from_hf(cls, config: Any) -> "Config":
        """Reads a transformers Gemma3Config.

        Raises:
            ValueError: a value is not implemented.
        """
        if config.text_config.use_bidirectional_attention:
            raise ValueError(
                "text_config.use_bidirectional_attention is true, which is not implemented; "
                "expected false, as in models that generate"
            )
        vision = clip_vision.VisionConfig.from_hf(config.vision_config, "siglip_vision_model")
        side = int(config.mm_tokens_per_image**0.5)
        if not side or side > vision.side or (vision.side // (vision.side // side)) != side:
            raise ValueError(
                f"mm_tokens_per_image is {config.mm_tokens_per_image}; expected a square to which "
                f"{vision.side} x {vision.side} patches can be averaged"
            )
        return cls(
            text=decoder.DecoderConfig.from_hf(
                config.text_config, bool(config.tie_word_embeddings), "gemma3_text"
            ),
            vision=vision,
            image_tokens=(config.image_token_index,),
            pool=vision.side // side,
        )

    @property
    def tokens_per_image(self) -> int:
        """Image tokens per image (or crop) in a prompt."""
        return (self.vision.side // self.pool) ** 2


class Projector(nn.Module):
    """Averages squares of patches, normalises, and maps the tower's width to the decoder's."""

    config: Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """Maps features[I, patches, tower width] to [I, P, D]."""
        cfg = self.config
        images, _, width = features.shape
        grid = features.reshape(images, cfg.vision.side, cfg.vision.side, width)
        pool = (cfg.pool, cfg.pool)
        # In bfloat16 the sum of a square would be rounded after each patch.
        pooled = nn.avg_pool(grid.astype(jnp.float32), pool, strides=pool)
        pooled = pooled.reshape(images, -1, width).astype(features.dtype)
        norm = layers.OffsetRMSNorm(cfg.vision.norm_eps, self.dtype, name="mm_soft_emb_norm")
        kernel = self.param(
            "mm_input_projection_weight",
            nn.initializers.zeros,
            (width, cfg.text.hidden_size),
        )
        return norm(pooled) @ kernel.astype(self.dtype)


class Gemma3(llava_like.LlavaLike):
    """Replaces image tokens by the projected features of the tower."""

    config: Config
    axes = AXES

    def setup(self):
        self.vision_tower = siglip.SiglipVisionModel(self.config.vision, self.dtype)
        self.multi_modal_projector = Projector(self.config, self.dtype)
        self.language_model = decoder.CausalLM(self.config.text, self.dtype)

    def image_features(self, pixels: Array) -> Array:
        """Maps pixels[I, 3, height, width] to the decoder's inputs [I, P, D]."""
        return self.multi_modal_projector(self.vision_tower.vision_model(pixels))

    def blocks(self, inputs: vision_language.Inputs) -> Array:
        """Numbers the runs of image tokens in each row, int[B, T]; -1 elsewhere."""
        is_image = vision_language.is_image(
            jnp.asarray(inputs["input_ids"]), self.config.image_tokens
        )
        before = jnp.pad(is_image, ((0, 0), (1, 0)))[:, :-1]
        return jnp.where(is_image, jnp.cumsum(is_image & ~before, axis=1), -1)


PORT = Port(
    config=Config,
    module=Gemma3,
    inputs=("input_ids", "attention_mask", "position_ids", "pixel_values"),
    example_inputs=llava_like.example_inputs,
    prepare_inputs=llava_like.prepare_inputs,
    canonical_name=llava_like.canonical_name,
    transformers_name=llava_like.transformers_name,
    pieces=("pixel_values",),  # crops of pan and scan
    patch_layout=llava_like.patch_layout,
)
