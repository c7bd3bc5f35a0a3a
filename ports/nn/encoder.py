"""The transformer encoder of CLIP and SigLIP; BERT shares its configuration.

I images or texts, P positions, D width, H heads.
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

# Sharding rules of the parameters.
AXES: sharding.Axes = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "out_proj": ("heads", "embed"),
    "fc1": ("embed", "mlp"),
    "fc2": ("mlp", "embed"),
    **dict.fromkeys(("layer_norm1", "layer_norm2"), ()),
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and constants of a transformer encoder (CLIP's, SigLIP's, BERT's)."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    hidden_act: str
    norm_eps: float

    @classmethod
    def from_hf(cls, config: Any) -> "EncoderConfig":
        """Reads a transformers configuration such as CLIPVisionConfig.

        Raises:
            ValueError: the width is not a multiple of the heads, or the activation is not
                implemented.
        """
        layers.activation(config.hidden_act)
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"hidden_size {config.hidden_size} of the {config.model_type} is not a multiple of "
                f"its {config.num_attention_heads} attention heads"
            )
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            hidden_act=config.hidden_act,
            # Pixtral's is not in its configuration.
            norm_eps=getattr(config, "layer_norm_eps", 1e-5),
        )


class EncoderAttention(nn.Module):
    """Multi-head self-attention with biases, as in CLIP and SigLIP."""

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Maps x[I, P, D] and optional mask bool[I or 1, 1, P or 1, P] to [I, P, D]."""
        width = x.shape[-1]

        def heads(name: str) -> Array:
            y = layers.dense(width, True, self.dtype, name)(x)
            return sharding.heads(y.reshape(*x.shape[:2], self.num_heads, width // self.num_heads))

        y = attention.attend(heads("q_proj"), heads("k_proj"), heads("v_proj"), mask)
        y = attention.Heads(name="heads")(y)
        return layers.dense(width, True, self.dtype, "out_proj")(y)


class EncoderLayer(nn.Module):
    """A pre-norm block of CLIP's and SigLIP's towers."""

    config: EncoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Maps x[I, P, D] to [I, P, D]."""
        cfg = self.config
        y = layers.layer_norm(cfg.norm_eps, self.dtype, "layer_norm1")(x)
        y = EncoderAttention(cfg.num_heads, self.dtype, name="self_attn")(y, mask)
        x = sharding.residual(x + y)
        y = layers.layer_norm(cfg.norm_eps, self.dtype, "layer_norm2")(x)
        mlp = layers.MLP(cfg.intermediate_size, cfg.hidden_act, self.dtype, name="mlp")
        return sharding.residual(x + mlp(y))


class Encoder(nn.Module):
    """A stack of blocks that returns the states before the first block and after each block."""

    config: EncoderConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.layers = [EncoderLayer(self.config, self.dtype) for _ in range(self.config.num_layers)]

    def __call__(self, x: Array, mask: Array | None = None) -> tuple[Array, ...]:
        """Maps x[I, P, D] to num_layers + 1 states [I, P, D]."""
        states = [sharding.residual(x)]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        return tuple(states)
