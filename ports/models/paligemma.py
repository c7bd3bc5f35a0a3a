"""PaliGemma 1 and 2 (Beyer et al. 2024; Steiner et al. 2024): a SigLIP tower, a Gemma decoder.

B batch, T positions, D width, I images, P patches per image.

All tokens of a prompt see each other both ways (prefix-LM); those of the answer see what is before
them.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from ports.intervene import edits
from ports.models import llava_like
from ports.models.port import Port
from ports.nn import clip_vision, decoder, layers, siglip, vision_language
from ports.parallel import sharding

Array = jax.Array

# Sharding rules of the parameters.
AXES: sharding.Axes = {
    **decoder.AXES,
    **siglip.AXES,
    "linear": ("embed", "mlp"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The values that the port needs from a transformers PaliGemmaConfig."""

    text: decoder.DecoderConfig
    vision: clip_vision.VisionConfig
    image_tokens: tuple[int, ...]

    @classmethod
    def from_hf(cls, config: Any) -> "Config":
        """Reads a transformers PaliGemmaConfig.

        Raises:
            ValueError: a value is not implemented.
        """
        text = decoder.DecoderConfig.from_hf(
            config.text_config, bool(config.tie_word_embeddings), "gemma", "gemma2"
        )
        if config.projection_dim != text.hidden_size:
            raise ValueError(
                f"projection_dim is {config.projection_dim}; expected the decoder's width, "
                f"{text.hidden_size}"
            )
        return cls(
            # The window of PaliGemma 2 does not limit what the prompt's tokens see of each other.
            text=dataclasses.replace(text, window_limits_blocks=False),
            vision=clip_vision.VisionConfig.from_hf(config.vision_config, "siglip_vision_model"),
            image_tokens=(config.image_token_index,),
        )

    @property
    def tokens_per_image(self) -> int:
        """Image tokens per image in a prompt."""
        return self.vision.num_patches


class Projector(nn.Module):
    """A linear map from the tower's width to the decoder's."""

    config: Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """Maps features[I, P, tower width] to [I, P, D]."""
        return layers.dense(self.config.text.hidden_size, True, self.dtype, "linear")(features)


class PaliGemma(llava_like.LlavaLike):
    """Replaces image tokens by the projected features of the tower."""

    config: Config
    axes = AXES
    prefix_lm = True

    def setup(self):
        self.vision_tower = siglip.SiglipVisionModel(self.config.vision, self.dtype)
        self.multi_modal_projector = Projector(self.config, self.dtype)
        self.language_model = decoder.CausalLM(self.config.text, self.dtype)

    def image_features(self, pixels: Array) -> Array:
        """Maps pixels[I, 3, height, width] to the decoder's inputs [I, P, D]."""
        return self.multi_modal_projector(self.vision_tower.vision_model(pixels))

    def positions(self, inputs: vision_language.Inputs) -> Array:
        """Returns the rotary positions of the tokens, int32[B, T]: they count from one.

        Only differences matter, but rounding then is that of transformers.
        """
        return super().positions(inputs) + (inputs.get("position_ids") is None)

    def blocks(self, inputs: vision_language.Inputs) -> Array:
        """Returns int[B, T]: 0 at the tokens of the prompt, -1 at padding and in the answer.

        The answer, if the inputs hold one, is where token_type_ids int[B, T] are 1, as the
        processor returns them for a suffix, or where position_kinds say so (see `places`).
        """
        mask = vision_language.attention_mask(inputs) != 0
        if mask.ndim == 3:
            mask = jnp.diagonal(mask, axis1=1, axis2=2)
        types, kinds = inputs.get("token_type_ids"), inputs.get("position_kinds")
        if types is not None:
            mask &= jnp.asarray(types) == 0
        if kinds is not None:
            mask &= jnp.asarray(kinds) != edits.GENERATED
        return jnp.where(mask, 0, -1)


# Of its checkpoints, which have none: the processor itself adds what marks a prompt's ends.
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def complete_processor(processor: Any, config: Config, directory: Path) -> None:
    """Gives a processor without a chat template one that writes images and text alone."""
    if processor.chat_template is None and processor.tokenizer.chat_template is None:
        processor.chat_template = TEMPLATE


PORT = Port(
    config=Config,
    module=PaliGemma,
    inputs=("input_ids", "attention_mask", "position_ids", "token_type_ids", "pixel_values"),
    example_inputs=llava_like.example_inputs,
    prepare_inputs=llava_like.prepare_inputs,
    canonical_name=llava_like.canonical_name,
    transformers_name=llava_like.transformers_name,
    complete_processor=complete_processor,
    patch_layout=llava_like.patch_layout,
    per_position={"token_type_ids": 0},
)
