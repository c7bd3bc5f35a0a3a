"""The decoder of the Llama family (Llama, Mistral, Qwen, Gemma) and its key-value cache.

B batch, T query positions, S key positions (cache slots), D width, V vocabulary,
H query heads, N key-value heads, C head width.

The cache is Linen's variable collection "cache": `init_cache` makes it, and a call with this
collection among the (mutable) variables writes keys and values to it. Without it, a call is a plain
forward pass. A filled cache may also be passed as the collection "prompt_cache", which is read-only
and whose slots come first; several continuations of one prompt can share it.
"""

import contextlib
import contextvars
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from ports import names
from ports.nn import attention, layers
from ports.nn import rope as rotary
from ports.nn.decoder_config import DecoderConfig
from ports.parallel import sharding

Array = jax.Array

names.number("deepstack")
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
    **dict.fromkeys(("pre_feedforward_layernorm", "post_feedforward_layernorm"), ()),
    **dict.fromkeys(("q_norm", "k_norm"), ()),
}


_recomputes: contextvars.ContextVar[bool] = contextvars.ContextVar("recomputes", default=False)


@contextlib.contextmanager
def recomputing(is_on: bool) -> Iterator[None]:
    """While open, decoders are traced so that gradients keep the states between layers alone.

    What is inside a layer is computed again for its gradients: `nn.remat` of each layer.
    """
    token = _recomputes.set(is_on)
    try:
        yield
    finally:
        _recomputes.reset(token)


def layer_kind(kind: Any, *static: str) -> Any:
    """Returns a layer's class, or while `recomputing`, one that is computed again for gradients.

    Args:
        kind: the layer's Linen class.
        *static: names of those arguments of `__call__` that are not arrays; they are passed by
            position.
    """
    if not _recomputes.get():
        return kind
    names = list(inspect.signature(kind.__call__).parameters)  # "self" counts as argument 0
    return nn.remat(kind, static_argnums=tuple(map(names.index, static)))


def attend_through_cache(
    module: nn.Module,
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    start: Array | None,
    *,
    window: int | None = None,
    scalar: float | None = None,
    softcap: float | None = None,
) -> Array:
    """Computes attention, writing keys and values to the module's cache if it has one.

    Args:
        module: the calling attention module.
        query: [B, T, H, C]; in a forward pass or prefill also the last T positions alone.
        key: [B, S, N, C], or in a decode step [B, T, N, C].
        value: like key.
        mask: bool[B, 1, T, S], which position sees which. In a forward pass or prefill,
            bool[B, 1, 1, S] tells which positions are tokens, of which a query sees itself and
            all earlier ones.
        start: None in a forward pass or prefill, where queries see the given keys. In a decode
            step, the slot of the first new key; queries see the whole cache, after the prompt's
            cache if that is separate.
        window: number of positions that a query sees, including its own; None for all earlier ones.
        scalar: as for `attention.attend`.
        softcap: as for `attention.attend`.

    Returns:
        [B, T, H, C].
    """
    options: dict[str, Any] = {"window": window, "scalar": scalar, "softcap": softcap}
    parts = []
    if module.has_variable("cache", "key"):
        keys, values = (module.get_variable("cache", name) for name in ("key", "value"))
        slot = 0 if start is None else start
        if module.has_variable("prompt_cache", "key"):
            parts = [tuple(module.get_variable("prompt_cache", name) for name in ("key", "value"))]
            slot -= parts[0][0].shape[-1]
        new_keys, new_values = attention.cache_layout(key, value)
        keys, values = _with_new(keys, values, new_keys, new_values, slot)
        parts = [*parts, (_constrain_cache(keys), _constrain_cache(values))]
        module.put_variable("cache", "key", parts[-1][0])
        module.put_variable("cache", "value", parts[-1][1])
    if start is None:
        return attention.attend(query, key, value, mask, causal=mask.shape[2] == 1, **options)
    return attention.attend_cached(query, parts, mask, first=start, **options)


def _with_new(
    keys: Array, values: Array, new_keys: Array, new_values: Array, slot: Array | int
) -> tuple[Array, Array]:
    """Writes new keys [B, N, C, T] and values [B, N, T, C] to a cache, from a slot on."""
    zero = 0 * slot  # has the dtype of `slot`; a plain 0 would not with 64-bit numbers enabled
    starts = (zero, zero, zero, slot), (zero, zero, slot, zero)
    given = ((keys, new_keys), (values, new_values))
    if is_squeezed(len(keys)):
        given = tuple((cache[0], new[0]) for cache, new in given)
        starts = starts[0][1:], starts[1][1:]
    written = [
        jax.lax.dynamic_update_slice(cache, new, start)
        for (cache, new), start in zip(given, starts, strict=True)
    ]
    keys, values = (x[None] for x in written) if is_squeezed(len(keys)) else written
    return keys, values


def is_squeezed(batch: int) -> bool:
    """Returns whether a loop should carry caches without their axis of rows.

    XLA multiplies a single row without this axis. On a CPU it would write such a cache twice at
    every step, with and without the axis, and copy it four times.
    """
    return batch == 1 and jax.default_backend() == "cpu" and not sharding.is_on_mesh()


def _constrain_cache(x: Array) -> Array:
    """Shards keys [B, N, C, S] or values [B, N, S, C]: rows on "data", whole heads on "model"."""
    return sharding.constrain(x, "batch", "kv_heads", "embed", "positions")


def last_queries(
    x: Array, angles: tuple[Array, Array], mask: Array
) -> tuple[Array, tuple[Array, Array], Array]:
    """Selects the last of x[B, T, D], angles [B, T, C] and the T or 1 rows of a mask."""
    cos, sin = angles
    return x[:, -1:], (cos[:, -1:], sin[:, -1:]), mask[:, :, -1:]


def _norm(config: DecoderConfig, dtype: DTypeLike, name: str | None = None) -> nn.Module:
    kind = layers.OffsetRMSNorm if config.offset_norms else layers.RMSNorm
    return kind(epsilon=config.norm_eps, dtype=dtype, name=name)


class Attention(nn.Module):
    """Self-attention with rotary positions, grouped queries and an optional cache."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        angles: tuple[Array, Array],
        mask: Array,
        start: Array | None,
        last_only: bool = False,
        window: int | None = None,
    ) -> Array:
        """Maps x[B, T, D] to [B, T, D], or with `last_only` to [B, 1, D].

        Args:
            x: the states.
            angles: cosines and sines [B, T, C].
            mask: as for `attend_through_cache`.
            start: None in a forward pass or prefill (keys from x, S = T); in a decode step, the
                cache slot of x's first position (keys from the whole cache).
            last_only: compute only the last position.
            window: number of positions that a query sees, including its own; None for all earlier
                ones.
        """
        cfg = self.config

        def heads(part: str, count: int, x: Array) -> Array:
            y = layers.dense(count * cfg.head_dim, cfg.qkv_bias, self.dtype, f"{part}_proj")(x)
            if cfg.joint_qk_norm and part != "v":
                y = _norm(cfg, self.dtype, f"{part}_norm")(y)
            y = y.reshape(*x.shape[:2], count, cfg.head_dim)
            return sharding.heads(y, "heads" if part == "q" else "kv_heads")

        def turned(part: str, count: int, x: Array, angles: tuple[Array, Array]) -> Array:
            y = heads(part, count, x)
            if cfg.qk_norm:
                y = _norm(cfg, self.dtype, f"{part}_norm")(y)
            return layers.rotate(y, *angles)

        asking, asking_angles = x, angles
        if last_only:
            asking, asking_angles, mask = last_queries(x, angles, mask)
        query = turned("q", cfg.num_heads, asking, asking_angles)
        key = turned("k", cfg.num_kv_heads, x, angles)
        value = heads("v", cfg.num_kv_heads, x)
        y = attend_through_cache(
            self,
            query,
            key,
            value,
            mask,
            start,
            window=window,
            scalar=cfg.score_scalar,
            softcap=cfg.score_softcap,
        )
        y = attention.Heads(name="heads")(y)
        return layers.dense(x.shape[-1], cfg.output_bias, self.dtype, "o_proj")(y)


class DecoderLayer(nn.Module):
    """A pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)).

    With `post_norms`, attention and MLP are each followed by a norm before the sum; with
    `norms_after`, the norms follow them instead: x + norm(attention(x)), then x + norm(mlp(x)).
    """

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        angles: tuple[Array, Array],
        mask: Array,
        start: Array | None,
        last_only: bool = False,
        window: int | None = None,
    ) -> Array:
        """Maps x[B, T, D] to the residual stream after this layer, of which `last_only` keeps the
        last position: [B, T, D] or [B, 1, D].
        """
        cfg = self.config

        def norm(name: str, x: Array) -> Array:
            return _norm(cfg, self.dtype, name)(x)

        attend = Attention(cfg, self.dtype, name="self_attn")
        y = x if cfg.norms_after else norm("input_layernorm", x)
        y = attend(y, angles, mask, start, last_only, window)
        if cfg.post_norms or cfg.norms_after:
            y = norm("post_attention_layernorm" if cfg.post_norms else "input_layernorm", y)
        x = sharding.residual((x[:, -1:] if last_only else x) + y)
        of_mlp = "pre_feedforward_layernorm" if cfg.post_norms else "post_attention_layernorm"
        y = x if cfg.norms_after else norm(of_mlp, x)
        mlp = layers.GatedMLP(
            cfg.intermediate_size, cfg.hidden_act, cfg.mlp_bias, self.dtype, name="mlp"
        )
        y = mlp(y)
        if cfg.post_norms or cfg.norms_after:
            y = norm("post_feedforward_layernorm" if cfg.post_norms else of_mlp, y)
        return sharding.residual(x + y)


class Injection(nn.Module):
    """Adds features to the states between two layers (DeepStack); a module to be a site."""

    def __call__(self, x: Array, features: Array | None = None) -> Array:
        """Maps x[B, T, D] and features[B, T, D], 0 where there are none, to their sum."""
        if features is None:
            return x
        # Of the last layer, there may be only the last position.
        return sharding.residual(x + features[:, -x.shape[1] :].astype(x.dtype))


class Decoder(nn.Module):
    """Maps embeddings to states after the final norm. Layers are unrolled (see `capture`).

    With injections, the site `layers.N` is the output of layer N before features are added to it,
    and `deepstack.N` the same states after the addition, which layer N + 1 reads.
    """

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        cfg = self.config
        self.embed_tokens = layers.Embed(
            cfg.num_embeddings,
            cfg.hidden_size,
            dtype=self.dtype,
            scale=cfg.hidden_size**0.5 if cfg.scale_embeddings else None,
        )
        kind = layer_kind(DecoderLayer, "last_only", "window")
        self.layers = [kind(cfg, self.dtype) for _ in range(cfg.num_layers)]
        self.deepstack = [Injection() for _ in range(cfg.num_injections)]
        self.norm = _norm(cfg, self.dtype)

    def __call__(
        self,
        x: Array,
        positions: Array,
        mask: Array,
        start: Array | None = None,
        last_only: bool = False,
        *,
        blocks: Array | None = None,
        injections: Sequence[Array] = (),
    ) -> Array:
        """Maps embeddings to states after the final norm.

        Args:
            x: [B, T, D].
            positions: int32[B, T]; or int32[B, T, 3] (time, height, width), if the configuration's
                rotary embedding has sections.
            mask: as for `attend_through_cache`.
            start: cache slot of the first position in a decode step; else None.
            last_only: compute only the last position in the last layer.
            blocks: int[B, T], without `start`; positions with the same number see each other both
                ways, except for -1.
            injections: features [B, T, D] to add after each of the first layers.

        Returns:
            [B, T, D], or [B, 1, D] with `last_only`.
        """
        cfg = self.config
        x = sharding.residual(x)
        ropes = [cfg.rope_of(i) for i in range(cfg.num_layers)]
        angles = {
            rope: rotary.angles(rope, positions, cfg.head_dim) for rope in dict.fromkeys(ropes)
        }
        for i, layer in enumerate(self.layers):
            window, seen = cfg.window_of(i), mask
            if blocks is not None:
                length = x.shape[1]
                limit = None if cfg.window_limits_blocks else window
                window = window if cfg.window_limits_blocks else None
                seen = attention.sees(mask, jnp.arange(length), length, mask.shape[2] == 1, limit)
                same = same_block(blocks)
                seen = same if seen is None else seen | same
            last = last_only and i == cfg.num_layers - 1
            x = layer(x, angles[ropes[i]], seen, start, last, window)
            if i < cfg.num_injections:
                x = self.deepstack[i](x, injections[i] if injections else None)
        return self.norm(x)


class CausalLM(nn.Module):
    """A decoder and its language-model head, with the module names of the checkpoints."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.model = Decoder(self.config, self.dtype)
        if not self.config.tie_embeddings:
            self.lm_head = layers.head(self.config.vocab_size, self.dtype)

    def unembed(self, x: Array) -> Array:
        """Maps x[..., D] to logits float32[..., V] with the head, without the final norm."""
        head = self.model.embed_tokens.attend if self.config.tie_embeddings else self.lm_head
        return sharding.logits(layers.limit(head(x), self.config.logit_softcap))


def init_cache(
    config: DecoderConfig,
    batch: int,
    slots: int,
    dtype: DTypeLike,
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


def same_block(blocks: Array) -> Array:
    """Makes the mask bool[B, 1, T, T] of positions with the same number in int[B, T], not -1."""
    here = blocks[:, None, :, None]
    return (here == blocks[:, None, None, :]) & (here >= 0)


def token_positions(attention_mask: Array) -> Array:
    """Numbers the tokens of each row, ignoring padding: attention_mask int[B, T] -> int32[B, T]."""
    return jnp.maximum(jnp.cumsum(attention_mask.astype(jnp.int32), axis=-1) - 1, 0)
