"""Qwen3-VL (Bai et al. 2025): Qwen2-VL with learnt positions and DeepStack.

F rows of P patches, E the tower's width, M the side of the square of patches that becomes one
token, D the decoder's width.

The tower adds learnt positions, interpolated to the image's size, to its rotary ones. DeepStack
(Meng et al. 2024): the states after some of its blocks are merged like the last ones, and added to
the image tokens' states after the first layers of the decoder. There `layers.N` is the output of
the layer before this addition, as in transformers' hidden states, and `deepstack.N` is after it.

The frames of a video are apart in the prompt, each after its time as text, so that they have the
rotary positions of images.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from ports import names
from ports.models.port import Port
from ports.models.qwen2_vl import model as qwen2_vl
from ports.models.qwen2_vl import vision as qwen2_vision
from ports.models.qwen3_vl_processor import Processor
from ports.nn import decoder, layers
from ports.parallel import sharding

Array = jax.Array

names.number("deepstack_merger_list")
# Sharding rules of the parameters.
AXES: sharding.Axes = {
    **qwen2_vl.AXES,
    "linear_fc1": ("embed", "mlp"),
    "linear_fc2": ("mlp", "embed"),
    "pos_embed": (),
}


@dataclasses.dataclass(frozen=True)
class VisionConfig(qwen2_vision.VisionConfig):
    """Sizes and constants of the tower."""

    side: int = 0  # the learnt positions are a square of side x side
    deep_blocks: tuple[int, ...] = ()  # blocks after which states go to the decoder
    output_name: ClassVar[str] = "out_hidden_size"

    @classmethod
    def from_hf(cls, config: Any) -> Self:
        """Reads a transformers Qwen3VLVisionConfig.

        Raises:
            ValueError: a value is not implemented.
        """
        side = int(config.num_position_embeddings**0.5)
        if side**2 != config.num_position_embeddings:
            raise ValueError(
                f"vision_config.num_position_embeddings is {config.num_position_embeddings}; "
                "expected the square of a whole number"
            )
        deep = tuple(config.deepstack_visual_indexes)
        if list(deep) != sorted({*deep} & {*range(config.depth)}):
            raise ValueError(
                f"vision_config.deepstack_visual_indexes is {list(deep)}; expected ascending "
                f"numbers of blocks, each below {config.depth}"
            )
        return cls.read(
            config,
            "hidden_size",
            mlp_width=config.intermediate_size,
            mlp_prefix="linear_",
            output_size=config.out_hidden_size,
            patch_bias=True,
            side=side,
            deep_blocks=deep,
        )


@dataclasses.dataclass(frozen=True)
class Config(qwen2_vl.Config):
    """The values that the port needs from a transformers Qwen3VLConfig."""

    vision: VisionConfig
    text_type: ClassVar[str] = "qwen3_vl_text"
    vision_class: ClassVar[type[qwen2_vision.VisionConfig]] = VisionConfig
    frames_apart: ClassVar[bool] = True

    @classmethod
    def from_hf(cls, config: Any) -> Self:
        """Reads a transformers Qwen3VLConfig.

        Raises:
            ValueError: a value is not implemented.
        """
        read = super().from_hf(config)
        count, num_layers = len(read.vision.deep_blocks), read.text.num_layers
        if count > num_layers:
            raise ValueError(
                f"vision_config.deepstack_visual_indexes has {count} blocks; expected at most one "
                f"for each of the decoder's {num_layers} layers"
            )
        text = dataclasses.replace(read.text, num_injections=count)
        return dataclasses.replace(read, text=text)


def interpolate(table: Array, places: qwen2_vision.Places) -> Array:
    """Interpolates learnt positions linearly; an image's corners have those of the table's.

    Args:
        table: [side, side, E].
        places: where the patches are.

    Returns:
        [F, P, E].
    """
    last = len(table) - 1

    def along(place: Array, size: Array) -> list[tuple[Array, Array]]:
        """Returns the two neighbours in the table, int[F, P], and their weights."""
        at = place.astype(jnp.float32) * last / jnp.maximum(size - 1, 1)
        first = jnp.floor(at)
        index = first.astype(jnp.int32)
        return [(index, 1 - (at - first)), (jnp.minimum(index + 1, last), at - first)]

    return sum(
        (
            table[row, column] * (row_weight * column_weight)[..., None]
            for row, row_weight in along(places.row, places.height)
            for column, column_weight in along(places.column, places.width)
        ),
        start=jnp.zeros((), table.dtype),
    )


class Merger(nn.Module):
    """Merges M x M neighbouring patches, concatenated, into one decoder token."""

    config: VisionConfig
    joined_norm: bool  # normalise after joining the patches, not each of them
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x[F, P, E] to [F, P / M^2, D]."""
        cfg = self.config
        norm = qwen2_vision.norm(cfg, self.dtype, "norm")
        joined = cfg.width * cfg.merge_size**2
        shape = (len(x), -1, joined)
        x = norm(x.reshape(shape)) if self.joined_norm else norm(x).reshape(shape)
        x = layers.dense(joined, True, self.dtype, "linear_fc1")(x)
        x = sharding.constrain(nn.gelu(x, approximate=False), "batch", "positions", "mlp")
        return sharding.residual(layers.dense(cfg.output_size, True, self.dtype, "linear_fc2")(x))


class Qwen3Vision(nn.Module):
    """The tower and its mergers."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        cfg = self.config
        self.patch_embed = qwen2_vision.PatchEmbed(cfg, self.dtype)
        self.pos_embed = nn.Embed(cfg.side**2, cfg.width, dtype=jnp.float32)
        self.blocks = [qwen2_vision.Block(cfg, self.dtype) for _ in range(cfg.num_layers)]
        self.merger = Merger(cfg, False, self.dtype)
        self.deepstack_merger_list = [Merger(cfg, True, self.dtype) for _ in cfg.deep_blocks]

    def __call__(
        self, patches: Array, places: qwen2_vision.Places
    ) -> tuple[Array, Sequence[Array]]:
        """Maps patches[F, P, values] to the features [F, P / M^2, D] of image tokens, and those to
        add to them after each of the decoder's first layers.
        """
        cfg = self.config
        angles = qwen2_vision.axial_angles(cfg, places)
        table = self.pos_embed.embedding.reshape(cfg.side, cfg.side, -1)
        positions = interpolate(table.astype(jnp.float32), places)
        x = sharding.residual(self.patch_embed(patches) + positions.astype(self.dtype))
        attend = qwen2_vision.within_frames(places)
        mergers, deep = iter(self.deepstack_merger_list), []
        for i, block in enumerate(self.blocks):
            x = block(x, angles, attend)
            if i in cfg.deep_blocks:
                deep.append(next(mergers)(x))
        return self.merger(x), deep


class Backbone(nn.Module):
    """Wraps everything but the head, for the extra level in the checkpoints' names."""

    config: Any  # Config
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.visual = Qwen3Vision(self.config.vision, self.dtype)
        self.language_model = decoder.Decoder(self.config.text, self.dtype)


class Qwen3VL(qwen2_vl.Qwen2VL):
    """Replaces image and video tokens by the features from the tower."""

    decoder_path = ("model", "language_model")
    axes = AXES

    def setup(self):
        self.model = Backbone(self.config, self.dtype)
        if not self.config.text.tie_embeddings:
            self.lm_head = layers.head(self.config.text.vocab_size, self.dtype)

    @property
    def text_decoder(self) -> decoder.Decoder:
        """The Qwen3 decoder."""
        return self.model.language_model

    def see(self, pixels: Array, places: qwen2_vision.Places) -> tuple[Array, Sequence[Array]]:
        """Maps patches[F, P, values] to features, as `Qwen3Vision` does."""
        return self.model.visual(pixels, places)


def canonical_name(name: str) -> str | None:
    """Converts a tensor's name in any known checkpoint to the port's; None for buffers.

    The port, the Hub and transformers 5 have the same names.
    """
    return None if name.endswith("inv_freq") else name


PORT = Port(
    config=Config,
    module=Qwen3VL,
    inputs=qwen2_vl.INPUTS,
    example_inputs=qwen2_vl.example_inputs,
    prepare_inputs=qwen2_vl.prepare_inputs,
    canonical_name=canonical_name,
    read_processor=Processor.read,
    takes_videos=True,
    image_text=qwen2_vl.PORT.image_text,
    pieces=qwen2_vl.PIECES,
    patch_layout=qwen2_vl.patch_layout,
)
