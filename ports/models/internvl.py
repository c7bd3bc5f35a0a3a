"""InternVL 2.5, 3 and 3.5 (Chen et al. 2024): a tower with scaled residuals, shuffled patches.

B batch, T positions, D width, I images, P patches per image.

An image is a number of square tiles, each of which is an image here; so are the frames of a video.
The names are those of transformers' own checkpoints (whose names on the Hub end in -hf).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from ports.inputs import patch_layout as patches
from ports.inputs.patch_layout import Layouts
from ports.models import llava_like
from ports.models.internvl_processor import Processor
from ports.models.port import Port
from ports.nn import attention, clip_vision, decoder, encoder, layers
from ports.parallel import sharding

Array = jax.Array

# Sharding rules of the parameters.
AXES: sharding.Axes = {
    **decoder.AXES,
    **encoder.AXES,
    "projection_layer": ("heads", "embed"),
    "linear_1": ("embed", "mlp"),
    "linear_2": ("mlp", "embed"),
    **dict.fromkeys(("cls_token", "position_embeddings", "lambda_1", "lambda_2"), ()),
    **dict.fromkeys(("projection", "layernorm_before", "layernorm_after", "layernorm"), ()),
    "layer_norm": (),
}
NORMS = ("layer_norm", "rms_norm")
DECODERS = ("qwen2", "qwen3", "llama")


@dataclasses.dataclass(frozen=True)
class VisionConfig(clip_vision.VisionConfig):
    """Sizes of the tower, and which of its optional parts there are."""

    qkv_bias: bool = False
    qk_norm: bool = False
    norm_type: str = NORMS[0]
    learnt_positions: bool = True
    last_norm: bool = False  # after the last block

    @classmethod
    def from_hf(cls, config: Any, model_type: str = "internvl_vision") -> "VisionConfig":
        """Reads a transformers InternVLVisionConfig.

        Raises:
            ValueError: a value is not implemented.
        """
        if config.model_type != model_type:
            raise ValueError(
                f"vision_config.model_type is {config.model_type!r}; expected {model_type!r}"
            )
        sides = {}
        for name in ("image_size", "patch_size"):
            sides[name], width = getattr(config, name)
            if sides[name] != width:
                raise ValueError(
                    f"vision_config.{name} is {list(getattr(config, name))}; expected a square"
                )
        if config.norm_type not in NORMS:
            raise ValueError(
                f"vision_config.norm_type is {config.norm_type!r}; expected {' or '.join(NORMS)}"
            )
        if config.use_mask_token:
            raise ValueError("vision_config.use_mask_token is true, which is not implemented")
        return cls(
            **dataclasses.asdict(encoder.EncoderConfig.from_hf(config)),
            **sides,
            num_channels=config.num_channels,
            qkv_bias=config.attention_bias,
            qk_norm=config.use_qk_norm,
            norm_type=config.norm_type,
            learnt_positions=config.use_absolute_position_embeddings,
            last_norm=not config.use_mean_pooling,
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """The values that the port needs from a transformers InternVLConfig."""

    text: decoder.DecoderConfig
    vision: VisionConfig
    image_tokens: tuple[int, ...]
    feature_layer: int
    shuffle: int  # side of the square of patches that becomes one token
    projector_act: str

    @classmethod
    def from_hf(cls, config: Any) -> "Config":
        """Reads a transformers InternVLConfig.

        Raises:
            ValueError: a value is not implemented.
        """
        vision = VisionConfig.from_hf(config.vision_config)
        layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        if strategy != "default":
            raise ValueError(
                f"vision_feature_select_strategy is {strategy!r}; expected 'default', without the "
                "class position"
            )
        if not isinstance(layer, int) or not -vision.num_layers - 1 <= layer <= vision.num_layers:
            raise ValueError(
                f"vision_feature_layer is {layer}; expected a layer of the tower, "
                f"{-vision.num_layers - 1} to {vision.num_layers}"
            )
        shuffle = int(1 / config.downsample_ratio)
        if shuffle * config.downsample_ratio != 1 or vision.side % shuffle:
            raise ValueError(
                f"downsample_ratio is {config.downsample_ratio}; expected 1 over a number that "
                f"divides the {vision.side} patches of a side"
            )
        layers.activation(config.projector_hidden_act)
        return cls(
            # In transformers, tie_word_embeddings in text_config has no effect for this model.
            text=decoder.DecoderConfig.from_hf(
                config.text_config, bool(config.tie_word_embeddings), *DECODERS
            ),
            vision=vision,
            image_tokens=(config.image_token_id,),
            feature_layer=layer,
            shuffle=shuffle,
            projector_act=config.projector_hidden_act,
        )

    @property
    def tokens_per_image(self) -> int:
        """Image tokens per tile in a prompt."""
        return (self.vision.side // self.shuffle) ** 2


class PatchEmbeddings(nn.Module):
    """Embeds patches by a strided convolution."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        """Maps pixels[I, 3, height, width] to [I, P, D]."""
        return clip_vision.embed_patches(self.config, True, self.dtype, pixels, "projection")


class Embeddings(nn.Module):
    """Embeds patches, prepends a class position, adds learnt positions."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        """Maps pixels[I, 3, height, width] to [I, 1 + P, D]."""
        cfg = self.config
        patches = PatchEmbeddings(cfg, self.dtype, name="patch_embeddings")(pixels)
        first = self.param("cls_token", nn.initializers.zeros, (1, 1, cfg.hidden_size))
        first = jnp.broadcast_to(first.astype(self.dtype), (len(pixels), 1, cfg.hidden_size))
        x = jnp.concatenate([first, patches], axis=1)
        if not cfg.learnt_positions:
            return x
        shape = (1, cfg.num_patches + 1, cfg.hidden_size)
        positions = self.param("position_embeddings", nn.initializers.zeros, shape)
        return x + positions.astype(self.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys may be normalised over all heads together."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x[I, P, D] to [I, P, D]."""
        cfg = self.config
        width = x.shape[-1]

        def heads(part: str) -> Array:
            y = layers.dense(width, cfg.qkv_bias, self.dtype, f"{part}_proj")(x)
            if cfg.qk_norm and part != "v":
                y = layers.RMSNorm(epsilon=1e-6, dtype=self.dtype, name=f"{part}_norm")(y)
            return sharding.heads(y.reshape(*x.shape[:2], cfg.num_heads, width // cfg.num_heads))

        y = attention.attend(heads("q"), heads("k"), heads("v"), None)
        y = attention.Heads(name="heads")(y)
        return layers.dense(width, True, self.dtype, "projection_layer")(y)


class Block(nn.Module):
    """A pre-norm block, of which both residuals have a learnt scale."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x[I, P, D] to [I, P, D]."""
        cfg = self.config

        def norm(name: str, x: Array) -> Array:
            if cfg.norm_type == "rms_norm":
                return layers.RMSNorm(epsilon=cfg.norm_eps, dtype=self.dtype, name=name)(x)
            return layers.layer_norm(cfg.norm_eps, self.dtype, name)(x)

        def scaled(name: str, y: Array) -> Array:
            scale = self.param(name, nn.initializers.ones, (x.shape[-1],))
            return y * scale.astype(self.dtype)

        y = Attention(cfg, self.dtype, name="attention")(norm("layernorm_before", x))
        x = sharding.residual(x + scaled("lambda_1", y))
        mlp = layers.MLP(cfg.intermediate_size, cfg.hidden_act, self.dtype, name="mlp")
        return sharding.residual(x + scaled("lambda_2", mlp(norm("layernorm_after", x))))


class Encoder(nn.Module):
    """A stack of blocks that returns the states before the first block and after each block."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.layer = [Block(self.config, self.dtype) for _ in range(self.config.num_layers)]

    def __call__(self, x: Array) -> tuple[Array, ...]:
        """Maps x[I, P, D] to num_layers + 1 states [I, P, D]."""
        states = [sharding.residual(x)]
        for block in self.layer:
            states.append(block(states[-1]))
        return tuple(states)


class Tower(nn.Module):
    """The vision tower."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.embeddings = Embeddings(self.config, self.dtype)
        self.encoder = Encoder(self.config, self.dtype)
        if self.config.last_norm:
            self.layernorm = layers.layer_norm(self.config.norm_eps, self.dtype)

    def __call__(self, pixels: Array) -> tuple[Array, ...]:
        """Maps pixels[I, 3, height, width] to the states [I, 1 + P, D] before and after each block,
        and at last those after the norm, if there is one.
        """
        states = self.encoder(self.embeddings(pixels))
        return (*states, self.layernorm(states[-1]) if self.config.last_norm else states[-1])


class Projector(nn.Module):
    """A norm and a two-layer perceptron, from squares of patches to the decoder's width."""

    config: Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """Maps features[I, P, tower width x patches of a square] to [I, P, D]."""
        cfg = self.config

        def linear(name: str) -> nn.Dense:
            return layers.dense(cfg.text.hidden_size, True, self.dtype, name)

        # The epsilon is PyTorch's default.
        y = linear("linear_1")(layers.layer_norm(1e-5, self.dtype, "layer_norm")(features))
        return linear("linear_2")(layers.activation(cfg.projector_act)(y))


def shuffle(features: Array, side: int, square: int) -> Array:
    """Joins the patches of each square: [I, side^2, D] -> [I, (side / square)^2, square^2 D]."""
    images, _, width = features.shape
    few = side // square
    grid = features.reshape(images, few, square, few, square, width)
    return jnp.swapaxes(grid, 2, 3).reshape(images, few**2, square**2 * width)


class InternVL(llava_like.LlavaLike):
    """Replaces image tokens by the projected squares of patches of each tile."""

    config: Config
    axes = AXES

    def setup(self):
        self.vision_tower = Tower(self.config.vision, self.dtype)
        self.multi_modal_projector = Projector(self.config, self.dtype)
        self.language_model = decoder.CausalLM(self.config.text, self.dtype)

    def image_features(self, pixels: Array) -> Array:
        """Maps pixels[I, 3, height, width] to the decoder's inputs [I, P, D]."""
        cfg = self.config
        *states, last = self.vision_tower(pixels)
        features = last if cfg.feature_layer == -1 else states[cfg.feature_layer]
        return self.multi_modal_projector(shuffle(features[:, 1:], cfg.vision.side, cfg.shuffle))


def prepare_inputs(config: Config, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checks the processor's arrays, of which the module takes all but tile_grids.

    Raises:
        ValueError: as for `llava_like.prepare_inputs`.
    """
    arrays = llava_like.prepare_inputs(config, inputs)
    arrays.pop("tile_grids", None)
    return arrays


def patch_layout(
    config: Config, arrays: Mapping[str, np.ndarray], read_processor: Callable[[], Any]
) -> Layouts:
    """Lays out the tiles of each picture, with the whole as its `whole`, and frames one by one.

    Without tile_grids, which transformers' processor does not make, every tile is taken for a
    picture.

    Raises:
        ValueError: tile_grids is of other pictures than the prompts.
    """
    grids = arrays.get("tile_grids")
    if grids is None:
        return llava_like.patch_layout(config, arrays, read_processor)
    count = config.tokens_per_image
    side = math.isqrt(count)
    inside = llava_like.on_cells(config.vision, side)
    shapes = np.asarray(grids).tolist()
    given = iter(shapes)
    lengths = iter([count * (r * c + (r * c > 1)) for r, c in shapes])

    def of_picture(places: np.ndarray) -> patches.PatchLayout:
        rows, columns = next(given)
        whole = patches.grid(places[-count:], side, side, inside)
        if rows * columns == 1:
            return whole
        tiles = places[:-count].reshape(rows, columns, side, side).swapaxes(1, 2)
        tiled = patches.grid(tiles.reshape(-1), rows * side, columns * side)
        return dataclasses.replace(tiled, whole=whole)

    return [
        [of_picture(places) for places in patches.runs(row, config.image_tokens[0], lengths)]
        for row in arrays["input_ids"]
    ]


PORT = Port(
    config=Config,
    module=InternVL,
    inputs=("input_ids", "attention_mask", "position_ids", "pixel_values", "tile_grids"),
    example_inputs=llava_like.example_inputs,
    prepare_inputs=prepare_inputs,
    canonical_name=functools.partial(llava_like.canonical_name, level=""),
    transformers_name=llava_like.transformers_name,
    pieces=("pixel_values",),
    patch_layout=patch_layout,
    read_processor=Processor.read,
    takes_videos=True,
)
