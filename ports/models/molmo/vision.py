"""Molmo's vision backbone: a CLIP tower over crops, pooled two by two, projected.

B batch, C crops per row, R = B x C crops, P patches per crop, K = P / 4 pooled patches, E the
tower's width, D the decoder's width.

The processor returns flat patches. Crops whose values are all -1 are padding: their states are set
to zero, and their features are unused.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from ports.nn import attention, layers
from ports.parallel import sharding

Array = jax.Array

# Sharding rules of the parameters.
AXES: sharding.Axes = {
    **dict.fromkeys(("wq", "wk", "wv"), ("embed", "heads")),
    "wo": ("heads", "embed"),
    **dict.fromkeys(("w1", "w3"), ("embed", "mlp")),
    "w2": ("mlp", "embed"),
    **dict.fromkeys(("class_embedding", "patch_embedding", "positional_embedding"), ()),
    **dict.fromkeys(("pre_ln", "attention_norm", "ffn_norm", "pad_embed"), ()),
}
POOL = 2  # POOL x POOL patches become one feature


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes and constants of the backbone."""

    width: int  # E
    mlp_width: int
    num_layers: int
    num_heads: int
    norm_eps: float
    image_size: int  # pixels per side of a crop
    patch_size: int  # pixels per side of a patch
    feature_layers: tuple[int, ...]  # layers whose states are concatenated as features
    projector_width: int
    output_size: int  # D

    @property
    def grid(self) -> int:
        """Patches along a side of a crop."""
        return self.image_size // self.patch_size

    @property
    def pooled(self) -> int:
        """Pooled patches along a side of a crop; an odd grid is padded."""
        return -(-self.grid // POOL)


class Attention(nn.Module):
    """Multi-head attention with biases, from queries to other states."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, query: Array, states: Array) -> Array:
        """Maps query[R, Q, width] and states[R, P, width] to [R, Q, E]."""
        cfg = self.config

        def heads(name: str, x: Array) -> Array:
            y = layers.dense(cfg.width, True, self.dtype, name)(x)
            return sharding.heads(y.reshape(*x.shape[:2], cfg.num_heads, -1))

        y = attention.attend(heads("wq", query), heads("wk", states), heads("wv", states), None)
        y = attention.Heads(name="heads")(y)
        return layers.dense(cfg.width, True, self.dtype, "wo")(y)


class FeedForward(nn.Module):
    """w2(act(w1(x))), with OpenAI's approximate GELU."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x[R, P, E] to [R, P, E]."""
        y = layers.dense(self.config.mlp_width, True, self.dtype, "w1")(x)
        y = sharding.constrain(layers.quick_gelu(y), "batch", "positions", "mlp")
        return layers.dense(x.shape[-1], True, self.dtype, "w2")(y)


class ResidualBlock(nn.Module):
    """A pre-norm block."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x[R, P, E] to [R, P, E]."""
        cfg = self.config
        y = layers.layer_norm(cfg.norm_eps, self.dtype, "attention_norm")(x)
        x = sharding.residual(x + Attention(cfg, self.dtype, name="attention")(y, y))
        y = layers.layer_norm(cfg.norm_eps, self.dtype, "ffn_norm")(x)
        return sharding.residual(x + FeedForward(cfg, self.dtype, name="feed_forward")(y))


class Blocks(nn.Module):
    """A stack of blocks that returns the states after each block."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.resblocks = [
            ResidualBlock(self.config, self.dtype) for _ in range(self.config.num_layers)
        ]

    def __call__(self, x: Array) -> tuple[Array, ...]:
        """Maps x[R, P, E] to num_layers states [R, P, E]."""
        states = []
        for block in self.resblocks:
            x = block(x)
            states.append(x)
        return tuple(states)


class VisionTransformer(nn.Module):
    """CLIP's tower over flat patches, with a class position in front."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        cfg = self.config
        small = nn.initializers.normal(cfg.width**-0.5)
        self.patch_embedding = layers.dense(cfg.width, False, self.dtype)
        self.class_embedding = self.param("class_embedding", small, (cfg.width,))
        table = (cfg.grid**2 + 1, cfg.width)
        self.positional_embedding = self.param("positional_embedding", small, table)
        self.pre_ln = layers.layer_norm(cfg.norm_eps, self.dtype)
        self.transformer = Blocks(cfg, self.dtype)

    def __call__(self, patches: Array) -> tuple[Array, ...]:
        """Maps patches[R, P, values] to the states [R, 1 + P, E] after each layer."""
        x = self.patch_embedding(patches.astype(self.dtype))
        first = jnp.broadcast_to(self.class_embedding.astype(self.dtype), (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.positional_embedding.astype(self.dtype)
        return self.transformer(sharding.residual(self.pre_ln(x)))


class Projector(nn.Module):
    """w2(silu(w1(x)) * w3(x)), from the tower's width to the decoder's."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x[N, E] to [N, D]."""
        cfg = self.config
        gate = layers.dense(cfg.projector_width, False, self.dtype, "w1")(x)
        up = layers.dense(cfg.projector_width, False, self.dtype, "w3")(x)
        y = sharding.constrain(nn.silu(gate) * up, "batch", "mlp")
        return layers.dense(cfg.output_size, False, self.dtype, "w2")(y)


class VisionBackbone(nn.Module):
    """Tower, pooling and projector."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        cfg = self.config
        self.image_vit = VisionTransformer(cfg, self.dtype)
        self.image_pooling_2d = Attention(cfg, self.dtype)
        self.image_projector = Projector(cfg, self.dtype)
        width = len(cfg.feature_layers) * cfg.width
        # Added to patches that are entirely padding, and to those that are partly padding.
        self.pad_embed = self.param("pad_embed", nn.initializers.zeros, (2, width))

    def __call__(self, crops: Array, masks: Array) -> Array:
        """Computes the features of crops.

        Args:
            crops: float[B, C, P, values].
            masks: float[B, C, P], fraction of each patch covered by the image; -1 if unknown, which
                the model was trained to treat as partly padding.

        Returns:
            [B, C, K, D].
        """
        batch, count, num_patches, values = crops.shape
        flat = crops.reshape(-1, num_patches, values)
        states = self.image_vit(flat)
        joined = jnp.concatenate([states[i] for i in self.config.feature_layers], axis=-1)[:, 1:]
        fills_up = (flat == -1).all(axis=(1, 2))
        joined = jnp.where(fills_up[:, None, None], 0, joined)
        masks = masks.reshape(-1, num_patches, 1)
        empty, partial = masks == 0, (masks < 1) & (masks != 0)
        pad = self.pad_embed.astype(self.dtype)
        joined = joined + jnp.where(empty, pad[0], 0) + jnp.where(partial, pad[1], 0)
        squares = _squares(joined, self.config.grid)
        pooled = self.image_pooling_2d(squares.mean(axis=1, keepdims=True), squares)
        features = self.image_projector(pooled[:, 0])
        return features.reshape(batch, count, -1, features.shape[-1])


def _squares(x: Array, grid: int) -> Array:
    """Groups x[R, grid x grid, W] into squares of 2 x 2 patches [R x K, 4, W], row by row."""
    x = x.reshape(len(x), grid, grid, -1)
    if grid % POOL:
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    rows, side, _, width = x.shape
    x = x.reshape(rows, side // POOL, POOL, side // POOL, POOL, width)
    return jnp.swapaxes(x, 2, 3).reshape(-1, POOL * POOL, width)


def from_hf(config: Any) -> VisionConfig:
    """Reads a Molmo configuration.

    Raises:
        ValueError: a value is not implemented.
    """
    vision = config.vision_config
    height, width = vision["image_size"]
    patch, side = vision["patch_size"], vision["hidden_size"]
    if height != width or height % patch:
        raise ValueError(
            f"vision_config.image_size is {[height, width]}; expected a square, a multiple of the "
            f"patch_size {patch}"
        )
    if vision["num_positions"] != (height // patch) ** 2 + 1:
        raise ValueError(
            f"vision_config.num_positions is {vision['num_positions']}; expected "
            f"{(height // patch) ** 2 + 1}, as positions are not resized for other image sizes"
        )
    if vision["num_attention_heads"] * vision["head_dim"] != side:
        raise ValueError(
            f"vision_config has {vision['num_attention_heads']} heads of {vision['head_dim']}; "
            f"expected a product of {side}, its hidden_size"
        )
    for layer in vision["vit_layers"]:
        if not -vision["num_hidden_layers"] <= layer < vision["num_hidden_layers"]:
            raise ValueError(
                f"vision_config.vit_layers has layer {layer}; expected "
                f"{-vision['num_hidden_layers']} to {vision['num_hidden_layers'] - 1}"
            )
    return VisionConfig(
        width=side,
        mlp_width=vision["intermediate_size"],
        num_layers=vision["num_hidden_layers"],
        num_heads=vision["num_attention_heads"],
        norm_eps=vision["layer_norm_eps"],
        image_size=height,
        patch_size=patch,
        feature_layers=tuple(vision["vit_layers"]),
        projector_width=config.intermediate_size // 2,
        output_size=config.hidden_size,
    )
