"""CLIP's vision tower.

I images, P patches (and the class position), D width, H heads.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ports.nn import encoder, layers
from ports.nn.encoder import Encoder, EncoderConfig
from ports.parallel import sharding

Array = jax.Array

# Where the parameters lie on a mesh.
AXES: sharding.Axes = {
    **encoder.AXES,
    **dict.fromkeys(("class_embedding", "patch_embedding", "position_embedding"), ()),
    **dict.fromkeys(("pre_layrnorm", "post_layernorm"), ()),
}


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
