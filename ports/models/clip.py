"""CLIP (Radford et al. 2021): an image tower and a text tower with a shared embedding space.

B texts, T positions, I images, D width, E width of the shared space.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from ports import checkpoint
from ports.checkpoint import hub
from ports.inputs import vocabulary
from ports.inputs.model_inputs import check_length
from ports.nn import clip_vision, encoder, layers
from ports.parallel import compiled
from ports.programs import keep_programs

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TextConfig(encoder.EncoderConfig):
    """Sizes of the text tower: an encoder with a vocabulary."""

    vocab_size: int = 0
    max_positions: int = 77
    eos_token: int = 2

    @classmethod
    def from_hf(cls, config: Any) -> "TextConfig":
        """Reads a transformers CLIPTextConfig."""
        return cls(
            **dataclasses.asdict(encoder.EncoderConfig.from_hf(config)),
            vocab_size=config.vocab_size,
            max_positions=config.max_position_embeddings,
            eos_token=config.eos_token_id,
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """The values that the port needs from a transformers CLIPConfig."""

    text: TextConfig
    vision: clip_vision.VisionConfig
    projection_dim: int

    @classmethod
    def from_hf(cls, config: Any) -> "Config":
        """Reads a transformers CLIPConfig."""
        return cls(
            text=TextConfig.from_hf(config.text_config),
            vision=clip_vision.VisionConfig.from_hf(config.vision_config),
            projection_dim=config.projection_dim,
        )


class TextEmbeddings(nn.Module):
    """Token and position embeddings."""

    config: TextConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Maps tokens int[B, T] to [B, T, D]."""
        cfg = self.config
        check_length(tokens, cfg.max_positions)

        def table(size: int, name: str) -> nn.Embed:
            return nn.Embed(size, cfg.hidden_size, dtype=self.dtype, name=name)

        positions = table(cfg.max_positions, "position_embedding")(jnp.arange(tokens.shape[1]))
        return table(cfg.vocab_size, "token_embedding")(tokens) + positions


class TextTransformer(nn.Module):
    """CLIP's text tower: a causal encoder, read out at the end-of-text token."""

    config: TextConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        cfg = self.config
        self.embeddings = TextEmbeddings(cfg, self.dtype)
        self.encoder = encoder.Encoder(cfg, self.dtype)
        self.final_layer_norm = layers.layer_norm(cfg.norm_eps, self.dtype)

    def __call__(self, tokens: Array, attention_mask: Array) -> Array:
        """Maps tokens and attention_mask int[B, T], padded on the right, to [B, D]."""
        length = tokens.shape[1]
        mask = attention_mask.astype(bool)[:, None, None, :] & jnp.tri(length, dtype=bool)
        states = self.final_layer_norm(self.encoder(self.embeddings(tokens), mask)[-1])
        if self.config.eos_token == 2:
            # Old configurations say 2, but the end-of-text token is the one with the highest id.
            end = jnp.argmax(tokens, axis=-1)
        else:
            end = jnp.argmax(tokens == self.config.eos_token, axis=-1)
        return jnp.take_along_axis(states, end[:, None, None], axis=1)[:, 0]


class CLIP(nn.Module):
    """The dual encoder, with the parameter names of transformers' CLIPModel."""

    config: Config
    dtype: DTypeLike = jnp.float32

    def setup(self):
        cfg = self.config
        self.text_model = TextTransformer(cfg.text, self.dtype)
        self.vision_model = clip_vision.CLIPVisionTransformer(cfg.vision, self.dtype)
        self.text_projection = layers.dense(cfg.projection_dim, False, self.dtype)
        self.visual_projection = layers.dense(cfg.projection_dim, False, self.dtype)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(np.log(1 / 0.07)), ())

    def embed_text(self, tokens: Array, attention_mask: Array) -> Array:
        """Maps tokens and attention_mask int[B, T] to unit vectors float32[B, E]."""
        return _unit(self.text_projection(self.text_model(tokens, attention_mask)))

    def embed_images(self, pixels: Array) -> Array:
        """Maps pixels[I, 3, height, width] to unit vectors float32[I, E]."""
        return _unit(self.visual_projection(self.vision_model(pixels).pooled))

    def __call__(self, tokens: Array, attention_mask: Array, pixels: Array) -> Array:
        """Computes the scaled cosine of every text with every image, float32[B, I]."""
        text = self.embed_text(tokens, attention_mask)
        return jnp.exp(self.logit_scale) * text @ self.embed_images(pixels).T


def _unit(x: Array) -> Array:
    # In float32, whatever the towers' dtype: cosines of similar pairs differ only slightly.
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def example_inputs(config: Config) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns shapes of one text and one image, to trace initialisation with."""
    size = config.vision.image_size
    ids = jax.ShapeDtypeStruct((1, min(8, config.text.max_positions)), np.int32)
    pixels = jax.ShapeDtypeStruct((1, config.vision.num_channels, size, size), np.float32)
    return ids, ids, pixels


@dataclasses.dataclass(frozen=True)
class DualEncoder:
    """A CLIP model with its parameters, made by `load`."""

    module: CLIP
    params: dict
    directory: Path

    @functools.cached_property
    def processor(self) -> Any:
        """The checkpoint's processor, from transformers."""
        from transformers import AutoProcessor

        checkpoint.require_tokenizer(self.directory)
        with checkpoint.loading(self.directory, "processor"):
            # The PIL backend needs neither torch nor torchvision; remote code is never run.
            processor = AutoProcessor.from_pretrained(
                self.directory, backend="pil", trust_remote_code=False
            )
        size = self.module.config.text.vocab_size
        vocabulary.warn_of_longer_tokenizer(processor.tokenizer, size, (), self.directory)
        return processor

    def embed_text(self, tokens: Array | np.ndarray, attention_mask: Array | np.ndarray) -> Array:
        """Embeds texts.

        Args:
            tokens: int[B, T], padded on the right.
            attention_mask: int[B, T].

        Returns:
            Unit vectors, float32[B, E].

        Raises:
            ValueError: a token id is outside the vocabulary, or the texts are too long.
        """
        vocabulary.check_ids(np.asarray(tokens), self.module.config.text.vocab_size)
        mask = jnp.asarray(attention_mask)
        return _embed_text(self.module, self.params, jnp.asarray(tokens), mask)

    def embed_images(self, pixels: Array | np.ndarray) -> Array:
        """Maps pixels[I, 3, height, width] to unit vectors float32[I, E].

        Raises:
            ValueError: the images are not of the tower's size.
        """
        return _embed_images(self.module, self.params, jnp.asarray(pixels))


@compiled.program()
def _embed_text(module: CLIP, params: dict, tokens: Array, attention_mask: Array) -> Array:
    return module.bind({"params": params}).embed_text(tokens, attention_mask)


@compiled.program()
def _embed_images(module: CLIP, params: dict, pixels: Array) -> Array:
    return module.bind({"params": params}).embed_images(pixels)


def canonical_name(name: str) -> str | None:
    """Converts a tensor's name in the file to the port's; None for buffers."""
    return None if name.endswith("position_ids") else name


def load_dual_encoder(directory: str | Path, *, dtype: str = "float32") -> DualEncoder:
    """Loads a checkpoint of model_type clip.

    Args:
        directory: a directory, or a repository id on the Hub.
        dtype: dtype of the parameters and the computation: "float32", "bfloat16" or "float16".

    Returns:
        The model with its parameters.

    Raises:
        FileNotFoundError: as for `ports.load`.
        ValueError: as for `ports.load`.
    """
    keep_programs()
    kind = checkpoint.read_dtype(dtype)
    directory = hub.find_directory(directory)
    config = checkpoint.read_config(directory, ("clip",))
    module = CLIP(Config.from_hf(config), dtype=kind)
    abstract = jax.eval_shape(module.init, jax.random.key(0), *example_inputs(module.config))
    params = checkpoint.load_params(directory, abstract["params"], canonical_name, dtype=kind)
    return DualEncoder(module, params, directory)


load = load_dual_encoder  # the name in earlier releases
