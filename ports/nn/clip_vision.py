"""CLIP's vision tower.

I images, P patches (not counting the class position), D width, H heads.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from ports.nn import encoder, layers
from ports.nn.encoder import Encoder, EncoderConfig
from ports.parallel import sharding

Array = jax.Array

# Sharding rules of the parameters.
AXES: sharding.Axes = {
    **encoder.AXES,
    **dict.fromkeys(("class_embedding", "patch_embedding", "position_embedding"), ()),
    **dict.fromkeys(("pre_layrnorm", "post_layernorm"), ()),
}


@dataclasses.dataclass(frozen=True)
class VisionConfig(EncoderConfig):
    """Sizes of an encoder and its images; image and patch sizes in pixels."""

    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3

    @classmethod
    def from_hf(cls, config: Any, model_type: str = "clip_vision_model") -> "VisionConfig":
        """Reads the transformers configuration of a vision tower.

        Args:
            config: the tower's configuration.
            model_type: its expected model_type.

        Raises:
            ValueError: another model_type, or images or patches that are not square.
        """
        if config.model_type != model_type:
            raise ValueError(
                f"vision_config.model_type is {config.model_type!r}; expected {model_type!r}"
            )
        for name in ("image_size", "patch_size"):
            if not isinstance(getattr(config, name), int):
                raise ValueError(
                    f"vision_config.{name} is {getattr(config, name)!r}; "
                    "expected a single number, the side of a square"
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


def embed_patches(
    config: VisionConfig,
    use_bias: bool,
    dtype: DTypeLike,
    pixels: Array,
    name: str = "patch_embedding",
) -> Array:
    """Embeds pixels[I, 3, height, width] as patches [I, P, D], with a convolution in the caller.

    Pixels at the border that do not fill a patch are ignored.
    """
    patches = nn.Conv(
        config.hidden_size,
        (config.patch_size, config.patch_size),
        strides=(config.patch_size, config.patch_size),
        padding="VALID",
        use_bias=use_bias,
        dtype=dtype,
        name=name,
    )(jnp.moveaxis(pixels, 1, -1).astype(dtype))
    return patches.reshape(len(pixels), -1, config.hidden_size)


class VisionEmbeddings(nn.Module):
    """Embeds patches by a strided convolution, prepends a class position, adds learnt positions."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        """Maps the processor's pixels[I, 3, height, width] to [I, 1 + P, D].

        Raises:
            ValueError: images of another size have no learnt positions.
        """
        cfg = self.config
        height, width = pixels.shape[2:]
        if (height // cfg.patch_size, width // cfg.patch_size) != (cfg.side, cfg.side):
            raise ValueError(
                f"images are {height} x {width} pixels; expected {cfg.image_size} x "
                f"{cfg.image_size}, as the processor makes them"
            )
        patches = embed_patches(cfg, False, self.dtype, pixels)
        first = self.param("class_embedding", nn.initializers.normal(0.02), (cfg.hidden_size,))
        first = jnp.broadcast_to(first.astype(self.dtype), (len(pixels), 1, cfg.hidden_size))
        table = nn.Embed(
            cfg.num_patches + 1, cfg.hidden_size, dtype=self.dtype, name="position_embedding"
        )
        x = jnp.concatenate([first, patches], axis=1)
        return x + table(jnp.arange(x.shape[1]))


class VisionOutput(NamedTuple):
    """Output of a vision tower."""

    states: tuple[Array, ...]  # num_layers + 1 of [I, 1 + P, D]: before and after each layer
    pooled: Array  # [I, D]: the normalised class position of the last layer, which CLIP projects


class CLIPVisionTransformer(nn.Module):
    """CLIP's vision tower (Radford et al. 2021)."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        cfg = self.config
        self.embeddings = VisionEmbeddings(cfg, self.dtype)
        # The misspelling is the checkpoints'.
        self.pre_layrnorm = layers.layer_norm(cfg.norm_eps, self.dtype)
        self.encoder = Encoder(cfg, self.dtype)
        self.post_layernorm = layers.layer_norm(cfg.norm_eps, self.dtype)

    def __call__(self, pixels: Array) -> VisionOutput:
        """Maps pixels[I, 3, height, width] to the states of every layer and the pooled vector."""
        states = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return VisionOutput(states, self.post_layernorm(states[-1][:, 0]))


class CLIPVisionModel(nn.Module):
    """Wraps the tower, for the extra level in the checkpoints' names."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.vision_model = CLIPVisionTransformer(self.config, self.dtype)

    def __call__(self, pixels: Array) -> VisionOutput:
        """Calls CLIPVisionTransformer."""
        return self.vision_model(pixels)
