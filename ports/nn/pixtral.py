"""Pixtral's vision tower (Agrawal et al. 2024) for images of any size and shape.

I images, P = h x w patches of the common grid, D width, H heads, C head width.

The images of a batch are in the upper left corner of a common canvas; patches outside an image are
masked and affect nothing. Half of the frequencies of a head turn with the row, half with the
column.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from ports.nn import attention, clip_vision, layers, rope
from ports.parallel import sharding

Array = jax.Array

# Sharding rules of the parameters.
AXES: sharding.Axes = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
    **dict.fromkeys(("patch_conv", "ln_pre", "attention_norm", "ffn_norm"), ()),
}


@dataclasses.dataclass(frozen=True)
class VisionConfig(clip_vision.VisionConfig):
    """Sizes of the tower, and the base of its rotary embedding."""

    rope_theta: float = 10_000.0

    @classmethod
    def from_hf(cls, config: Any, model_type: str = "pixtral") -> "VisionConfig":
        """Reads a transformers PixtralVisionConfig.

        Raises:
            ValueError: a value is not implemented.
        """
        said = dict(config.rope_parameters or {})
        if said.get("rope_type", "axial") != "axial":
            raise ValueError(f"vision_config has rope_type {said['rope_type']!r}; expected 'axial'")
        sizes = clip_vision.VisionConfig.from_hf(config, model_type)
        return cls(**dataclasses.asdict(sizes), rope_theta=float(said.get("rope_theta", 1e4)))


def axial_angles(theta: float, head_dim: int, h: int, w: int) -> tuple[Array, Array]:
    """Returns the cosines and sines float32[1, h x w, C] of the patches of a grid, row by row."""
    turn = rope.frequencies(rope.Rope(theta), head_dim)
    rows, columns = jnp.arange(h, dtype=jnp.float32), jnp.arange(w, dtype=jnp.float32)
    by_row = jnp.broadcast_to((rows[:, None] * turn[0::2])[:, None], (h, w, len(turn[0::2])))
    by_column = jnp.broadcast_to((columns[:, None] * turn[1::2])[None], (h, w, len(turn[1::2])))
    angles = jnp.concatenate([by_row, by_column] * 2, axis=-1).reshape(1, h * w, head_dim)
    return jnp.cos(angles), jnp.sin(angles)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions and without biases."""

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, angles: tuple[Array, Array], mask: Array) -> Array:
        """Maps x[I, P, D] to [I, P, D], with angles [1, P, C] and mask bool[I, 1, 1, P]."""
        width = x.shape[-1]

        def heads(name: str) -> Array:
            y = layers.dense(width, False, self.dtype, name)(x)
            return sharding.heads(y.reshape(*x.shape[:2], self.num_heads, width // self.num_heads))

        query, key = (layers.rotate(heads(name), *angles) for name in ("q_proj", "k_proj"))
        y = attention.attend(query, key, heads("v_proj"), mask)
        y = attention.Heads(name="heads")(y)
        return layers.dense(width, False, self.dtype, "o_proj")(y)


class Block(nn.Module):
    """A pre-norm block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, angles: tuple[Array, Array], mask: Array) -> Array:
        """Maps x[I, P, D] to [I, P, D]."""
        cfg = self.config

        def norm(name: str, x: Array) -> Array:
            return layers.RMSNorm(epsilon=cfg.norm_eps, dtype=self.dtype, name=name)(x)

        y = norm("attention_norm", x)
        y = Attention(cfg.num_heads, self.dtype, name="attention")(y, angles, mask)
        x = sharding.residual(x + y)
        y = norm("ffn_norm", x)
        mlp = layers.GatedMLP(
            cfg.intermediate_size, cfg.hidden_act, dtype=self.dtype, name="feed_forward"
        )
        return sharding.residual(x + mlp(y))


class Transformer(nn.Module):
    """A stack of blocks that returns the states before the first block and after each block."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.layers = [Block(self.config, self.dtype) for _ in range(self.config.num_layers)]

    def __call__(self, x: Array, angles: tuple[Array, Array], mask: Array) -> tuple[Array, ...]:
        """Maps x[I, P, D] to num_layers + 1 states [I, P, D]."""
        states = [sharding.residual(x)]
        for block in self.layers:
            states.append(block(states[-1], angles, mask))
        return tuple(states)


class PixtralVisionModel(nn.Module):
    """The tower: patches, a norm, blocks in which all patches of an image see each other."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, pixels: Array, mask: Array) -> tuple[Array, ...]:
        """Maps pixels[I, 3, height, width] and the mask bool[I, h, w] of the patches in each image
        to the states [I, P, D] before and after each block.
        """
        cfg = self.config
        x = clip_vision.embed_patches(cfg, False, self.dtype, pixels, "patch_conv")
        x = layers.RMSNorm(epsilon=cfg.norm_eps, dtype=self.dtype, name="ln_pre")(x)
        width = cfg.hidden_size // cfg.num_heads
        angles = axial_angles(cfg.rope_theta, width, *mask.shape[1:])
        visible = mask.reshape(len(pixels), 1, 1, -1)
        return Transformer(cfg, self.dtype, name="transformer")(x, angles, visible)
