"""The decoder of the Llama family (Llama, Mistral, Qwen2) and its key-value cache.

B batch, T query positions, S key positions (cache slots), D width, V vocabulary,
H query heads, N key-value heads, C head width.

The cache is Linen's variable collection "cache": `init_cache` makes it, and a call with this
collection among the (mutable) variables writes keys and values to it. Without it, a call is a plain
forward pass. A filled cache may also be passed as the collection "prompt_cache", which is read-only
and whose slots come first; several continuations of one prompt can share it.
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
    "embed_tokens": ("vocab", "embed"),
    "lm_head": ("embed", "vocab"),
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm", "norm"), ()),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a decoder, from a Hugging Face text configuration."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    hidden_act: str
    qkv_bias: bool
    output_bias: bool  # bias of the attention's output projection
    mlp_bias: bool
    tie_embeddings: bool
    # Number of positions that a query sees, including its own; None for all earlier ones.
    sliding_window: int | None = None
    # Multimodal rotary embedding: number of frequencies that rotate with time, height and width.
    rope_sections: tuple[int, ...] | None = None

    @classmethod
    def from_hf(cls, text: Any, tie_embeddings: bool, model_type: str) -> "DecoderConfig":
        """Reads a transformers text configuration.

        Args:
            text: the text configuration.
            tie_embeddings: whether the head is tied to the embeddings.
            model_type: its expected model_type: "llama", "mistral" or "qwen2_vl_text".

        Raises:
            ValueError: another model_type, or a value that is not implemented.
        """
        if text.model_type != model_type:
            raise ValueError(
                f"text_config.model_type is {text.model_type!r}; expected {model_type!r}"
            )
        rope = dict(text.rope_parameters)
        # transformers names rotary embedding with sections "default" or, in older files, "mrope".
        if rope.get("rope_type", "default") not in ("default", "mrope"):
            raise ValueError(
                f"text_config has rope_type {rope['rope_type']!r}; "
                "only 'default' (unscaled) rotary embedding is implemented"
            )
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("text_config.partial_rotary_factor other than 1 is not implemented")
        sections = rope.get("mrope_section")
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if sections is not None and sum(sections) != head_dim // 2:
            raise ValueError(
                f"mrope_section {list(sections)} adds up to {sum(sections)}; expected half the "
                f"head width, {head_dim // 2}"
            )
        layers.activation(text.hidden_act)
        if text.num_attention_heads % text.num_key_value_heads:
            raise ValueError(
                f"text_config has {text.num_attention_heads} attention heads, which is not a "
                f"multiple of its {text.num_key_value_heads} key-value heads"
            )
        return cls(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=head_dim,
            rope_theta=float(rope["rope_theta"]),
            norm_eps=text.rms_norm_eps,
            hidden_act=text.hidden_act,
            # Qwen2 always has biases for query, key and value; its configuration does not say so.
            qkv_bias=getattr(text, "attention_bias", model_type == "qwen2_vl_text"),
            output_bias=getattr(text, "attention_bias", False),
            mlp_bias=getattr(text, "mlp_bias", False),
            tie_embeddings=tie_embeddings,
            sliding_window=_sliding_window(text),
            rope_sections=None if sections is None else tuple(sections),
        )


def _sliding_window(text: Any) -> int | None:
    """Returns the window in a text configuration; raises ValueError if layers differ."""
    window = getattr(text, "sliding_window", None)
    if window is None or not getattr(text, "use_sliding_window", True):
        return None
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention"])
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise ValueError(
            f"text_config.layer_types mixes {' and '.join(sorted(kinds))}; only one kind for all "
            "layers is implemented"
        )
    return window


def attend_through_cache(
    module: nn.Module, query: Array, key: Array, value: Array, mask: Array, start: Array | None
) -> Array:
    """Computes attention, writing keys and values to the module's cache if it has one.

    Args:
        module: the calling attention module.
        query: [B, T, H, C].
        key: [B, T, N, C].
        value: [B, T, N, C].
        mask: bool[B, 1, T, S].
        start: None in a forward pass or prefill, where queries see the given keys (S = T). In a
            decode step, the slot of the first new key; queries see the whole cache, after the
            prompt's cache if that is separate.

    Returns:
        [B, T, H, C].
    """
    if not module.has_variable("cache", "key"):
        return layers.attend(query, key, value, mask)
    keys, values = (module.get_variable("cache", name) for name in ("key", "value"))
    parts, slot = [], 0 if start is None else start
    if module.has_variable("prompt_cache", "key"):
        parts = [tuple(module.get_variable("prompt_cache", name) for name in ("key", "value"))]
        slot -= parts[0][0].shape[-1]
    key, value = layers.cache_layout(key, value)
    zero = 0 * slot  # has the dtype of `slot`; a plain 0 would not with 64-bit numbers enabled
    keys = _constrain_cache(jax.lax.dynamic_update_slice(keys, key, (zero, zero, zero, slot)))
    values = _constrain_cache(jax.lax.dynamic_update_slice(values, value, (zero, zero, slot, zero)))
    module.put_variable("cache", "key", keys)
    module.put_variable("cache", "value", values)
    if start is None:
        return layers.attend_cached(query, [(key, value)], mask)
    return layers.attend_cached(query, [*parts, (keys, values)], mask)


def _constrain_cache(x: Array) -> Array:
    """Shards keys [B, N, C, S] or values [B, N, S, C]: rows on "data", whole heads on "model"."""
    return sharding.constrain(x, "batch", "kv_heads", "embed", "positions")


def last_queries(
    x: Array, angles: tuple[Array, Array], mask: Array
) -> tuple[Array, tuple[Array, Array], Array]:
    """Selects the last position of x[B, T, D], angles [B, T, C] and mask bool[B, 1, T, S]."""
    cos, sin = angles
    return x[:, -1:], (cos[:, -1:], sin[:, -1:]), mask[:, :, -1:]


class Attention(nn.Module):
    """Self-attention with rotary positions, grouped queries and an optional cache."""

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        angles: tuple[Array, Array],
        mask: Array,
        start: Array | None,
        last_only: bool = False,
    ) -> Array:
        """Maps x[B, T, D] to [B, T, D], or with `last_only` to [B, 1, D].

        Args:
            x: the states.
            angles: cosines and sines [B, T, C].
            mask: bool[B, 1, T, S].
            start: None in a forward pass or prefill (keys from x, S = T); in a decode step, the
                cache slot of x's first position (keys from the whole cache).
            last_only: compute only the last position.
        """
        cfg = self.config

        def heads(name: str, count: int, x: Array) -> Array:
            y = layers.dense(count * cfg.head_dim, cfg.qkv_bias, self.dtype, name)(x)
            y = y.reshape(*x.shape[:2], count, cfg.head_dim)
            return sharding.heads(y, "heads" if name == "q_proj" else "kv_heads")

        asking, asking_angles = x, angles
        if last_only:
            asking, asking_angles, mask = last_queries(x, angles, mask)
        query = layers.rotate(heads("q_proj", cfg.num_heads, asking), *asking_angles)
        key = layers.rotate(heads("k_proj", cfg.num_kv_heads, x), *angles)
        value = heads("v_proj", cfg.num_kv_heads, x)
        y = sharding.heads(attend_through_cache(self, query, key, value, mask, start))
        y = y.reshape(*asking.shape[:2], -1)
        return layers.dense(x.shape[-1], cfg.output_bias, self.dtype, "o_proj")(y)


class DecoderLayer(nn.Module):
    """A pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        angles: tuple[Array, Array],
        mask: Array,
        start: Array | None,
        last_only: bool = False,
    ) -> Array:
        """Maps x[B, T, D] to the residual stream after this layer, of which `last_only` keeps the
        last position: [B, T, D] or [B, 1, D].
        """
        cfg = self.config

        def norm(name: str) -> nn.RMSNorm:
            return nn.RMSNorm(epsilon=cfg.norm_eps, dtype=self.dtype, name=name)

        y = norm("input_layernorm")(x)
        y = Attention(cfg, self.dtype, name="self_attn")(y, angles, mask, start, last_only)
        x = sharding.residual((x[:, -1:] if last_only else x) + y)
        y = norm("post_attention_layernorm")(x)
        mlp = layers.GatedMLP(
            cfg.intermediate_size, cfg.hidden_act, cfg.mlp_bias, self.dtype, name="mlp"
        )
        return sharding.residual(x + mlp(y))


class Decoder(nn.Module):
    """Maps embeddings to states after the final norm. Layers are unrolled (see `capture`)."""

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        cfg = self.config
        self.embed_tokens = layers.Embed(cfg.vocab_size, cfg.hidden_size, dtype=self.dtype)
        self.layers = [DecoderLayer(cfg, self.dtype) for _ in range(cfg.num_layers)]
        self.norm = nn.RMSNorm(epsilon=cfg.norm_eps, dtype=self.dtype)

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
            positions: int32[B, T]; or int32[B, T, 3] (time, height, width), if the configuration
                has `rope_sections`.
            mask: bool[B, 1, T, S].
            start: cache slot of the first position in a decode step; else None.
            last_only: compute only the last position in the last layer.

        Returns:
            [B, T, D], or [B, 1, D] with `last_only`.
        """
        cfg = self.config
        x = sharding.residual(x)
        angles = layers.rotary_angles(positions, cfg.head_dim, cfg.rope_theta, cfg.rope_sections)
        if cfg.sliding_window is not None:
            mask = mask & within_window(mask.shape, cfg.sliding_window, start)
        *first, last = self.layers
        for layer in first:
            x = layer(x, angles, mask, start)
        return self.norm(last(x, angles, mask, start, last_only))


class CausalLM(nn.Module):
    """A decoder and its language-model head, with the module names of the checkpoints."""

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.model = Decoder(self.config, self.dtype)
        if not self.config.tie_embeddings:
            self.lm_head = layers.head(self.config.vocab_size, self.dtype)

    def unembed(self, x: Array) -> Array:
        """Maps x[..., D] to logits float32[..., V] with the head, without the final norm."""
        if self.config.tie_embeddings:
            return sharding.logits(self.model.embed_tokens.attend(x))
        return sharding.logits(self.lm_head(x))


def init_cache(
    config: DecoderConfig,
    batch: int,
    slots: int,
    dtype: jnp.dtype,
    path: tuple[str, ...] = ("layers_{}", "self_attn"),
) -> dict:
    """Makes an empty cache.

    The layout, key[B, N, C, slots] and value[B, N, slots, C], is the one that the products of a
    decode step read: transposing the whole cache at every step would cost more than the products.

    Args:
        config: the decoder's sizes.
        batch: number of rows, B.
        slots: number of positions.
        dtype: dtype of keys and values.
        path: names of the modules that hold the cache, with {} for the number of the layer.

    Returns:
        {layers_i: {self_attn: {key, value}}} for the default path, all zeros.
    """
    heads = (batch, config.num_kv_heads)
    block = {
        "key": _constrain_cache(jnp.zeros((*heads, config.head_dim, slots), dtype)),
        "value": _constrain_cache(jnp.zeros((*heads, slots, config.head_dim), dtype)),
    }
    layer, *inner = path
    for name in reversed(inner):
        block = {name: block}
    return {layer.format(i): block for i in range(config.num_layers)}


def causal_mask(attention_mask: Array) -> Array:
    """Makes the mask with which each position sees itself and all earlier tokens.

    Args:
        attention_mask: int[B, T], nonzero at tokens; or bool[B, T, T], which position sees which
            (packed sequences), which only gains the axis of the heads.

    Returns:
        bool[B, 1, T, T].
    """
    if attention_mask.ndim == 3:
        return attention_mask.astype(bool)[:, None]
    length = attention_mask.shape[-1]
    visible = attention_mask.astype(bool)[:, None, None, :]
    return visible & jnp.tri(length, dtype=bool)


def within_window(shape: tuple[int, ...], window: int, start: Array | None) -> Array:
    """Makes the mask of a sliding window.

    Args:
        shape: [..., T, S].
        window: number of positions that a query sees, including its own.
        start: slot of the first query; None for 0.

    Returns:
        bool[T, S]; later positions are not masked here.
    """
    query = (0 if start is None else start) + jnp.arange(shape[-2])
    return query[:, None] - jnp.arange(shape[-1]) < window


def token_positions(attention_mask: Array) -> Array:
    """Numbers the tokens of each row, ignoring padding: attention_mask int[B, T] -> int32[B, T]."""
    return jnp.maximum(jnp.cumsum(attention_mask.astype(jnp.int32), axis=-1) - 1, 0)
