"""Scaled dot-product attention: every kind of mask, and the implementation that fits the size.

B batch, T query positions, S key positions, H query heads, N key-value heads, C head width.

The scores of all heads, [B, H, T, S], are only written where they are small. Otherwise they are
made in blocks, and gradients make them again (Rabe and Staats 2021): on a CPU for one head at a
time, whose scores stay in its cache; on accelerators and meshes for a block of queries of all
heads. GPUs use cuDNN's kernel and TPUs the splash kernel where these apply.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ports.names import site_name
from ports.nn import layers
from ports.parallel import sharding

Array = jax.Array

# Bytes of scores from which they are made in blocks. On two cores, blocks of one head take 1.0
# times as long at 4 MB, and half as long or less from 20 MB on.
WHOLE = 8 << 20
ACCELERATOR_WHOLE = 256 << 20
BLOCK = 1 << 19  # scores in a block of one head: 2 MB, the second-level cache of a core
LANES = 128  # the splash kernel's lengths are multiples of this


class Heads(nn.Module):
    """Joins the outputs of the heads, for the output projection; a module to be a site.

    Every attention module calls it, by the name "heads": its site is where single heads are read
    and edited, the input of `o_proj` in PyTorch.
    """

    def __call__(self, y: Array) -> Array:
        """Maps y[B, T, H, C] to [B, T, H * C], head after head."""
        return sharding.heads(y).reshape(*y.shape[:2], -1)


@contextlib.contextmanager
def counting_heads() -> Iterator[dict[str, int]]:
    """Notes the number of heads H of each `Heads` that runs or is traced inside the context.

    Yields:
        {site: H}, filled while modules run.
    """
    found: dict[str, int] = {}

    def note(method: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, Heads):
            found[site_name(context.module.path)] = args[0].shape[-2]
        return method(*args, **kwargs)

    with nn.intercept_methods(note):
        yield found


def token_mask(attention_mask: Array) -> Array:
    """Makes the mask of a decoder's forward pass for `attend_through_cache`.

    Args:
        attention_mask: int[B, T], nonzero at tokens, each of which sees itself and all earlier
            ones; or bool[B, T, T], which position sees which (packed sequences).

    Returns:
        bool[B, 1, 1, T] or bool[B, 1, T, T].
    """
    mask = attention_mask.astype(bool)
    return mask[:, None] if mask.ndim == 3 else mask[:, None, None]


def sees(
    mask: Array | None, queries: Array, slots: int, causal: bool, window: int | None
) -> Array | None:
    """Returns which query sees which key.

    Args:
        mask: bool[B or 1, 1, T or 1, S], which keys are visible; None for all.
        queries: int[T], the slot of each query's own key.
        slots: number of keys, S.
        causal: a query sees no later keys than its own.
        window: number of keys that a query sees up to its own; None for all.

    Returns:
        bool[B or 1, 1, T or 1, S]; None for everything.
    """
    behind = queries[:, None] - jnp.arange(slots)
    if causal:
        mask = behind >= 0 if mask is None else mask & (behind >= 0)
    if window is not None:
        mask = behind < window if mask is None else mask & (behind < window)
    return mask if mask is None or mask.ndim == 4 else mask[None, None]


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    scalar: float | None = None,
    softcap: float | None = None,
) -> Array:
    """Computes scaled dot-product attention, with the softmax in float32.

    A query that sees nothing gets the mean of some values: a finite number, never used.

    Args:
        query: [B, T, H, C]. With `causal` or `window`, the queries are the last T of S positions.
        key: [B, S, N, C], with H a multiple of N (grouped queries).
        value: [B, S, N, C].
        mask: bool[B or 1, 1, T or 1, S], True where a query sees a key; None for everywhere.
        causal: also hide later positions.
        window: also hide all but this number of positions up to the query's own.
        scalar: scores are divided by its square root; None for C.
        softcap: scores are limited to -softcap ... softcap (see `layers.limit`); None for no limit.

    Returns:
        [B, T, H, C].
    """
    scalar = scalar or query.shape[-1]
    options = {"causal": causal, "window": window, "scalar": scalar, "softcap": softcap}
    backend = jax.default_backend()
    widest = _widest_on_gpus() if backend == "gpu" else 0
    kernel = _kernel(query, key, mask, backend, causal, window, softcap, widest)
    if kernel is not None:
        return kernel(query, key, value, mask, **options)
    keys, values = cache_layout(key, value)
    return _attend_plainly(query, keys, values, mask, **options)


def cache_layout(key: Array, value: Array) -> tuple[Array, Array]:
    """Transposes [B, S, N, C] to key[B, N, C, S] and value[B, N, S, C], the layout of products."""
    return jnp.transpose(key, (0, 2, 3, 1)), jnp.transpose(value, (0, 2, 1, 3))


def attend_cached(
    query: Array,
    parts: Sequence[tuple[Array, Array]],
    mask: Array | None,
    *,
    first: Array | int = 0,
    window: int | None = None,
    scalar: float | None = None,
    softcap: float | None = None,
) -> Array:
    """Computes `attend` for a few queries over the concatenated parts of a cache.

    Args:
        query: [B, T, H, C], with H a multiple of N.
        parts: (key[B, N, C, S], value[B, N, S, C]) of each part.
        mask: bool[B or 1, 1, T or 1, S of all parts]; None for everywhere.
        first: slot of the first query, for `window`.
        window: as for `attend`.
        scalar: as for `attend`.
        softcap: as for `attend`.

    Returns:
        [B, T, H, C].
    """
    scalar = scalar or query.shape[-1]
    length, kv_heads = query.shape[1], parts[0][0].shape[1]
    # The queries of one key-value head become rows of one matrix: products batched over (B, N).
    rows = _rows(query, kv_heads)
    scores = [jnp.matmul(rows, key, preferred_element_type=jnp.float32) for key, _ in parts]
    scores = jnp.concatenate(scores, axis=-1) if len(scores) > 1 else scores[0]
    slots = scores.shape[-1]
    mask = sees(mask, first + jnp.arange(length), slots, False, window)
    scores = scores.reshape(*scores.shape[:2], length, -1, slots)
    weights, total = _weigh(scores, None if mask is None else mask[:, :, :, None], scalar, softcap)
    weights = weights.astype(query.dtype).reshape(*rows.shape[:3], slots)
    ends = np.cumsum([value.shape[2] for _, value in parts])[:-1]
    pieces = jnp.split(weights, ends, axis=-1) if len(parts) > 1 else [weights]
    products = (
        jnp.matmul(piece, value, preferred_element_type=jnp.float32)
        for piece, (_, value) in zip(pieces, parts, strict=True)
    )
    y = functools.reduce(jnp.add, products) / total.reshape(*rows.shape[:3], 1)
    return _unrow(y.astype(query.dtype), query.shape)


def _rows(query: Array, kv_heads: int) -> Array:
    """Arranges [B, T, H, C] as [B, N, T * H / N, C]: rows by position, then by query head."""
    batch, _, _, width = query.shape
    grouped = query.reshape(batch, query.shape[1], kv_heads, -1, width)
    return jnp.moveaxis(grouped, 2, 1).reshape(batch, kv_heads, -1, width)


def _unrow(y: Array, shape: tuple[int, ...]) -> Array:
    """Undoes `_rows`: [B, N, T * H / N, C] -> [B, T, H, C]."""
    batch, length, _, width = shape
    y = y.reshape(batch, y.shape[1], length, -1, width)
    return jnp.moveaxis(y, 1, 2).reshape(shape)


def _weigh(
    scores: Array, mask: Array | None, scalar: float, softcap: float | None
) -> tuple[Array, Array]:
    """Returns the weights [..., S] of products float32[..., S], at most 1, and their sums
    [..., 1], by which the weighted sum of values is to be divided.
    """
    scores = layers.limit(scores / math.sqrt(scalar), softcap)
    if mask is not None:
        # Not -inf, which would give NaN for a position that sees nothing.
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return weights, weights.sum(-1, keepdims=True)


def _attend_plainly(
    query: Array,
    keys: Array,
    values: Array,
    mask: Array | None,
    causal: bool,
    window: int | None,
    scalar: float,
    softcap: float | None,
) -> Array:
    """Computes `attend` with XLA's own operations, keys and values in the layout of a cache."""
    batch, length, heads, _ = query.shape
    slots = keys.shape[-1]
    by_head = jax.default_backend() == "cpu" and not sharding.is_on_mesh()
    whole = 4 * batch * heads * length * slots
    options = {"scalar": scalar, "softcap": softcap}

    def masked(start: Array | int, count: int, mask: Array | None) -> Array | None:
        queries = slots - length + start + jnp.arange(count)
        return sees(mask, queries, slots, causal, window)

    if whole <= (WHOLE if by_head else ACCELERATOR_WHOLE):
        return attend_cached(query, [(keys, values)], masked(0, length, mask), **options)
    if by_head:
        return _by_head(query, keys, values, mask, masked, **options)
    # Blocks of all heads: neither rows nor heads are touched, so their sharding stays.
    size = max(1, ACCELERATOR_WHOLE // (4 * batch * heads * slots))

    def block(start: Array | int, part: Array, mask: Array | None) -> Array:
        return attend_cached(part, [(keys, values)], masked(start, part.shape[1], mask), **options)

    return _in_blocks(block, query, mask, size)


def _by_head(
    query: Array,
    keys: Array,
    values: Array,
    mask: Array | None,
    masked: Callable[[Array | int, int, Array | None], Array | None],
    scalar: float,
    softcap: float | None,
) -> Array:
    """Computes attention for one row and key-value head after the other."""
    (batch, length, heads, width), (_, kv_heads, _, slots) = query.shape, keys.shape
    group = heads // kv_heads
    size = max(1, BLOCK // (slots * group))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def head(x: tuple[Array, ...]) -> Array:
        index, rows, key, value = x
        here = None if mask is None else mask[index // kv_heads % len(mask)][None]

        def block(start: Array | int, part: Array, mask: Array | None) -> Array:
            scores = jnp.matmul(part[0].reshape(-1, width), key, preferred_element_type=jnp.float32)
            visible = masked(start, part.shape[1], mask)
            if visible is not None:
                visible = jnp.repeat(visible[0, 0], group if visible.shape[2] > 1 else 1, axis=0)
            weights, total = _weigh(scores, visible, scalar, softcap)
            weights = weights.astype(query.dtype)
            y = jnp.matmul(weights, value, preferred_element_type=jnp.float32) / total
            return y.astype(query.dtype).reshape(part.shape)

        return _in_blocks(block, rows.reshape(1, length, group, width), here, size)

    parts = (_rows(query, kv_heads), keys, values)
    parts = (part.reshape(-1, *part.shape[2:]) for part in parts)
    y = jax.lax.map(head, (jnp.arange(batch * kv_heads), *parts))
    return _unrow(y.reshape(batch, kv_heads, -1, width), query.shape)


def _in_blocks(
    block: Callable[[Array | int, Array, Array | None], Array],
    query: Array,
    mask: Array | None,
    size: int,
) -> Array:
    """Calls block(start, query[B, size, H, C], its rows of the mask) for all queries."""
    length = query.shape[1]
    count = -(-length // size)
    if count == 1:
        return block(0, query, mask)
    size = -(-length // count)  # blocks of nearly the same size
    missing = count * size - length
    by_row = mask is not None and mask.shape[2] > 1

    def split(x: Array, axis: int) -> Array:
        pads = [(0, missing if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, pads)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(x: tuple[Array, Array, Array | None]) -> Array:
        start, part, rows = x
        return block(start, part, rows if by_row else mask)

    rows = split(mask, 2) if mask is not None and by_row else None
    y = jax.lax.map(one, (size * jnp.arange(count), split(query, 1), rows))
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape(y.shape[0], count * size, *y.shape[3:])[:, :length]


def _kernel(
    query: Array,
    key: Array,
    mask: Array | None,
    backend: str,
    causal: bool,
    window: int | None,
    softcap: float | None,
    widest: int = 0,
) -> Callable[..., Array] | None:
    """Returns the accelerator's own kernel if it computes this attention; else None.

    `widest` is that of `widest_head`, for GPUs.
    """
    length, slots, width = query.shape[1], key.shape[1], query.shape[-1]
    placed = causal or window is not None
    if min(length, slots) < LANES or (placed and length != slots) or (window and not causal):
        return None
    by_key = mask is None or mask.shape[2] == 1
    if backend == "gpu" and softcap is None and query.dtype in (jnp.bfloat16, jnp.float16):
        # A mask, with cuDNN a bias, needs even lengths for its gradient.
        even = mask is None or not (length % 2 or slots % 2)
        return _attend_on_gpu if width % 8 == 0 and width <= widest and even else None
    return _attend_on_tpu if backend == "tpu" and by_key else None


def widest_head(platform_version: str, capabilities: Sequence[str | None]) -> int:
    """Returns the greatest width of a head that cuDNN's attention computes on some GPUs.

    Args:
        platform_version: what the backend says of itself; only CUDA has cuDNN.
        capabilities: compute capability of each GPU, such as "8.0".

    Returns:
        128; 0 if a GPU is older than Ampere, which flash attention needs, or unknown.
    """
    # ROCm's "capabilities" are names of architectures, such as "gfx942".
    if "cuda" not in platform_version:
        return 0
    # jax also takes 256 from Hopper on. It was never run here.
    found = [tuple(map(int, (said or "0").split("."))) for said in capabilities]
    return 128 if min(found, default=(0,)) >= (8, 0) else 0


@functools.cache
def _widest_on_gpus() -> int:
    from jax.extend import backend

    capabilities = [getattr(each, "compute_capability", None) for each in jax.local_devices()]
    return widest_head(backend.get_backend().platform_version, capabilities)


def _attend_on_gpu(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    causal: bool,
    window: int | None,
    scalar: float,
    softcap: float | None,
) -> Array:
    """Computes attention with cuDNN, which also skips what `causal` and `window` hide."""
    del softcap
    attend = functools.partial(_cudnn, causal=causal, window=window, scalar=scalar)
    masks = () if mask is None else (mask,)
    # jax's own partitioning rule wants queries and keys to be divided alike, and does not look at
    # the mask's rows.
    return sharding.by_head(_rows_merged(attend), query, key, value, *masks)


def _cudnn(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    *,
    causal: bool,
    window: int | None,
    scalar: float,
) -> Array:
    if mask is not None:
        shape = (*mask.shape[:2], query.shape[1], key.shape[1])
        mask = jnp.broadcast_to(mask, shape)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        scale=1 / math.sqrt(scalar),
        is_causal=causal,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def _rows_merged(attend: Callable[..., Array]) -> Callable[..., Array]:
    """Returns `attend`, for which `jax.vmap` merges its axis into the rows, in gradients too.

    jax's own rule for cuDNN's attention (0.10.2) takes no mask with one row for all heads, no
    query, keys and values of which only some are mapped, and no gradient that is mapped alone.

    Args:
        attend: (query, key, value) or (query, key, value, mask [B or 1, ...]) -> like query.
    """

    def with_rows(function: Callable[..., tuple[Array, ...]]) -> Callable[..., tuple[Array, ...]]:
        """Makes a mapped axis of a function of (gradient, query, ...) or (query, ...) rows."""

        @jax.custom_batching.custom_vmap
        def merged(*arrays: Array) -> tuple[Array, ...]:
            return function(*arrays)

        @merged.def_vmap
        def merge(
            size: int, mapped: Sequence[bool], *arrays: Array
        ) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
            rows = arrays[0].shape[int(mapped[0])]

            def flat(x: Array, is_mapped: bool) -> Array:
                if x.dtype == bool and not is_mapped and len(x) == 1:
                    return x  # a mask of all rows
                x = x if is_mapped else x[None]
                return jnp.broadcast_to(x, (size, rows, *x.shape[2:])).reshape(-1, *x.shape[2:])

            found = merged(*map(flat, arrays, mapped))
            found = tuple(x.reshape(size, rows, *x.shape[1:]) for x in found)
            return found, (True,) * len(found)

        return merged

    def pulled(gradient: Array, *arrays: Array) -> tuple[Array, ...]:
        return jax.vjp(lambda *x: attend(*x, *arrays[3:]), *arrays[:3])[1](gradient)

    # The value as in `pulled`, so that XLA can compute both at once.
    value = with_rows(lambda *arrays: (jax.vjp(attend, *arrays)[0],))
    pull = with_rows(pulled)
    plain = with_rows(lambda *arrays: (attend(*arrays),))

    @jax.custom_vjp
    def call(*arrays: Array) -> Array:
        return plain(*arrays)[0]

    # A rule of `custom_vmap` can't be differentiated, but used in what computes the gradient.
    def forward(*arrays: Array) -> tuple[Array, tuple[Array, ...]]:
        return value(*arrays)[0], arrays

    def backward(arrays: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
        return *pull(gradient, *arrays), *(None for _ in arrays[3:])

    call.defvjp(forward, backward)
    return call


def _attend_on_tpu(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    causal: bool,
    window: int | None,
    scalar: float,
    softcap: float | None,
    interpret: bool = False,
) -> Array:
    """Computes attention with the splash kernel, which skips blocks that are hidden entirely.

    `interpret` runs it on any backend.
    """
    # Part of jax, but slow to import and of no use elsewhere.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    (batch, length, _, _), slots = query.shape, key.shape[1]
    visible = jnp.ones((1, slots), bool) if mask is None else mask[:, 0, 0]
    visible = jnp.broadcast_to(visible, (batch, slots))
    padded, padded_slots = (-(-size // LANES) * LANES for size in (length, slots))

    def run(query: Array, key: Array, value: Array, visible: Array) -> Array:
        shape = (padded, padded_slots)
        if window is not None:
            hidden = splash.LocalMask(shape, (window - 1, 0), offset=0)
        else:
            hidden = splash.CausalMask(shape) if causal else splash.FullMask(shape)
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([hidden] * query.shape[2]),
            attn_logits_soft_cap=softcap,
            interpret=interpret,
        )

        def heads(x: Array, size: int) -> Array:
            x = jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0), (0, 0)))
            return jnp.swapaxes(x, 1, 2)

        # A key in another segment than the query is hidden.
        hides = jnp.pad(visible, ((0, 0), (0, padded_slots - slots))).astype(jnp.int32)
        asks = jnp.ones((len(query), padded), jnp.int32)
        y: Any = jax.vmap(kernel)(
            heads((query / math.sqrt(scalar)).astype(query.dtype), padded),
            heads(key, padded_slots),
            heads(value, padded_slots),
            segment_ids=splash.SegmentIds(asks, hides),
        )
        return jnp.swapaxes(y, 1, 2)[:, :length]

    return sharding.by_head(run, query, key, value, visible)
