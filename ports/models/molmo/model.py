"""Molmo-7B-D (Deitke et al. 2024): whole image and overlapping crops, CLIP tower, Qwen2 decoder.

B batch, T positions, D width, C crops per row, P patches per crop, K features per crop.

The decoder's projections are fused in checkpoints: att_proj is query, key and value, ff_proj is
values and gate. Features are added to the embeddings of the image tokens; the processor's
`image_input_idx` gives the position of each feature.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from ports import names
from ports.inputs import padding
from ports.models.molmo import vision as molmo_vision
from ports.models.molmo.configuration import Config, read_config
from ports.models.molmo.patch_layout import patch_layout
from ports.models.molmo.processor import read_processor, read_tokenizer
from ports.models.port import Port
from ports.nn import attention, decoder, layers, rope, vision_language
from ports.parallel import sharding

Array = jax.Array

names.number("resblocks")  # in the tower
names.fuse("att_proj", "query", "key", "value")
names.fuse("ff_proj", "up", "gate")
# Sharding rules of the parameters.
AXES: sharding.Axes = {
    **molmo_vision.AXES,
    "wte": ("vocab", "embed"),
    "transformer.ff_out": ("embed", "vocab"),
    "att_proj.query": ("embed", "heads"),
    **dict.fromkeys(("att_proj.key", "att_proj.value"), ("embed", "kv_heads")),
    "attn_out": ("heads", "embed"),
    **dict.fromkeys(("ff_proj.up", "ff_proj.gate"), ("embed", "mlp")),
    "ff_out": ("mlp", "embed"),
    **dict.fromkeys(("attn_norm", "ff_norm", "ln_f"), ()),
}

# The processor's arrays that the port uses; the rest are ignored.
INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "images",
    "image_masks",
    "image_input_idx",
)


class Embedding(nn.Module):
    """Token embeddings in two consecutive tables: the vocabulary, then the image tokens."""

    config: Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Maps tokens int[B, T] to [B, T, D]; NaN for ids outside both tables."""
        cfg = self.config
        init, width = nn.initializers.normal(0.02), cfg.text.hidden_size
        table = self.param("table", init, (cfg.text.vocab_size, width))
        further = self.param("new_embedding", init, (cfg.additional_vocab_size, width))
        # Concatenating the tables would copy them at every step.
        behind = tokens - len(table)
        x = jnp.where(
            behind[..., None] < 0,
            layers.look_up(table, tokens),
            layers.look_up(further, jnp.maximum(behind, 0)),
        )
        return x.astype(self.dtype)


class Block(nn.Module):
    """A pre-norm block with fused projections."""

    config: decoder.DecoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        angles: tuple[Array, Array],
        mask: Array,
        start: Array | None,
        last_only: bool = False,
    ) -> Array:
        """Maps x[B, T, D] to [B, T, D]; arguments as for `decoder.DecoderLayer`."""
        cfg = self.config

        def norm(name: str) -> nn.RMSNorm:
            return layers.RMSNorm(epsilon=cfg.norm_eps, dtype=self.dtype, name=name)

        def linear(width: int, name: str) -> nn.Dense:
            return layers.dense(width, False, self.dtype, name)

        queries, keys = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        y = norm("attn_norm")(x)
        query, key, value = (
            part.reshape(*x.shape[:2], -1, cfg.head_dim)
            for part in layers.fused(y, (queries, keys, keys), cfg.qkv_bias, self.dtype, "att_proj")
        )
        key, value = sharding.heads(key, "kv_heads"), sharding.heads(value, "kv_heads")
        key = layers.rotate(key, *angles)
        if last_only:
            query = query[:, -1:]
            x, angles, mask = decoder.last_queries(x, angles, mask)
        query = layers.rotate(sharding.heads(query), *angles)
        y = decoder.attend_through_cache(self, query, key, value, mask, start)
        y = attention.Heads(name="heads")(y)
        x = sharding.residual(x + linear(x.shape[-1], "attn_out")(y))
        y = norm("ff_norm")(x)
        up, gate = (
            sharding.constrain(part, "batch", "positions", "mlp")
            for part in layers.fused(y, (cfg.intermediate_size,) * 2, False, self.dtype, "ff_proj")
        )
        return sharding.residual(x + linear(x.shape[-1], "ff_out")(nn.silu(gate) * up))


class Transformer(nn.Module):
    """The decoder and its head."""

    config: Config
    dtype: DTypeLike = jnp.float32

    def setup(self):
        text = self.config.text
        self.wte = Embedding(self.config, self.dtype)
        kind = decoder.layer_kind(Block, "last_only")
        self.blocks = [kind(text, self.dtype) for _ in range(text.num_layers)]
        self.ln_f = layers.RMSNorm(epsilon=text.norm_eps, dtype=self.dtype)
        self.ff_out = layers.head(text.vocab_size, self.dtype)

    def embed_tokens(self, tokens: Array) -> Array:
        """Maps tokens int[B, T] to [B, T, D]."""
        return self.wte(tokens)

    def unembed(self, x: Array) -> Array:
        """Maps x[..., D] to logits float32[..., V]."""
        return sharding.logits(self.ff_out(x))

    def __call__(
        self,
        x: Array,
        positions: Array,
        mask: Array,
        start: Array | None = None,
        last_only: bool = False,
    ) -> Array:
        """Maps embeddings to states after the final norm.

        Args:
            x: [B, T, D].
            positions: int32[B, T].
            mask: as for `decoder.attend_through_cache`.
            start: cache slot of the first position in a decode step; else None.
            last_only: compute only the last position in the last layer.

        Returns:
            [B, T, D], or [B, 1, D] with `last_only`.
        """
        text = self.config.text
        x = sharding.residual(x)
        angles = rope.angles(text.rope, positions, text.head_dim)
        *first, last = self.blocks
        for block in first:
            x = block(x, angles, mask, start, False)
        return self.ln_f(last(x, angles, mask, start, last_only))


class Model(nn.Module):
    """Wraps decoder and vision backbone, for the extra level in the checkpoints' names."""

    config: Config
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.transformer = Transformer(self.config, self.dtype)
        self.vision_backbone = molmo_vision.VisionBackbone(self.config.vision, self.dtype)


class Molmo(vision_language.VisionLanguageModel):
    """Adds the features of the crops to the embeddings of the image tokens."""

    config: Config
    decoder_path = ("model", "transformer")
    head_path = ("model", "transformer", "ff_out")
    axes = AXES
    cache_path = ("blocks_{}",)
    norm_name = "ln_f"

    def setup(self):
        self.model = Model(self.config, self.dtype)

    @property
    def num_embeddings(self) -> int:
        """Number of embeddings in both tables together."""
        return self.config.num_embeddings

    @property
    def text_decoder(self) -> Transformer:
        """The Qwen2 decoder with fused projections."""
        return self.model.transformer

    def unembed(self, x: Array) -> Array:
        """Maps x[..., D] to logits float32[..., V] with the head only."""
        return self.model.transformer.unembed(x)

    def embed_inputs(self, inputs: vision_language.Inputs) -> Array:
        """Embeds tokens and images.

        Args:
            inputs: the processor's arrays, or those from `prepare_inputs`: input_ids int[B, T];
                optional images[B, C, P, values], image_masks[B, C, P], and image_input_idx
                int[B, C, K] or feature_index int[B, T].

        Returns:
            [B, T, D].
        """
        tokens = jnp.asarray(inputs["input_ids"])
        x = self.text_decoder.embed_tokens(tokens)
        if inputs.get("images") is None:
            return x
        features = self.model.vision_backbone(
            jnp.asarray(inputs["images"]), jnp.asarray(inputs["image_masks"])
        )
        index = inputs.get("feature_index")
        if index is None:
            index = _feature_index(jnp.asarray(inputs["image_input_idx"]), tokens.shape[1])
        flat = features.reshape(len(x), -1, x.shape[-1])
        chosen = jnp.take_along_axis(flat, jnp.maximum(index, 0)[..., None], axis=1)
        return x + jnp.where(index[..., None] >= 0, chosen, 0)


def _feature_index(positions: Array, length: int) -> Array:
    """Inverts positions int[B, C, K] to the feature at each position, int32[B, T]; -1 for none."""
    rows = positions.reshape(len(positions), -1)
    features = jnp.broadcast_to(jnp.arange(rows.shape[1], dtype=jnp.int32), rows.shape)
    # Negative positions mark unused features: moved past the end, they are dropped.
    rows = jnp.where(rows < 0, length, rows)
    none = jnp.full((len(rows), length), -1, jnp.int32)
    return none.at[jnp.arange(len(rows))[:, None], rows].set(features, mode="drop")


def example_inputs(config: Config, batch: int = 1, length: int | None = None) -> dict[str, Any]:
    """Returns shapes and dtypes of a batch with one image per row, of one crop plus the whole."""
    vision = config.vision
    features = vision.pooled**2
    length = length or 2 * (features + vision.pooled + 2) + vision_language.EXAMPLE_TEXT
    crops, patches = 2, vision.grid**2
    ids = jax.ShapeDtypeStruct((batch, length), np.int32)

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, crops, *shape), np.float32)

    return {
        "input_ids": ids,
        "attention_mask": ids,
        "images": floats(patches, 3 * vision.patch_size**2),
        "image_masks": floats(patches),
        "image_input_idx": jax.ShapeDtypeStruct((batch, crops, features), np.int32),
    }


def prepare_inputs(config: Config, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checks the processor's arrays and prepares them for the module.

    Replaces image_input_idx by `feature_index` int[B, T], which has one column per position and so
    can be padded and moved like the tokens. Pads the crops to one of a few numbers.

    Args:
        config: the model's configuration.
        inputs: the processor's arrays.

    Returns:
        The arrays that the module takes.

    Raises:
        ValueError: crops, positions and image tokens do not match.
    """
    arrays = dict(inputs)
    given = [name for name in ("images", "image_masks", "image_input_idx") if name in arrays]
    holds_patch = arrays["input_ids"] == config.image_tokens[0]
    if not given:
        if holds_patch.any():
            raise ValueError(
                f"the prompts hold {holds_patch.sum()} image tokens, but there are no images; also "
                "pass images, image_masks and image_input_idx from the processor"
            )
        return arrays
    if len(given) < 3:
        raise ValueError(
            f"inputs have only {', '.join(given)}; expected images, image_masks and "
            "image_input_idx together, as the processor returns them"
        )
    images, masks, positions = (
        arrays[name] for name in ("images", "image_masks", "image_input_idx")
    )
    vision = config.vision
    batch, crops = images.shape[:2]
    for name, value, shape in (
        ("images", images, (batch, crops, vision.grid**2, 3 * vision.patch_size**2)),
        ("image_masks", masks, (batch, crops, vision.grid**2)),
        ("image_input_idx", positions, (batch, crops, vision.pooled**2)),
    ):
        if value.shape != shape or batch != len(arrays["input_ids"]):
            raise ValueError(
                f"{name} has shape {value.shape}; expected {shape}, with one row of crops per "
                f"prompt ({len(arrays['input_ids'])})"
            )
    length = arrays["input_ids"].shape[1]
    index = np.full((batch, length + 1), -1, np.int32)
    rows = np.where(positions < 0, length, positions).reshape(batch, -1)
    if rows.max() > length:
        raise ValueError(
            f"image_input_idx has position {rows.max()}, but the prompts have {length} positions; "
            "pass input_ids and images from the same call of the processor"
        )
    np.put_along_axis(index, rows, np.arange(rows.shape[1], dtype=np.int32)[None], axis=1)
    index = index[:, :length]
    features, places = (positions >= 0).sum(), (index >= 0).sum()
    if features != places:
        raise ValueError(
            f"image_input_idx maps {features} features to {places} positions; expected a different "
            "position for each feature"
        )
    if ((index >= 0) != holds_patch).any():
        both = (holds_patch & (index >= 0)).sum()
        raise ValueError(
            f"image_input_idx has {places} positions and the prompts hold "
            f"{holds_patch.sum()} image tokens, but only {both} coincide; "
            "pass input_ids and images from the same call of the processor"
        )
    del arrays["image_input_idx"]
    missing = padding.bucket_count(crops) - crops
    return arrays | {
        "images": _fill(images, missing),
        "image_masks": _fill(masks, missing),
        "feature_index": index,
    }


def _fill(array: np.ndarray, missing: int) -> np.ndarray:
    """Appends `missing` crops of -1, which are ignored."""
    widths = [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, widths, constant_values=-1)


def canonical_name(name: str) -> str | None:
    """Returns the name unchanged: the port has the checkpoint's names."""
    return name


PORT = Port(
    config=Config,
    module=Molmo,
    inputs=INPUTS,
    example_inputs=example_inputs,
    prepare_inputs=prepare_inputs,
    canonical_name=canonical_name,
    read_config=read_config,
    read_processor=read_processor,
    read_tokenizer=read_tokenizer,
    per_position={"feature_index": -1},
    patch_layout=patch_layout,
)
