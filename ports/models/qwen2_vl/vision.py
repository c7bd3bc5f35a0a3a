"""The vision transformer of Qwen2-VL (Wang et al. 2024): any image size, rotary positions in 2-D.

F frames (an image has one, a video several), P patches per frame, E width, H heads, M the side of
the square of patches that becomes one token, D the decoder's width.

The patches of a frame have the processor's order: squares of M x M patches, row by row, and row by
row within a square. Every patch attends to the patches of its own frame.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ports.nn import layers
from ports.parallel import sharding

Array = jax.Array

# Sharding rules of the parameters.
AXES: sharding.Axes = {
    # Fused query, key and value: stored sharded by columns, resharded after the product.
    "attn.qkv": ("embed", "heads"),
    "attn.proj": ("heads", "embed"),
    "fc1": ("embed", "mlp"),
    "fc2": ("mlp", "embed"),
    "merger.mlp_0": ("embed", "mlp"),
    "merger.mlp_2": ("mlp", "embed"),
    **dict.fromkeys(("patch_embed.proj", "norm1", "norm2", "ln_q"), ()),
}
NORM_EPS = 1e-6  # not in the configuration


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes and constants of the tower."""

    width: int  # E
    num_layers: int
    num_heads: int
    mlp_width: int
    hidden_act: str
    num_channels: int
    patch_size: int  # pixels
    frames_per_patch: int  # consecutive frames in one patch; an image is repeated
    merge_size: int  # M
    output_size: int  # D
    rope_theta: float

    @classmethod
    def from_hf(cls, config: Any) -> "VisionConfig":
        """Reads a transformers Qwen2VLVisionConfig.

        Raises:
            ValueError: a value is not implemented.
        """
        layers.activation(config.hidden_act)
        for name in ("patch_size", "temporal_patch_size"):
            if not isinstance(getattr(config, name), int):
                raise ValueError(
                    f"vision_config.{name} is {getattr(config, name)!r}; expected one number"
                )
        rope = dict(getattr(config, "rope_parameters", None) or {})
        if rope.get("rope_type", "axial") != "axial":
            raise ValueError(f"vision_config has rope_type {rope['rope_type']!r}; expected 'axial'")
        if config.embed_dim % (4 * config.num_heads):
            raise ValueError(
                f"vision_config.embed_dim is {config.embed_dim}; expected a multiple of 4 x its "
                f"{config.num_heads} heads, for rotary embedding in 2-D"
            )
        return cls(
            width=config.embed_dim,
            num_layers=config.depth,
            num_heads=config.num_heads,
            mlp_width=int(config.embed_dim * config.mlp_ratio),
            hidden_act=config.hidden_act,
            num_channels=config.in_channels,
            patch_size=config.patch_size,
            frames_per_patch=config.temporal_patch_size,
            merge_size=config.spatial_merge_size,
            output_size=config.hidden_size,
            rope_theta=float(rope.get("rope_theta", 10_000.0)),
        )

    @property
    def patch_values(self) -> int:
        """Number of values in a flat patch."""
        return self.num_channels * self.frames_per_patch * self.patch_size**2


def patch_places(index: Array, width: Array, merge: int) -> tuple[Array, Array]:
    """Returns row and column of the patches at `index`, in a frame that is `width` patches wide."""
    square, inner = index // merge**2, index % merge**2
    row = square // (width // merge) * merge + inner // merge
    column = square % (width // merge) * merge + inner % merge
    return row, column


class PatchProjection(nn.Module):
    """A convolution with strides equal to its kernel's sides, as a product with flat patches."""

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, patches: Array) -> Array:
        """Maps patches[F, P, channels x frames x height x width] to [F, P, E]."""
        cfg = self.config
        sides = (cfg.num_channels, cfg.frames_per_patch, cfg.patch_size, cfg.patch_size)
        init = nn.initializers.lecun_normal(in_axis=(0, 1, 2, 3))
        kernel = self.param("kernel", init, (*sides, cfg.width))
        kernel = kernel.reshape(-1, cfg.width).astype(self.dtype)
        return patches.astype(self.dtype) @ kernel


class PatchEmbed(nn.Module):
    """Wraps the projection, for the extra level in the checkpoints' names."""

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, patches: Array) -> Array:
        """Calls PatchProjection."""
        return PatchProjection(self.config, self.dtype, name="proj")(patches)


class Attention(nn.Module):
    """Self-attention with fused projections."""

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, angles: tuple[Array, Array], mask: Array) -> Array:
        """Maps x[F, P, E] and mask bool[F, 1, 1 or P, P] to [F, P, E]."""
        cfg = self.config
        qkv = layers.dense(3 * cfg.width, True, self.dtype, "qkv")(x)
        qkv = qkv.reshape(*x.shape[:2], 3, cfg.num_heads, -1)
        query, key, value = (sharding.heads(qkv[:, :, i]) for i in range(3))
        query, key = layers.rotate(query, *angles), layers.rotate(key, *angles)
        y = sharding.heads(layers.attend(query, key, value, mask))
        return layers.dense(cfg.width, True, self.dtype, "proj")(y.reshape(x.shape))


class Block(nn.Module):
    """A pre-norm block."""

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, angles: tuple[Array, Array], mask: Array) -> Array:
        """Maps x[F, P, E] to [F, P, E]."""
        cfg = self.config
        y = layers.layer_norm(NORM_EPS, self.dtype, "norm1")(x)
        x = sharding.residual(x + Attention(cfg, self.dtype, name="attn")(y, angles, mask))
        y = layers.layer_norm(NORM_EPS, self.dtype, "norm2")(x)
        mlp = layers.MLP(cfg.mlp_width, cfg.hidden_act, self.dtype, name="mlp")
        return sharding.residual(x + mlp(y))


class Merger(nn.Module):
    """Merges M x M neighbouring patches, normalised and concatenated, into one decoder token."""

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x[F, P, E] to [F, P / M^2, D]."""
        cfg = self.config
        joined = cfg.width * cfg.merge_size**2
        x = layers.layer_norm(NORM_EPS, self.dtype, "ln_q")(x).reshape(len(x), -1, joined)
        x = layers.dense(joined, True, self.dtype, "mlp_0")(x)
        x = sharding.constrain(nn.gelu(x, approximate=False), "batch", "positions", "mlp")
        return sharding.residual(layers.dense(cfg.output_size, True, self.dtype, "mlp_2")(x))


class Qwen2Vision(nn.Module):
    """The tower and its merger."""

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        cfg = self.config
        self.patch_embed = PatchEmbed(cfg, self.dtype)
        self.blocks = [Block(cfg, self.dtype) for _ in range(cfg.num_layers)]
        self.merger = Merger(cfg, self.dtype)

    def __call__(self, patches: Array, places: tuple[Array, Array], mask: Array) -> Array:
        """Computes the features of patches.

        Args:
            patches: [F, P, values].
            places: row and column of each patch, int[F, P].
            mask: bool[F, 1, 1 or P, P], which patches see which.

        Returns:
            [F, P / M^2, D].
        """
        cfg = self.config
        # Half of the frequencies rotate with the row; the other half, the same values, with the
        # column.
        half = cfg.width // cfg.num_heads // 2
        frequencies = cfg.rope_theta ** -(jnp.arange(0, half, 2, dtype=jnp.float32) / half)
        turns = [place[..., None].astype(jnp.float32) * frequencies for place in places]
        turns = jnp.concatenate([*turns, *turns], axis=-1)
        angles = jnp.cos(turns), jnp.sin(turns)
        x = sharding.residual(self.patch_embed(patches))
        for block in self.blocks:
            x = block(x, angles, mask)
        return self.merger(x)
