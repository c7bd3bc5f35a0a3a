"""Prefill: runs prompts once and fills the cache, equal beginnings of several prompts only once.

B batch, T positions of the prompt, S cache slots, D width, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ports.inputs.common_prefix import Shared
from ports.intervene import steer
from ports.intervene.edits import PADDING, Edits, Places
from ports.intervene.sites import capture
from ports.nn import decoder, vision_language

Array = jax.Array


class Prompts(NamedTuple):
    """A batch of prompts, divided by `common_prefix.share` or not."""

    inputs: vision_language.Inputs  # rows padded on the left; without pictures if divided
    shared: Shared | None
    mask: Array  # bool[B, L], which of the first L cache slots hold tokens
    positions: Array  # rotary positions of the tokens, or of the remainders of divided prompts
    next_positions: Array  # int32[B], rotary position of the first new token


def read(
    model: vision_language.VisionLanguageModel,
    inputs: vision_language.Inputs,
    shared: Shared | None = None,
) -> Prompts:
    """Returns where the tokens of a batch lie in the cache, and their positions."""
    if shared is None:
        mask, positions = vision_language.attention_mask(inputs) != 0, model.positions(inputs)
        return Prompts(inputs, None, mask, positions, model.next_positions(inputs))
    rest = shared.kinds != PADDING
    mask = jnp.concatenate([shared.prefix["attention_mask"][shared.picture] != 0, rest], axis=1)
    # What remains is text, and continues as generated tokens do.
    start = model.next_positions(shared.prefix)[shared.picture]
    positions = start[:, None] + decoder.token_positions(rest)
    return Prompts(inputs, shared, mask, positions, positions[:, -1] + 1)


def run(
    model: vision_language.VisionLanguageModel,
    params: dict,
    edits: Edits,
    sites: tuple[str, ...],
    caches: dict,
    method: str,
    *args: Any,
) -> tuple[Array, dict, dict[str, Array]]:
    """Runs a method of the model with a cache; returns its result, the cache, and the states."""
    apply = capture(steer.steer(model.apply, edits), sites)
    variables = {"params": params, **caches}
    (result, variables), states = apply(variables, *args, method=method, mutable=["cache"])
    return result, variables["cache"], states


def prefill(
    model: vision_language.VisionLanguageModel,
    params: dict,
    prompts: Prompts,
    edits: Edits,
    sites: tuple[str, ...],
    slots: int,
    every_position: bool,
) -> tuple[Array, dict, dict[str, Array]]:
    """Runs the prompts and fills an empty cache.

    Args:
        model: the Linen module.
        params: its parameters.
        prompts: the prompts.
        edits: edits of the residual stream, the same for all rows that share a beginning.
        sites: sites of the decoder whose states are returned.
        slots: size of the cache, S.
        every_position: return the states of all positions, not of the last alone.

    Returns:
        Logits of the last position float32[B, V], the cache, and site -> states [B, T, D], or
        states of which the last position counts; [B, 1, V] for the head.
    """
    empty = model.init_cache(len(prompts.mask), slots)
    shared, last_only = prompts.shared, not every_position
    if shared is None:
        cache = {"cache": empty}
        return run(model, params, edits, sites, cache, "prefill", prompts.inputs, last_only)
    count, width = shared.prefix["input_ids"].shape
    begun = {"cache": model.init_cache(count, width)}
    _, begun, first = run(model, params, edits, sites, begun, "prefill", shared.prefix, last_only)
    cache = jax.tree.map(
        lambda x, start: jax.lax.dynamic_update_slice(x, start[shared.picture], (0,) * x.ndim),
        empty,
        begun,
    )
    length = prompts.mask.shape[1]
    visible = jnp.pad(prompts.mask, ((0, 0), (0, slots - length)))[:, None, None]
    visible &= jnp.arange(slots) <= jnp.arange(width, length)[:, None]
    # The vision tower has run already.
    later = {site: listed for site, listed in edits.items() if model.is_of_decoder(site)}
    logits, cache, states = run(
        model,
        params,
        later,
        sites,
        {"cache": cache},
        "continue_prefill",
        shared.tokens,
        prompts.positions,
        visible,
        jnp.int32(width),
        Places(*map(jnp.asarray, (shared.kinds, shared.ordinals, shared.columns))),
        last_only,
    )

    def joined(first: Array, rest: Array) -> Array:
        """Returns states at the prompts' own positions."""
        if rest.shape[1] == 1 < shared.tokens.shape[1]:  # the head's
            return rest
        both = jnp.concatenate([first[shared.picture], rest], axis=1)
        order = shared.order.reshape(*shared.order.shape, *[1] * (both.ndim - 2))
        return jnp.take_along_axis(both, order, axis=1)

    if every_position:
        states = {site: joined(first[site], rest) for site, rest in states.items()}
    return logits, cache, states
