"""Molmo2 (Clark et al. 2026): whole picture and crops, attention pooling, Qwen3 or OLMo decoder.

B batch, T positions, D width, R crops (or frames), P patches per crop, F features, K patches of a
feature.

Features are added to the embeddings of the patch tokens. All tokens of the pictures in a row
(patches, and those that begin and end pictures and lines) see each other both ways.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from ports.models.molmo2 import vision
from ports.models.molmo2.config import Config
from ports.models.molmo2.inputs import (
    KINDS,
    example_inputs,
    kind_of,
    patch_layout,
    prepare_inputs,
)
from ports.models.molmo2.processor import read_processor
from ports.models.molmo2.stored import canonical_name, rearrange
from ports.models.port import Port
from ports.nn import decoder, layers, vision_language
from ports.parallel import sharding

Array = jax.Array

# Sharding rules of the parameters.
AXES: sharding.Axes = {**vision.AXES, **decoder.AXES}


class Backbone(nn.Module):
    """Wraps everything but the head, for the extra level in transformers' names."""

    config: Config
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.vision_tower = vision.Tower(self.config, self.dtype)
        self.multi_modal_projector = vision.Projector(self.config, self.dtype)
        self.language_model = decoder.Decoder(self.config.text, self.dtype)


class Molmo2(vision_language.VisionLanguageModel):
    """Adds the features of crops to the embeddings of the patch tokens."""

    config: Config
    decoder_path = ("model", "language_model")
    head_path = ("lm_head",)
    axes = AXES

    def setup(self):
        self.model = Backbone(self.config, self.dtype)
        self.lm_head = layers.head(self.config.text.vocab_size, self.dtype)

    @property
    def text_decoder(self) -> decoder.Decoder:
        """The decoder, Qwen3's or OLMo's."""
        return self.model.language_model

    def unembed(self, x: Array) -> Array:
        """Maps x[..., D] to logits float32[..., V] with the head only."""
        return sharding.logits(self.lm_head(x))

    def image_features(self, pixels: Array, pooling: Array) -> Array:
        """Maps patches[R, P, values] and the patches int[F, K] of features to [F, D]."""
        states = self.model.vision_tower(pixels)
        # A negative layer counts from the last one's output, which is the last of the states.
        chosen = [states[i + 1 if i >= 0 else i] for i in self.config.feature_layers]
        return self.model.multi_modal_projector(jnp.concatenate(chosen, axis=-1), pooling)

    def embed_inputs(self, inputs: vision_language.Inputs) -> Array:
        """Maps input_ids int[B, T] and optional patches and pooling (see KINDS) to [B, T, D]."""
        tokens = jnp.asarray(inputs["input_ids"])
        x = self.text_decoder.embed_tokens(tokens)
        kind = kind_of(inputs)
        if kind is None:
            return x
        pixels, pooling = (jnp.asarray(inputs[name]) for name in kind[:2])
        features, real = self.image_features(pixels, pooling), (pooling >= 0).any(-1)
        is_patch = tokens == self.config.image_tokens[0]
        return x + vision_language.place_images(jnp.zeros_like(x), is_patch, features, real)

    def blocks(self, inputs: vision_language.Inputs) -> Array:
        """Returns int[B, T], 0 at all tokens of pictures, and -1 elsewhere."""
        tokens = jnp.asarray(inputs["input_ids"])
        return jnp.where(vision_language.is_image(tokens, self.config.image_tokens), 0, -1)


PORT = Port(
    config=Config,
    module=Molmo2,
    inputs=("input_ids", "attention_mask", "position_ids", *KINDS[0], *KINDS[1]),
    example_inputs=example_inputs,
    prepare_inputs=prepare_inputs,
    canonical_name=canonical_name,
    read_processor=read_processor,
    takes_videos=True,
    pieces=KINDS[0][:1],
    patch_layout=patch_layout,
    rearrange=rearrange,
)
