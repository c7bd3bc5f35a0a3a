"""Molmo2's tower over flat patches, and the pooling of its patches to features.

R crops (or frames), P patches per crop, E the tower's width, F features, K patches of a feature, D
the decoder's width.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from ports.models.molmo2.config import Config, HeadSizes
from ports.nn import attention, encoder, layers
from ports.parallel import sharding

Array = jax.Array

# Sharding rules of the parameters.
AXES: sharding.Axes = {
    **encoder.AXES,
    "o_proj": ("heads", "embed"),
    **dict.fromkeys(("patch_embedding", "positional_embedding"), ()),
}


class Attention(nn.Module):
    """Attention from queries to other states, without positions."""

    sizes: HeadSizes
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, query: Array, states: Array, mask: Array | None = None) -> Array:
        """Maps query[N, Q, width], states[N, S, width], mask bool[N, 1, 1, S] to [N, Q, E]."""
        cfg = self.sizes

        def heads(name: str, count: int, x: Array) -> Array:
            y = layers.dense(count * cfg.head_dim, cfg.use_bias, self.dtype, name)(x)
            return sharding.heads(y.reshape(*x.shape[:2], count, cfg.head_dim))

        asked = heads("q_proj", cfg.num_heads, query)
        key = heads("k_proj", cfg.num_kv_heads, states)
        value = heads("v_proj", cfg.num_kv_heads, states)
        y = attention.Heads(name="heads")(attention.attend(asked, key, value, mask))
        return layers.dense(cfg.width, cfg.use_bias, self.dtype, "o_proj")(y)


class Block(nn.Module):
    """A pre-norm block of the tower."""

    config: Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x[R, P, E] to [R, P, E]."""
        cfg = self.config
        y = layers.layer_norm(cfg.tower_eps, self.dtype, "layer_norm1")(x)
        x = sharding.residual(x + Attention(cfg.tower, self.dtype, name="self_attn")(y, y))
        y = layers.layer_norm(cfg.tower_eps, self.dtype, "layer_norm2")(x)
        mlp = layers.MLP(cfg.tower_mlp, cfg.tower_act, self.dtype, name="mlp")
        return sharding.residual(x + mlp(y))


class Tower(nn.Module):
    """The vision tower over flat patches."""

    config: Config
    dtype: DTypeLike = jnp.float32

    def setup(self):
        cfg = self.config
        shape = (cfg.num_patches, cfg.tower.width)
        self.positional_embedding = self.param(
            "positional_embedding", nn.initializers.normal(0.02), shape
        )
        self.patch_embedding = layers.dense(cfg.tower.width, True, self.dtype)
        self.layers = [Block(cfg, self.dtype) for _ in range(cfg.num_layers)]

    def __call__(self, pixels: Array) -> tuple[Array, ...]:
        """Maps patches[R, P, values] to the states [R, P, E] before and after each block."""
        x = self.patch_embedding(pixels.astype(self.dtype))
        states = [sharding.residual(x + self.positional_embedding.astype(self.dtype))]
        for block in self.layers:
            states.append(block(states[-1]))
        return tuple(states)


class Projector(nn.Module):
    """Pools the patches of each feature by attention from their mean, and maps them to D."""

    config: Config
    dtype: DTypeLike = jnp.float32

    def setup(self):
        cfg = self.config
        self.image_pooling_2d = Attention(cfg.pooling, self.dtype)
        self.image_projector = layers.GatedMLP(
            cfg.projector_width,
            cfg.projector_act,
            dtype=self.dtype,
            output_size=cfg.text.hidden_size,
        )

    def __call__(self, states: Array, pooling: Array) -> Array:
        """Maps states[R, P, width] and the patches int[F, K] of features to [F, D]."""
        real = pooling >= 0
        pooled = states.reshape(-1, states.shape[-1])[jnp.maximum(pooling, 0)]
        pooled = jnp.where(real[..., None], pooled, 0)
        count = jnp.maximum(real.sum(-1), 1).astype(pooled.dtype)
        mean = pooled.sum(1, keepdims=True) / count[:, None, None]
        y = self.image_pooling_2d(mean, pooled, real[:, None, None])
        return self.image_projector(y)[:, 0]
