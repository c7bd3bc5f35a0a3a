"""Layers shared by the decoders and the vision towers.

B batch, T positions, D width, H heads, C head width.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from ports import names
from ports.parallel import sharding

Array = jax.Array

COLUMNS = 256  # of a bfloat16 kernel that are converted at a time on a CPU
# On a CPU, float32 products with 2 to FEW_ROWS rows and kernels of at least LARGE_KERNEL elements
# (1 MB, a core's second-level cache) are written in the order that XLA runs faster.
FEW_ROWS = 64
LARGE_KERNEL = 1 << 18


def quick_gelu(x: Array) -> Array:
    """Computes x * sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""
    return x * nn.sigmoid(1.702 * x)


# Activations by their names in Hugging Face configurations.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": quick_gelu,
    "relu": nn.relu,
    "silu": nn.silu,
}


def activation(name: str) -> Callable[[Array], Array]:
    """Returns the activation with a Hugging Face name.

    Raises:
        ValueError: the activation is not implemented.
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"config has activation {name!r}, which is not implemented; expected one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


class _Given:
    """Reads parameters that exist, for Flax's own layers, without tracing their initializers.

    Flax traces them at every call to learn the shapes, which takes a third of the time to trace a
    program. Here, an unexpected shape is left to Flax and its error.
    """

    def param(self: Any, name: str, init_fn: Callable, *args: Any, **options: Any) -> Any:
        """Returns a parameter, of which `args` begins with the shape, as `nn.Module.param` does."""
        if self.has_variable("params", name):
            value = self.get_variable("params", name)
            if isinstance(value, jax.Array) and value.shape == tuple(args[0]):
                return value
        return super().param(name, init_fn, *args, **options)  # type: ignore[misc]


class Dense(_Given, nn.Dense):
    """`nn.Dense` that is quicker to trace."""


class RMSNorm(_Given, nn.RMSNorm):
    """`nn.RMSNorm` that is quicker to trace."""


class LayerNorm(_Given, nn.LayerNorm):
    """`nn.LayerNorm` that is quicker to trace."""


def layer_norm(epsilon: float, dtype: DTypeLike, name: str | None = None) -> nn.LayerNorm:
    """Returns a LayerNorm with two-pass variance, which matches PyTorch to the last few bits."""
    return LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


class OffsetRMSNorm(nn.Module):
    """RMSNorm that multiplies by 1 + its weight, in float32 (Gemma)."""

    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x[..., D] to [..., D]."""
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32)
        wide = x.astype(jnp.float32)
        y = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return (y * (1 + scale)).astype(self.dtype)


def limit(x: Array, cap: float | None) -> Array:
    """Limits values smoothly to -cap ... cap: cap * tanh(x / cap); None leaves them."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _flat_dot(x: Array, kernel: Array, *_: Any, **options: Any) -> Array:
    """Computes x[..., D] @ kernel[D, E] with all positions as rows of one matrix.

    This halves the time of its gradients on XLA's CPU backend; on accelerators it makes no
    difference.
    """
    y = jax.lax.dot(x.reshape(-1, x.shape[-1]), kernel, **options)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _has_few_rows(x: Array, kernel: Array) -> bool:
    """Returns whether this is a product of a few rows with a large kernel, as in a decode step.

    Under vmap, the rows are those of one of the mapped calls.
    """
    return (
        jax.default_backend() == "cpu"
        and not sharding.is_on_mesh()
        and x.dtype == kernel.dtype == jnp.float32
        and 1 < math.prod(x.shape[:-1]) <= FEW_ROWS
        and kernel.size >= LARGE_KERNEL
    )


def _few_rows_dot(x: Array, kernel: Array, **options: Any) -> Array:
    """Computes x[..., D] @ kernel[D, E] from the transpose of x, for a few rows on a CPU.

    XLA passes such a product to Eigen, any other to YNNPACK, which takes 1.2 to 1.3 times as long
    for 8 or 16 rows. A single row uses neither.
    """
    # Without the barrier, XLA turns x around again.
    columns = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    y = jax.lax.dot_general(columns, kernel, (((0,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _dense_dot(x: Array, kernel: Array, *_: Any, **options: Any) -> Array:
    if _is_widened(x, kernel):
        return product_in_float32(x, kernel).astype(x.dtype)
    if _has_few_rows(x, kernel):
        return _few_rows_dot(x, kernel, **options)
    return _flat_dot(x, kernel, **options)


def dense(width: int, use_bias: bool, dtype: DTypeLike, name: str | None = None) -> nn.Dense:
    """Returns a linear layer; its kernel is (in, out), the transpose of PyTorch's."""
    return Dense(width, use_bias=use_bias, dtype=dtype, dot_general=_dense_dot, name=name)


class FusedDense(Dense):
    """A linear layer that is one in checkpoints, with a kernel and a bias per part here.

    Its site, its output and its adapters are those of the fused layer. In memory the parts are
    apart: columns of one kernel are divided among devices where no part begins, and every split of
    the output would send it around. XLA drops the concatenation if the output is split again.
    """

    widths: tuple[int, ...] = ()  # columns of each part; the parts are those of `names.fuse`

    @property
    def ends(self) -> tuple[int, ...]:
        """Columns at which the output is split: the end of every part but the last."""
        return tuple(itertools.accumulate(self.widths))[:-1]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x[..., D] to [..., features]: all parts, one after the other."""

        def init(key: Array, width: int) -> dict[str, Array]:
            kernel = self.kernel_init(key, (x.shape[-1], width), self.param_dtype)
            bias = {"bias": self.bias_init(key, (width,), self.param_dtype)}
            return {"kernel": kernel} | (bias if self.use_bias else {})

        outputs: list[Array] = []
        promote: Callable[..., Any] = self.promote_dtype
        for name, width in zip(names.parts_of(self.name or ""), self.widths, strict=True):
            weights = self.get_variable("params", name, {})
            shapes = {"kernel": (x.shape[-1], width)} | (
                {"bias": (width,)} if self.use_bias else {}
            )
            # As in `_Given`: of other shapes, Flax says which.
            if {key: value.shape for key, value in weights.items()} != shapes:
                weights = self.param(name, init, width)
            given = x, weights["kernel"], weights.get("bias")
            y, kernel, bias = promote(*given, dtype=self.dtype)
            y = _dense_dot(y, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=self.precision)
            outputs.append(y if bias is None else y + bias)
        return jnp.concatenate(outputs, axis=-1)


def fused(
    x: Array, widths: Sequence[int], use_bias: bool, dtype: DTypeLike, name: str
) -> list[Array]:
    """Adds a fused linear layer to the module that calls this, and calls it.

    Args:
        x: [..., D].
        widths: number of columns of each part.
        use_bias: whether the parts have biases.
        dtype: dtype of the computation.
        name: the layer's name, registered with `names.fuse`.

    Returns:
        The [..., width] of each part.
    """
    layer = FusedDense(sum(widths), use_bias=use_bias, dtype=dtype, widths=tuple(widths), name=name)
    return jnp.split(layer(x), layer.ends, axis=-1)


def _is_widened(x: Array, kernel: Array) -> bool:
    """Returns whether XLA would convert the whole kernel to float32 for this product."""
    return (
        jax.default_backend() == "cpu"
        and not sharding.is_on_mesh()
        and x.dtype == kernel.dtype == jnp.bfloat16
        and kernel.shape[-1] >= COLUMNS
    )


def _widened_dot(x: Array, kernel: Array) -> Array:
    """Computes x[..., D] @ kernel[D, E] in float32, converting a few columns at a time.

    Five to ten times as fast as XLA's own product of bfloat16 on a CPU, for a few rows.
    """
    rows, (_, width) = x.reshape(-1, x.shape[-1]).astype(jnp.float32), kernel.shape
    # XLA moves a conversion of bfloat16 out of the loop, to the whole kernel; not that of bits.
    bits = jax.lax.bitcast_convert_type(kernel, jnp.uint16)

    def step(i: Array, y: Array) -> Array:
        start = jnp.minimum(i * COLUMNS, width - COLUMNS)
        columns = jax.lax.dynamic_slice_in_dim(bits, start, COLUMNS, axis=1).astype(jnp.uint32)
        columns = jax.lax.bitcast_convert_type(columns << 16, jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(y, rows @ columns, start, axis=1)

    y = jnp.zeros((len(rows), width), jnp.float32)
    y = jax.lax.fori_loop(0, -(-width // COLUMNS), step, y)
    return y.reshape(*x.shape[:-1], width)


@jax.custom_jvp
def product_in_float32(x: Array, kernel: Array) -> Array:
    """Computes x[..., D] @ kernel[D, E] with float32 sums and result, for inputs of any dtype.

    The kernel is not converted as a whole (except for some layouts by XLA's CPU backend, with any
    product). Gradients are computed in the dtype of x, like those of any other layer: a product of
    float32 and bfloat16 would convert the whole kernel.
    """
    if _is_widened(x, kernel):
        return _widened_dot(x, kernel)
    return _flat_dot(x, kernel, preferred_element_type=jnp.float32)


@functools.partial(product_in_float32.defjvp, symbolic_zeros=True)
def _product_in_float32_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    y = product_in_float32(x, kernel)
    # A frozen kernel has no tangent: skip that product.
    terms = [
        _flat_dot(a, b).astype(y.dtype)
        for a, b in ((dx, kernel), (x, dkernel))
        if not isinstance(a, SymbolicZero) and not isinstance(b, SymbolicZero)
    ]
    return y, sum(terms, start=jnp.zeros_like(y))


def _table_dot(x: Array, table: Array) -> Array:
    """Computes x[..., D] @ table[V, D].T as the transpose of table @ x.T, for a few rows on a CPU.

    XLA then copies the small factor into the order that it needs, not the table.
    """
    y = jax.lax.dot_general(table, x.reshape(-1, x.shape[-1]), (((1,), (1,)), ((), ())))
    return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], len(table))


def head(width: int, dtype: DTypeLike) -> nn.Dense:
    """Returns a language-model head: a linear layer without bias, with float32 logits.

    Rounded to bfloat16, the largest logits may tie, and the wrong token would be chosen.
    """
    return Dense(width, use_bias=False, dtype=dtype, dot_general=_head_dot)


def _head_dot(x: Array, kernel: Array, *_: Any, **__: Any) -> Array:
    return product_in_float32(sharding.whole_width(x), kernel)


def look_up(table: Array, tokens: Array) -> Array:
    """Looks up tokens int[...] in table[V, D] -> [..., D]; NaN for ids outside the table."""
    # A negative index would count from the end.
    index = jnp.where(tokens < 0, len(table), tokens)
    return table.at[index].get(mode="fill", fill_value=jnp.nan)


class Embed(_Given, nn.Embed):
    """Token embeddings, also used as a tied head; ids outside the table give NaN."""

    scale: float | None = None  # factor on the embeddings, but not on the head (Gemma)

    def __call__(self, tokens: Array) -> Array:
        """Maps tokens int[...] to [..., D]."""
        x = sharding.whole_width(look_up(self.embedding.astype(self.dtype), tokens))
        return x if self.scale is None else x * jnp.asarray(self.scale, self.dtype)

    def attend(self, query: Array) -> Array:
        """Maps query[..., D] to logits float32[..., V] (see `head`)."""
        x = sharding.whole_width(query.astype(self.dtype))
        table = self.embedding.astype(self.dtype)
        if _has_few_rows(x, table):
            return _table_dot(x, table)
        return product_in_float32(x, table.T)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates heads x[B, T, H, C] by angles [B, T, C]; keeps the dtype of x."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return (x * cos + turned * sin).astype(x.dtype)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)): the feed-forward layer of the Llama family."""

    intermediate_size: int
    hidden_act: str = "silu"
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32
    output_size: int | None = None  # None: the input's width

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x[B, T, D] to [B, T, output_size]."""

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
    dtype: DTypeLike = jnp.float32
    prefix: str = ""  # of the names fc1 and fc2

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x[B, T, D] to [B, T, D]."""
        width = x.shape[-1]
        x = dense(self.intermediate_size, True, self.dtype, f"{self.prefix}fc1")(x)
        x = sharding.constrain(activation(self.hidden_act)(x), "batch", "positions", "mlp")
        return dense(width, True, self.dtype, f"{self.prefix}fc2")(x)
