"""Runs the last positions of a batch many times over one cache of everything before them.

In a decoder whose positions see only earlier ones, an edit changes nothing before the first edited
position. If the edits are all among the last n positions, the rest is therefore computed once,
and each of the edits costs n positions in the layers after it.

B batch, T positions, n of them the last, D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ports.intervene import steer
from ports.intervene.edits import Edits
from ports.intervene.sites import capture
from ports.nn import vision_language

Array = jax.Array


class Tail(NamedTuple):
    """The last n positions of a batch, and all that they need of the positions before them."""

    cache: dict  # keys and values of the T - n positions before
    tokens: Array  # int32[B, n]
    positions: Array  # int32[B, n] or [B, n, 3], rotary positions
    mask: Array  # bool[B, 1, n, T], which slots each of them sees
    begun: dict[str, Array]  # site -> states [B, n, D] that the runs start from; may be empty


def cut_tail(
    model: vision_language.VisionLanguageModel,
    params: dict,
    inputs: vision_language.Inputs,
    count: int,
    begin: str | None = None,
) -> Tail:
    """Runs a batch once and keeps what its last positions need to run again. Pure; jit it.

    Args:
        model: the Linen module; not a prefix-LM, whose earlier positions see the last ones.
        params: its parameters.
        inputs: the processor's arrays, rows padded on the left to T.
        count: n, less than T.
        begin: a layer of the decoder, none of whose predecessors is edited: later runs start from
            its states. None to start from the embeddings.

    Returns:
        What `run_tail` takes.

    Raises:
        ValueError: n is not in 1..T - 1.
    """
    real = vision_language.attention_mask(inputs) != 0
    batch, length = real.shape
    if not 1 <= count < length:
        raise ValueError(f"the tail has {count} positions of {length}; expected 1 to {length - 1}")
    first = length - count
    apply = capture(model.apply, () if begin is None else (begin,))
    variables = {"params": params, "cache": model.init_cache(batch, length)}
    (_, variables), states = apply(variables, inputs, False, method="prefill", mutable=["cache"])

    def before(path: tuple, leaf: Array) -> Array:
        # key[B, N, C, slots], value[B, N, slots, C]; see `decoder.init_cache`.
        return leaf[..., :first] if path[-1].key == "key" else leaf[:, :, :first]

    earlier = jnp.arange(length) <= first + jnp.arange(count)[:, None]
    return Tail(
        cache=jax.tree_util.tree_map_with_path(before, variables["cache"]),
        tokens=jnp.asarray(inputs["input_ids"])[:, first:],
        positions=model.positions(inputs)[:, first:],
        mask=real[:, None, None] & earlier,
        begun={site: value[:, first:] for site, value in states.items()},
    )


def run_tail(
    model: vision_language.VisionLanguageModel,
    params: dict,
    tail: Tail,
    edits: Edits,
    sites: tuple[str, ...] = (),
) -> tuple[Array, dict[str, Array]]:
    """Runs the last positions under edits. Pure: works under jit, vmap and grad.

    Args:
        model: the Linen module.
        params: its parameters.
        tail: of `cut_tail`.
        edits: edits at or after the layer that the tail begins at. Their positions are counted from
            the first of the n: masks are bool[B, n], and all kinds are GENERATED.
        sites: sites at or after that layer whose states to return.

    Returns:
        States after the final norm, [B, n, D], and those at the sites.
    """
    batch, count = tail.tokens.shape
    variables = {
        "params": params,
        "prompt_cache": tail.cache,
        "cache": model.init_cache(batch, count),
    }
    apply = model.apply if not tail.begun else steer.substitute(model.apply, tail.begun)
    slot = jnp.int32(tail.mask.shape[-1] - count)
    (states, _), captured = capture(steer.steer(apply, edits), sites)(
        variables,
        tail.tokens,
        tail.positions,
        tail.mask,
        slot,
        jnp.int32(0),
        method="extend",
        mutable=["cache"],
    )
    return states, captured
