"""The decoder of the Llama family (Llama, Mistral, Qwen2) and its key-value cache.

B batch, T query positions, S key positions (cache slots), D width, V vocabulary,
H query heads, N key-value heads, C head width.

The cache is Linen's variable collection "cache": `init_cache` makes it, and a call with it in the
variables (and mutable) writes keys and values into it. Without it the call is a plain forward pass.
A filled cache may also be given as the collection "prompt_cache", which is read only: its slots
come first. Several continuations of one prompt then share it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ports.nn import layers
from ports.parallel import sharding

Array = jax.Array

# Where the parameters lie on a mesh.
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
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    tie_embeddings: bool
    # How many positions a query sees, itself counted; None: all that precede.
    sliding_window: int | None = None
    # Multimodal rotary embedding: how many frequencies turn with time, height and width.
    rope_sections: tuple[int, ...] | None = None

    @classmethod
    def from_hf(cls, text: Any, tie_embeddings: bool, model_type: str) -> "DecoderConfig":
        """Reads the transformers text configuration of that model_type.

        model_type: "llama", "mistral" or "qwen2_vl_text"; what the joined model's decoder is.
        ValueError for another one, or for a value that is not implemented.
        """
        if text.model_type != model_type:
            raise ValueError(
                f"text_config.model_type is {text.model_type!r}; this port implements "
                f"{model_type!r}"
            )
        rope = dict(text.rope_parameters)
        # transformers calls rotary embedding in sections "default" or, in older files, "mrope".
        if rope.get("rope_type", "default") not in ("default", "mrope"):
            raise ValueError(
                f"text_config asks for rope_type {rope['rope_type']!r}; "
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
                f"text_config has {text.num_attention_heads} attention heads, which is no multiple "
                f"of its {text.num_key_value_heads} key-value heads"
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
            # Qwen2 has biases at query, key and value, without an entry in its configuration.
            qkv_bias=getattr(text, "attention_bias", model_type == "qwen2_vl_text"),
            output_bias=getattr(text, "attention_bias", False),
            mlp_bias=getattr(text, "mlp_bias", False),
            tie_embeddings=tie_embeddings,
            sliding_window=_sliding_window(text),
            rope_sections=None if sections is None else tuple(sections),
        )


def _sliding_window(text: Any) -> int | None:
    """The window of a text configuration; ValueError if only some of the layers have one."""
    window = getattr(text, "sliding_window", None)
    if window is None or not getattr(text, "use_sliding_window", True):
        return None
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention"])
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise ValueError(
            f"text_config.layer_types mixes {' and '.join(sorted(kinds))}; one kind for all layers "
            "is implemented"
        )
    return window


def attend_through_cache(
    module: nn.Module, query: Array, key: Array, value: Array, mask: Array, start: Array | None
) -> Array:
    """Attention to keys and values [B, T, N, C], which go into the module's cache if it has one.

    query[B, T, H, C], mask bool[B, 1, T, S] -> [B, T, H, C]. In a forward pass or a prefill (start
    is None) a query sees the given keys, S = T; in a decode step that begins at slot `start`, the
    whole cache, behind that of the prompt if it is given apart.
    """
    if not module.has_variable("cache", "key"):
        return layers.attend(query, key, value, mask)
    keys, values = (module.get_variable("cache", name) for name in ("key", "value"))
    parts, slot = [], 0 if start is None else start
    if module.has_variable("prompt_cache", "key"):
        parts = [tuple(module.get_variable("prompt_cache", name) for name in ("key", "value"))]
        slot -= parts[0][0].shape[-1]
    key, value = layers.cache_layout(key, value)
    zero = 0 * slot  # of the same type, which a plain 0 is not where numbers have 64 bits
    keys = _constrain_cache(jax.lax.dynamic_update_slice(keys, key, (zero, zero, zero, slot)))
    values = _constrain_cache(jax.lax.dynamic_update_slice(values, value, (zero, zero, slot, zero)))
    module.put_variable("cache", "key", keys)
    module.put_variable("cache", "value", values)
    if start is None:
        return layers.attend_cached(query, [(key, value)], mask)
    return layers.attend_cached(query, [*parts, (keys, values)], mask)


def _constrain_cache(x: Array) -> Array:
    """Keys [B, N, C, S] or values [B, N, S, C]: rows on "data", whole heads on "model"."""
    return sharding.constrain(x, "batch", "kv_heads", "embed", "positions")


def last_queries(
    x: Array, angles: tuple[Array, Array], mask: Array
) -> tuple[Array, tuple[Array, Array], Array]:
    """x[B, T, D], angles [B, T, C] and mask bool[B, 1, T, S] of the last position alone."""
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
        """x[B, T, D], mask bool[B, 1, T, S] -> [B, T, D], or with last_only [B, 1, D].

        start: None for a forward pass or a prefill (the keys are those of x, S = T); in a decode
        step the cache slot of x's first position (the keys are the whole cache).
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
        """x[B, T, D] -> [B, T, D]: the residual stream after this layer; last_only: [B, 1, D]."""
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
    """Embeddings in, states after the final norm out. Layers are unrolled (see `capture`)."""

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
        """x[B, T, D], positions int32[B, T], mask bool[B, 1, T, S] -> states [B, T, D].

        last_only: states [B, 1, D] of the last position, which the last layer computes alone.
        positions may have a last axis of three, (time, height, width), if the configuration
        divides the rotary embedding in sections.
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
        """x[..., D] -> logits float32[..., V]: the head alone, without the final norm."""
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
    """A decoder's empty cache: {layers_i: {self_attn: {key, value}}}, zeros.

    key[B, N, C, slots] and value[B, N, slots, C] lie as the products of a decode step read them:
    a transposed copy of the whole cache at every step would cost more than the products.
    path: the modules, {} for the number of the layer, in which the cache lies.
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
    """attention_mask int[B, T] -> bool[B, 1, T, T]: each position sees itself and what precedes.

    A mask that is three-dimensional already, bool[B, T, T], says itself which position sees which
    (packed sequences) and only gains the axis of the heads.
    """
    if attention_mask.ndim == 3:
        return attention_mask.astype(bool)[:, None]
    length = attention_mask.shape[-1]
    visible = attention_mask.astype(bool)[:, None, None, :]
    return visible & jnp.tri(length, dtype=bool)


def within_window(shape: tuple[int, ...], window: int, start: Array | None) -> Array:
    """bool[T, S]: whether the key in a slot is one of the `window` up to the query's own.

    shape: [..., T, S]; the queries lie in the slots from `start` (None: 0) on.
    """
    query = (0 if start is None else start) + jnp.arange(shape[-2])
    return query[:, None] - jnp.arange(shape[-1]) < window


def token_positions(attention_mask: Array) -> Array:
    """int[B, T] -> int32[B, T]: positions counted over the tokens, so that padding changes none."""
    return jnp.maximum(jnp.cumsum(attention_mask.astype(jnp.int32), axis=-1) - 1, 0)
