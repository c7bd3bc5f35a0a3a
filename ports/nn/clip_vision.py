"""Vision towers: the blocks that CLIP and SigLIP share, and CLIP's.

I images, P patches (and the class position), D width, H heads.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ports import layers, sharding

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and constants of a transformer encoder (CLIP's, SigLIP's, BERT's)."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    hidden_act: str
    norm_eps: float

    @classmethod
    def from_hf(cls, config: Any) -> "EncoderConfig":
        """Reads a transformers CLIPVisionConfig, CLIPTextConfig or Idefics2VisionConfig."""
        layers.activation(config.hidden_act)
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"hidden_size {config.hidden_size} of the {config.model_type} is no multiple of "
                f"its {config.num_attention_heads} attention heads"
            )
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            hidden_act=config.hidden_act,
            norm_eps=config.layer_norm_eps,
        )


@dataclasses.dataclass(frozen=True)
class VisionConfig(EncoderConfig):
    """An encoder with the sizes of its images, in pixels."""

    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3

    @classmethod
    def from_hf(cls, config: Any, model_type: str = "clip_vision_model") -> "VisionConfig":
        """Reads the transformers configuration of a tower of that model_type.

        ValueError for another kind of tower, or for images or patches that are not square.
        """
        if config.model_type != model_type:
            raise ValueError(
                f"vision_config.model_type is {config.model_type!r}; "
                f"this port implements {model_type!r}"
            )
        for name in ("image_size", "patch_size"):
            if not isinstance(getattr(config, name), int):
                raise ValueError(
                    f"vision_config.{name} is {getattr(config, name)!r}; "
                    "expected one number, the side of a square"
                )
        return cls(
            **dataclasses.asdict(EncoderConfig.from_hf(config)),
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_channels=config.num_channels,
        )

    @property
    def side(self) -> int:
        """Patches along one side of a square image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one image, without the class position."""
        return self.side**2


class EncoderAttention(nn.Module):
    """Multi-head self-attention with biases, as in CLIP and SigLIP."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """x[I, P, D], mask bool[I or 1, 1, P or 1, P] or None -> [I, P, D]."""
        width = x.shape[-1]

        def heads(name: str) -> Array:
            y = layers.dense(width, True, self.dtype, name)(x)
            return sharding.heads(y.reshape(*x.shape[:2], self.num_heads, width // self.num_heads))

        y = layers.attend(heads("q_proj"), heads("k_proj"), heads("v_proj"), mask)
        y = sharding.heads(y)
        return layers.dense(width, True, self.dtype, "out_proj")(y.reshape(x.shape))


class EncoderLayer(nn.Module):
    """A pre-norm block of CLIP's and SigLIP's towers."""

    config: EncoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """x[I, P, D] -> [I, P, D]."""
        cfg = self.config
        y = layers.layer_norm(cfg.norm_eps, self.dtype, "layer_norm1")(x)
        y = EncoderAttention(cfg.num_heads, self.dtype, name="self_attn")(y, mask)
        x = sharding.residual(x + y)
        y = layers.layer_norm(cfg.norm_eps, self.dtype, "layer_norm2")(x)
        mlp = layers.MLP(cfg.intermediate_size, cfg.hidden_act, self.dtype, name="mlp")
        return sharding.residual(x + mlp(y))


class Encoder(nn.Module):
    """A stack of blocks that returns the states before the first and after each."""

    config: EncoderConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.layers = [EncoderLayer(self.config, self.dtype) for _ in range(self.config.num_layers)]

    def __call__(self, x: Array, mask: Array | None = None) -> tuple[Array, ...]:
        """x[I, P, D] -> num_layers + 1 states [I, P, D]."""
        states = [sharding.residual(x)]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        return tuple(states)


def embed_patches(config: VisionConfig, use_bias: bool, dtype: jnp.dtype, pixels: Array) -> Array:
    """pixels[I, 3, height, width], as the processors give them -> [I, P, D].

    The strided convolution of the calling module; pixels that fill no patch are left out.
    """
    patches = nn.Conv(
        config.hidden_size,
        (config.patch_size, config.patch_size),
        strides=(config.patch_size, config.patch_size),
        padding="VALID",
        use_bias=use_bias,
        dtype=dtype,
        name="patch_embedding",
    )(jnp.moveaxis(pixels, 1, -1).astype(dtype))
    return patches.reshape(len(pixels), -1, config.hidden_size)


class VisionEmbeddings(nn.Module):
    """Patches by a strided convolution, a class position in front, learnt positions added."""

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        """pixels[I, 3, height, width], as the processors give them -> [I, 1 + P, D]."""
        cfg = self.config
        patches = embed_patches(cfg, False, self.dtype, pixels)
        first = self.param("class_embedding", nn.initializers.normal(0.02), (cfg.hidden_size,))
        first = jnp.broadcast_to(first.astype(self.dtype), (len(pixels), 1, cfg.hidden_size))
        table = nn.Embed(
            cfg.num_patches + 1, cfg.hidden_size, dtype=self.dtype, name="position_embedding"
        )
        x = jnp.concatenate([first, patches], axis=1)
        return x + table(jnp.arange(x.shape[1]))


class VisionOutput(NamedTuple):
    """What a vision tower computes."""

    states: tuple[Array, ...]  # num_layers + 1 of [I, 1 + P, D]: before and after each layer
    pooled: Array  # [I, D]: the normed class position of the last layer, which CLIP projects


class CLIPVisionTransformer(nn.Module):
    """CLIP's vision tower (Radford et al. 2021)."""

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        cfg = self.config
        self.embeddings = VisionEmbeddings(cfg, self.dtype)
        # The misspelt name is the checkpoints'.
        self.pre_layrnorm = layers.layer_norm(cfg.norm_eps, self.dtype)
        self.encoder = Encoder(cfg, self.dtype)
        self.post_layernorm = layers.layer_norm(cfg.norm_eps, self.dtype)

    def __call__(self, pixels: Array) -> VisionOutput:
        """pixels[I, 3, height, width] -> the states of every layer and the pooled vector."""
        states = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return VisionOutput(states, self.post_layernorm(states[-1][:, 0]))


class CLIPVisionModel(nn.Module):
    """The level of nesting that the checkpoints' names have around the tower."""

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.vision_model = CLIPVisionTransformer(self.config, self.dtype)

    def __call__(self, pixels: Array) -> VisionOutput:
        """As CLIPVisionTransformer."""
        return self.vision_model(pixels)
