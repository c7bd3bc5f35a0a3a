"""The resampler of Idefics2: learnt latents that see an image (Perceiver, Alayrac et al. 2022).

I images, P patches per image, L latents, D the decoder's width.
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

# Sharding rules of the parameters; the rest are those of the decoder.
AXES: sharding.Axes = dict.fromkeys(("latents", "input_latents_norm", "input_context_norm"), ())


@dataclasses.dataclass(frozen=True)
class PerceiverConfig:
    """Sizes and constants of the resampler, which has the decoder's width."""

    num_latents: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_act: str
    norm_eps: float

    @classmethod
    def from_hf(cls, config: Any) -> "PerceiverConfig":
        """Reads a transformers Idefics2PerceiverConfig.

        Raises:
            ValueError: a value is invalid.
        """
        layers.activation(config.hidden_act)
        if config.resampler_n_heads % config.num_key_value_heads:
            raise ValueError(
                f"perceiver_config has {config.resampler_n_heads} attention heads, which is not a "
                f"multiple of its {config.num_key_value_heads} key-value heads"
            )
        return cls(
            num_latents=config.resampler_n_latents,
            num_layers=config.resampler_depth,
            num_heads=config.resampler_n_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.resampler_head_dim,
            hidden_act=config.hidden_act,
            norm_eps=config.rms_norm_eps,
        )


class PerceiverAttention(nn.Module):
    """Attention of the latents to the image and to themselves, with grouped queries."""

    config: PerceiverConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, latents: Array, context: Array, mask: Array) -> Array:
        """Maps latents[I, L, D], context[I, P, D] and mask bool[I, 1, 1, P + L] to [I, L, D]."""
        cfg = self.config

        def heads(name: str, x: Array, count: int) -> Array:
            y = layers.dense(count * cfg.head_dim, False, self.dtype, name)(x)
            y = y.reshape(*x.shape[:2], count, cfg.head_dim)
            return sharding.heads(y, "heads" if name == "q_proj" else "kv_heads")

        both = jnp.concatenate([context, latents], axis=1)
        query = heads("q_proj", latents, cfg.num_heads)
        key = heads("k_proj", both, cfg.num_kv_heads)
        value = heads("v_proj", both, cfg.num_kv_heads)
        y = attention.Heads(name="heads")(attention.attend(query, key, value, mask))
        return layers.dense(latents.shape[-1], False, self.dtype, "o_proj")(y)


class PerceiverLayer(nn.Module):
    """A pre-norm block on the latents; the image's features do not change."""

    config: PerceiverConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, latents: Array, context: Array, mask: Array) -> Array:
        """Maps latents[I, L, D], context[I, P, D] and mask bool[I, 1, 1, P + L] to [I, L, D]."""
        cfg = self.config

        def norm(name: str) -> nn.RMSNorm:
            return layers.RMSNorm(epsilon=cfg.norm_eps, dtype=self.dtype, name=name)

        y = norm("input_latents_norm")(latents)
        context = norm("input_context_norm")(context)
        y = PerceiverAttention(cfg, self.dtype, name="self_attn")(y, context, mask)
        latents = sharding.residual(latents + y)
        y = norm("post_attention_layernorm")(latents)
        mlp = layers.GatedMLP(4 * y.shape[-1], cfg.hidden_act, dtype=self.dtype, name="mlp")
        return sharding.residual(latents + mlp(y))


class PerceiverResampler(nn.Module):
    """Learnt latents gather an image of any size into L features (Alayrac et al. 2022)."""

    config: PerceiverConfig
    width: int  # D
    dtype: DTypeLike = jnp.float32

    def setup(self):
        cfg = self.config
        shape = (cfg.num_latents, self.width)
        self.latents = self.param("latents", nn.initializers.ones, shape)
        self.layers = [PerceiverLayer(cfg, self.dtype) for _ in range(cfg.num_layers)]
        self.norm = layers.RMSNorm(epsilon=cfg.norm_eps, dtype=self.dtype)

    def __call__(self, context: Array, mask: Array) -> Array:
        """Maps context[I, P, D] and mask bool[I, P] to [I, L, D]."""
        images = len(context)
        latents = jnp.broadcast_to(
            self.latents.astype(self.dtype), (images, self.config.num_latents, self.width)
        )
        mask = jnp.concatenate([mask, jnp.ones(latents.shape[:2], bool)], axis=1)[:, None, None]
        for layer in self.layers:
            latents = layer(latents, context, mask)
        return self.norm(latents)
