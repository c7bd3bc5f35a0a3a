"""The vision transformer of Qwen2-VL (Wang et al. 2024): any image size, rotary positions in 2-D.

Qwen2.5-VL and Qwen3-VL build theirs from the same parts.

F frames (an image has one, a video several), P patches per frame, E width, H heads, M the side of
the square of patches that becomes one token, D the decoder's width.

The patches of a frame have the processor's order: squares of M x M patches, row by row, and row by
row within a square. Every patch attends to the patches of its own frame.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from ports import names
from ports.nn import attention, layers, rope
from ports.parallel import sharding

Array = jax.Array
Attend = Callable[[Array, Array, Array], Array]  # query, key and value [F, P, H, C] to [F, P, H, C]

names.fuse("qkv", "query", "key", "value")
# Sharding rules of the parameters.
AXES: sharding.Axes = {
    **dict.fromkeys(("qkv.query", "qkv.key", "qkv.value"), ("embed", "heads")),
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
    rms_norm: bool = False  # instead of LayerNorm
    gated_mlp: bool = False
    mlp_prefix: str = ""  # of the names of the MLP's layers
    patch_bias: bool = False
    output_name: ClassVar[str] = "hidden_size"  # of `output_size` in the configuration

    @classmethod
    def from_hf(cls, config: Any) -> Self:
        """Reads a transformers Qwen2VLVisionConfig.

        Raises:
            ValueError: a value is not implemented.
        """
        return cls.read(
            config,
            "embed_dim",
            mlp_width=int(config.embed_dim * config.mlp_ratio),
            output_size=config.hidden_size,
        )

    @classmethod
    def read(cls, config: Any, width: str, **own: Any) -> Self:
        """Reads what the configurations of all Qwen towers have; `own` are the other fields.

        Args:
            config: a transformers configuration.
            width: its name for the tower's width.
            **own: the fields whose names or rules differ.

        Returns:
            The configuration.

        Raises:
            ValueError: a value is not implemented.
        """
        layers.activation(config.hidden_act)
        for name in ("patch_size", "temporal_patch_size"):
            if not isinstance(getattr(config, name), int):
                raise ValueError(
                    f"vision_config.{name} is {getattr(config, name)!r}; expected one number"
                )
        said = dict(getattr(config, "rope_parameters", None) or {})
        if said.get("rope_type", "axial") != "axial":
            raise ValueError(f"vision_config has rope_type {said['rope_type']!r}; expected 'axial'")
        if getattr(config, width) % (4 * config.num_heads):
            raise ValueError(
                f"vision_config.{width} is {getattr(config, width)}; expected a multiple of 4 x "
                f"its {config.num_heads} heads, for rotary embedding in 2-D"
            )
        return cls(
            width=getattr(config, width),
            num_layers=config.depth,
            num_heads=config.num_heads,
            hidden_act=config.hidden_act,
            num_channels=config.in_channels,
            patch_size=config.patch_size,
            frames_per_patch=config.temporal_patch_size,
            merge_size=config.spatial_merge_size,
            rope_theta=float(said.get("rope_theta", 10_000.0)),
            **own,
        )

    @property
    def patch_values(self) -> int:
        """Number of values in a flat patch."""
        return self.num_channels * self.frames_per_patch * self.patch_size**2


class Places(NamedTuple):
    """Where the patches of F rows are; patches of several frames may share a row."""

    row: Array  # int[F, P] in the frame
    column: Array  # int[F, P]
    height: Array  # int[F or 1, P or 1], rows of the patch's frame
    width: Array  # int[F or 1, P or 1]
    frame: Array  # int[F, P], one number per frame in a row; -1 for padding

    @property
    def mask(self) -> Array:
        """bool[F, 1, P or 1, P]: patches see those of their own frame."""
        if self.height.shape[1] == 1:  # a frame per row
            return (self.frame >= 0)[:, None, None]
        return (self.frame[:, :, None] == self.frame[:, None])[:, None]


def patch_places(index: Array, height: Array, width: Array, frame: Array, merge: int) -> Places:
    """Returns the places of the patches at `index` in frames of height x width patches."""
    square, inner = index // merge**2, index % merge**2
    row = square // (width // merge) * merge + inner // merge
    column = square % (width // merge) * merge + inner % merge
    return Places(row, column, height, width, frame)


def axial_angles(config: VisionConfig, places: Places) -> tuple[Array, Array]:
    """Returns cosines and sines [F, P, C]: half of the frequencies rotate with the row, the other
    half, the same values, with the column.
    """
    half = config.width // config.num_heads // 2
    frequencies = rope.frequencies(rope.Rope(config.rope_theta), half)
    turns = [
        place[..., None].astype(jnp.float32) * frequencies for place in (places.row, places.column)
    ]
    turns = jnp.concatenate([*turns, *turns], axis=-1)
    return jnp.cos(turns), jnp.sin(turns)


def within_frames(places: Places) -> Attend:
    """Returns the attention in which every patch sees the patches of its frame."""
    return functools.partial(attention.attend, mask=places.mask)


def norm(config: VisionConfig, dtype: DTypeLike, name: str) -> nn.Module:
    """Returns a tower's normalisation."""
    if config.rms_norm:
        return layers.RMSNorm(epsilon=NORM_EPS, dtype=dtype, name=name)
    return layers.layer_norm(NORM_EPS, dtype, name)


class PatchProjection(nn.Module):
    """A convolution with strides equal to its kernel's sides, as a product with flat patches."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, patches: Array) -> Array:
        """Maps patches[F, P, channels x frames x height x width] to [F, P, E]."""
        cfg = self.config
        sides = (cfg.num_channels, cfg.frames_per_patch, cfg.patch_size, cfg.patch_size)
        init = nn.initializers.lecun_normal(in_axis=(0, 1, 2, 3))
        kernel = self.param("kernel", init, (*sides, cfg.width))
        kernel = kernel.reshape(-1, cfg.width).astype(self.dtype)
        y = patches.astype(self.dtype) @ kernel
        if cfg.patch_bias:
            y += self.param("bias", nn.initializers.zeros, (cfg.width,)).astype(self.dtype)
        return y


class PatchEmbed(nn.Module):
    """Wraps the projection, for the extra level in the checkpoints' names."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, patches: Array) -> Array:
        """Calls PatchProjection."""
        return PatchProjection(self.config, self.dtype, name="proj")(patches)


class Attention(nn.Module):
    """Self-attention, with projections that are fused in checkpoints."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, angles: tuple[Array, Array], attend: Attend) -> Array:
        """Maps x[F, P, E] to [F, P, E]."""
        cfg = self.config
        query, key, value = (
            sharding.heads(part.reshape(*x.shape[:2], cfg.num_heads, -1))
            for part in layers.fused(x, (cfg.width,) * 3, True, self.dtype, "qkv")
        )
        query, key = layers.rotate(query, *angles), layers.rotate(key, *angles)
        y = attention.Heads(name="heads")(attend(query, key, value))
        return layers.dense(cfg.width, True, self.dtype, "proj")(y)


class Block(nn.Module):
    """A pre-norm block."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, angles: tuple[Array, Array], attend: Attend) -> Array:
        """Maps x[F, P, E] to [F, P, E]."""
        cfg = self.config
        y = norm(cfg, self.dtype, "norm1")(x)
        x = sharding.residual(x + Attention(cfg, self.dtype, name="attn")(y, angles, attend))
        y = norm(cfg, self.dtype, "norm2")(x)
        if cfg.gated_mlp:
            mlp = layers.GatedMLP(cfg.mlp_width, cfg.hidden_act, True, self.dtype, name="mlp")
        else:
            mlp = layers.MLP(cfg.mlp_width, cfg.hidden_act, self.dtype, cfg.mlp_prefix, name="mlp")
        return sharding.residual(x + mlp(y))


class Merger(nn.Module):
    """Merges M x M neighbouring patches, normalised and concatenated, into one decoder token."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x[F, P, E] to [F, P / M^2, D]."""
        cfg = self.config
        joined = cfg.width * cfg.merge_size**2
        x = norm(cfg, self.dtype, "ln_q")(x).reshape(len(x), -1, joined)
        x = layers.dense(joined, True, self.dtype, "mlp_0")(x)
        x = sharding.constrain(nn.gelu(x, approximate=False), "batch", "positions", "mlp")
        return sharding.residual(layers.dense(cfg.output_size, True, self.dtype, "mlp_2")(x))


class Qwen2Vision(nn.Module):
    """The tower and its merger."""

    config: Any  # VisionConfig, or that of a later Qwen
    dtype: DTypeLike = jnp.float32

    def setup(self):
        cfg: VisionConfig = self.config
        self.patch_embed = PatchEmbed(cfg, self.dtype)
        self.blocks = [Block(cfg, self.dtype) for _ in range(cfg.num_layers)]
        self.merger = Merger(cfg, self.dtype)

    def __call__(self, patches: Array, places: Places) -> Array:
        """Maps patches[F, P, values] to features [F, P / M^2, D]."""
        cfg: VisionConfig = self.config
        angles = axial_angles(cfg, places)
        x = sharding.residual(self.patch_embed(patches))
        for block, attend in zip(self.blocks, self.attention(places), strict=True):
            x = block(x, angles, attend)
        return self.merger(x)

    def attention(self, places: Places) -> list[Attend]:
        """Returns each block's attention."""
        return [within_frames(places)] * self.config.num_layers
