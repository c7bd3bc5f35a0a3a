"""Layers that the decoders and the vision towers share.

B batch, T query positions, S key positions, D width,
H query heads, N key-value heads, C head width.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.custom_derivatives import SymbolicZero

from ports.parallel import sharding

Array = jax.Array


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""
    return x * nn.sigmoid(1.702 * x)


# The activations by the names that Hugging Face configurations use.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": quick_gelu,
    "relu": nn.relu,
    "silu": nn.silu,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The activation of that Hugging Face name; ValueError for one that no port implements."""
    if name not in ACTIVATIONS:
        raise ValueError(
            f"config asks for the activation {name!r}; the ports implement {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def layer_norm(epsilon: float, dtype: jnp.dtype, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm with the two-pass variance, which agrees with PyTorch to the last few bits."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def _flat_dot(x: Array, kernel: Array, _: Any, **options: Any) -> Array:
    """x[..., D] @ kernel[D, E] with all positions as rows of one matrix.

    XLA's CPU backend takes half the time for the gradients of this product; elsewhere it is the
    same computation.
    """
    y = jax.lax.dot(x.reshape(-1, x.shape[-1]), kernel, **options)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def dense(width: int, use_bias: bool, dtype: jnp.dtype, name: str | None = None) -> nn.Dense:
    """A linear layer; its kernel is (in, out), the transpose of PyTorch's."""
    return nn.Dense(width, use_bias=use_bias, dtype=dtype, dot_general=_flat_dot, name=name)


@jax.custom_jvp
def product_in_float32(x: Array, kernel: Array) -> Array:
    """x[..., D] @ kernel[D, E] with sums and result in float32, whatever the dtype of the two.

    The kernel is not converted (where XLA's CPU backend does, for some layouts, it did before).
    Gradients are computed in the dtype of x, as those of any layer: a product of float32 and
    bfloat16 would convert the whole kernel.
    """
    return _flat_dot(x, kernel, None, preferred_element_type=jnp.float32)


@functools.partial(product_in_float32.defjvp, symbolic_zeros=True)
def _product_in_float32_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    y = product_in_float32(x, kernel)
    # Of a kernel that stays as it is there is no tangent, and no product with it.
    terms = [
        _flat_dot(a, b, None).astype(y.dtype)
        for a, b in ((dx, kernel), (x, dkernel))
        if not isinstance(a, SymbolicZero) and not isinstance(b, SymbolicZero)
    ]
    return y, sum(terms, start=jnp.zeros_like(y))


def head(width: int, dtype: jnp.dtype) -> nn.Dense:
    """A language-model head: a linear layer without bias whose logits are float32 in every dtype.

    Rounded to bfloat16 the largest logits tie, and another token would be taken.
    """
    return nn.Dense(width, use_bias=False, dtype=dtype, dot_general=_head_dot)


def _head_dot(x: Array, kernel: Array, *_: Any, **__: Any) -> Array:
    return product_in_float32(x, kernel)


def look_up(table: Array, tokens: Array) -> Array:
    """Rows of the table [V, D] for tokens int[...] -> [..., D]; NaN for an id outside of it."""
    # A negative index would count from the end.
    index = jnp.where(tokens < 0, len(table), tokens)
    return table.at[index].get(mode="fill", fill_value=jnp.nan)


class Embed(nn.Embed):
    """A table of token embeddings, which is also a tied head; an id outside of it gives NaN."""

    def __call__(self, tokens: Array) -> Array:
        """tokens int[...] -> [..., D]."""
        return look_up(self.embedding.astype(self.dtype), tokens)

    def attend(self, query: Array) -> Array:
        """query[..., D] -> logits float32[..., V] (see `head`)."""
        return product_in_float32(query.astype(self.dtype), self.embedding.astype(self.dtype).T)


def rotary_angles(
    positions: Array, head_dim: int, theta: float, sections: tuple[int, ...] | None = None
) -> tuple[Array, Array]:
    """The cosines and sines float32[B, T, C] of rotary position embedding (Su et al. 2021).

    positions: int32[B, T]. The frequencies are laid out for rotating the two halves of a head
    against each other, as in the Llama family.
    sections: for positions int32[B, T, len(sections)], how many frequencies turn with each of the
    components (Qwen2-VL, Wang et al. 2024, section 2.1); positions without that axis are the same
    in all of them.
    """
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if positions.ndim == 3:
        assert sections is not None, "positions with components need their sections"
        component = np.repeat(np.arange(len(sections)), sections)
        angles = positions[..., component].astype(jnp.float32) * frequencies
    else:
        angles = positions[..., None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the heads x[B, T, H, C] by the angles [B, T, C]; keeps the dtype of x."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return (x * cos + turned * sin).astype(x.dtype)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)): the feed-forward layer of the Llama family."""

    intermediate_size: int
    hidden_act: str = "silu"
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    output_size: int | None = None  # None: the input's width

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x[B, T, D] -> [B, T, output_size]."""

        def linear(width: int, name: str) -> nn.Dense:
            return dense(width, self.use_bias, self.dtype, name)

        gate = linear(self.intermediate_size, "gate_proj")(x)
        up = linear(self.intermediate_size, "up_proj")(x)
        width = self.output_size or x.shape[-1]
        y = activation(self.hidden_act)(gate) * up
        y = sharding.constrain(y, "batch", "positions", "mlp")
        return linear(width, "down_proj")(y)


class MLP(nn.Module):
    """fc2(act(fc1(x))): the feed-forward layer of the vision towers and of CLIP's text tower."""

    intermediate_size: int
    hidden_act: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x[B, T, D] -> [B, T, D]."""
        width = x.shape[-1]
        x = dense(self.intermediate_size, True, self.dtype, "fc1")(x)
        x = sharding.constrain(activation(self.hidden_act)(x), "batch", "positions", "mlp")
        return dense(width, True, self.dtype, "fc2")(x)


def attend(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """Scaled dot-product attention, softmax in float32.

    query[B, T, H, C], key and value[B, S, N, C] with H a multiple of N (grouped queries),
    mask bool[B, 1, T, S] or None -> [B, T, H, C].
    """
    return attend_cached(query, [cache_layout(key, value)], mask)


def cache_layout(key: Array, value: Array) -> tuple[Array, Array]:
    """[B, S, N, C] each -> key[B, N, C, S] and value[B, N, S, C], as products read them."""
    return jnp.transpose(key, (0, 2, 3, 1)), jnp.transpose(value, (0, 2, 1, 3))


def attend_cached(query: Array, parts: Sequence[tuple[Array, Array]], mask: Array | None) -> Array:
    """`attend` to the keys[B, N, C, S] and values[B, N, S, C] of a cache's parts, in a row.

    query[B, T, H, C], H a multiple of N; mask bool[B, 1, T, S of all parts] or None
    -> [B, T, H, C].
    """
    batch, length, _, width = query.shape
    kv_heads = parts[0][0].shape[1]
    # The queries of a key-value head are rows of one matrix: plain products, batched over (B, N).
    rows = jnp.moveaxis(query.reshape(batch, length, kv_heads, -1, width), 1, 3)
    rows = rows.reshape(batch, kv_heads, -1, width)
    scores = jnp.concatenate(
        [jnp.matmul(rows, key, preferred_element_type=jnp.float32) for key, _ in parts], axis=-1
    )
    scores = scores.reshape(batch, kv_heads, -1, length, scores.shape[-1]) / np.sqrt(width)
    if mask is not None:
        # Not -inf: the row of a position that sees nothing would be NaN.
        scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    weights = weights.reshape(batch, kv_heads, -1, scores.shape[-1])
    ends = np.cumsum([value.shape[2] for _, value in parts])[:-1]
    products = (
        part @ value
        for part, (_, value) in zip(jnp.split(weights, ends, axis=-1), parts, strict=True)
    )
    y = functools.reduce(jnp.add, products)
    y = jnp.moveaxis(y.reshape(batch, kv_heads, -1, length, width), 3, 1)
    return y.reshape(query.shape)
