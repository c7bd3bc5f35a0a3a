"""Generation: prefill and decode steps in one jitted program.

A variants of the edits, B batch, T positions of the prompt, M new tokens, S = T + M cache slots,
D width, V vocabulary.

The state of a generated token is the one that it was predicted from: for the first token, the state
at the last prompt position.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ports.decoding.logits import Rules, process, read_prompt
from ports.decoding.prefill import prefill, read, run
from ports.decoding.sampling import Sampling, draw
from ports.inputs.common_prefix import Shared
from ports.intervene.edits import Edits, as_edits, only
from ports.messages import few
from ports.nn import decoder, vision_language
from ports.tables import html_arrays, kind, named_states

Array = jax.Array


class Generation(NamedTuple):
    """Result of `VLM.generate`.

    Attributes:
        tokens: int32[B, M]; pad tokens after the end-of-sequence token.
        states: site -> [B, M, D]; `states[site][:, m]` predicted `tokens[:, m]`.
        prompt_states: site -> [B, T, D] of the prompt, if requested; else empty.
        finite: bool[B]; False if any logits were NaN or Inf, e.g. after a float16 overflow.

    Examples:
        >>> import ports, xlvlm_jax
        >>> from PIL import Image
        >>> vlm = ports.load("embedded")
        >>> prompt, picture = vlm.render("What is in the picture?"), Image.new("RGB", (64, 64))
        >>> inputs = vlm.process([prompt], [picture])
        >>> site = "language_model.model.layers.3"
        >>> answer = vlm.generate(inputs, max_new_tokens=2, sites=[site])
        >>> answer.tokens.shape, answer.states[site].shape
        ((1, 2), (1, 2, 192))
    """

    tokens: Array
    states: dict[str, Array]
    prompt_states: dict[str, Array]
    finite: Array

    def __repr__(self) -> str:
        return f"Generation(tokens: {kind(self.tokens)}; states: {few(self.states) or 'none'})"

    def _repr_html_(self) -> str:
        arrays = {
            "tokens": self.tokens,
            **named_states("states", self.states),
            **named_states("prompt_states", self.prompt_states),
            "finite": self.finite,
        }
        return html_arrays(arrays, title="Generation")


def choose(
    logits: Array,
    ended: Array,
    eos_tokens: tuple[int, ...],
    pad_token: int,
    sampling: Sampling | None = None,
    step: Any = 0,
) -> tuple[Array, Array]:
    """Returns the next token of each row, and which rows have ended with it or before.

    Args:
        logits: float[..., V].
        ended: bool[...], rows that have ended; they get the pad token.
        eos_tokens: ids that end a row.
        pad_token: id that fills a row after its end.
        sampling: how tokens are drawn; None for the most likely one.
        step: int32[], index of the token; only for sampling.
    """
    tokens = jnp.argmax(logits, -1) if sampling is None else draw(logits, sampling, step)
    tokens = jnp.where(ended, pad_token, tokens.astype(jnp.int32))
    return tokens, ended | jnp.isin(tokens, jnp.array(eos_tokens, jnp.int32))


def generate(
    model: vision_language.VisionLanguageModel,
    params: dict,
    inputs: vision_language.Inputs,
    sampling: Sampling | None = None,
    edits: Edits | None = None,
    rules: Rules | None = None,
    shared: Shared | None = None,
    *,
    max_new_tokens: int,
    eos_tokens: tuple[int, ...],
    pad_token: int,
    sites: tuple[str, ...] = (),
    prompt_states: bool = False,
    variants: bool = False,
    at_prompt: frozenset[tuple[str, int]] | None = None,
) -> Generation:
    """Prefills the cache with the prompt and decodes until every row has ended. Pure; jit it.

    Args:
        model: the Linen module.
        params: its parameters.
        inputs: the processor's arrays, rows padded on the left to T. With `shared`, the arrays of
            pictures are not used.
        sampling: how tokens are drawn; None for greedy decoding.
        edits: edits of the residual stream, applied in the prefill and in every step.
        rules: changes of the logits before a token is chosen.
        shared: the same prompts, divided so that equal beginnings are computed once. The edits
            in `at_prompt` must be the same for all rows.
        max_new_tokens: maximum number of new tokens per row, M.
        eos_tokens: ids that end a row.
        pad_token: id that fills a row after its end.
        sites: sites whose states are returned.
        prompt_states: also return the states of the prompt.
        variants: the arrays of the edits have a leading axis A, and so do the returned arrays.
        at_prompt: the edits, by site and index, that are not for generated tokens alone; None for
            all.

    Returns:
        Tokens and states of all rows.
    """
    prompts = read(model, inputs, shared)
    batch, length = prompts.mask.shape

    def fill(edits: Edits) -> tuple[Array, dict, dict[str, Array]]:
        # Each variant appends to its own cache.
        slots = length if variants else length + max_new_tokens
        return prefill(model, params, prompts, edits, sites, slots, prompt_states)

    def decode_step(edits: Edits, caches: dict, *args: Any) -> tuple[Array, dict, dict[str, Array]]:
        return run(model, params, edits, sites, caches, "decode_step", *args)

    edits = edits or {}
    prefilling = edits if at_prompt is None else only(as_edits(edits), at_prompt)
    # The vision tower runs only in the prefill.
    later = {site: listed for site, listed in edits.items() if model.is_of_decoder(site)}
    if variants:
        # vmap here, not around the loop: a mapped loop would copy the whole cache at every step.
        # Layers before the first edited one are computed, and their cache stored, only once.
        axes = model.prompt_cache_axes(prefilling)
        if prefilling:
            fill = jax.vmap(fill, out_axes=(0, axes, 0))
        axes = {"prompt_cache": axes, "cache": 0}
        decode_step = jax.vmap(decode_step, in_axes=(0, axes, 0, None, None, None, None))

    def pick(logits: Array, tokens: Array, step: Array, ended: Array) -> tuple[Array, Array]:
        if rules is not None:
            logits = rule(logits, tokens, step)
        return choose(logits, ended, eos_tokens, pad_token, sampling, step)

    def is_finite(logits: Array) -> Array:
        return jnp.isfinite(logits).all(-1)

    logits, cache, prefilled = fill(prefilling)
    if variants and not prefilling:
        count = len(jax.tree.leaves(edits)[0])
        logits, prefilled = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (count, *x.shape)), (logits, prefilled)
        )
    rows = logits.shape[:-1]  # [B], or [A, B]
    prompt_cache = {}
    if variants:
        prompt_cache = {"prompt_cache": cache}
        cache = jax.vmap(lambda _: model.init_cache(batch, max_new_tokens))(logits)
    if rules is not None:
        ids, mask = jnp.asarray(inputs["input_ids"]), vision_language.attention_mask(inputs)
        prompt = read_prompt(rules, ids, mask != 0, logits.shape[-1])
        rule = functools.partial(process, rules, prompt)
        rule = jax.vmap(rule, in_axes=(0, 0, None)) if variants else rule
    tokens = jnp.full((*rows, max_new_tokens), pad_token, jnp.int32)
    first, ended = pick(logits, tokens, jnp.int32(0), jnp.zeros(rows, bool))
    finite = is_finite(logits)
    tokens = tokens.at[..., 0].set(first)

    def at(position: Any) -> tuple[Any, ...]:
        return *(slice(None) for _ in rows), position

    # Some states have more axes than the width: heads, and the width of a head.
    states = {
        site: jnp.zeros((*rows, max_new_tokens, *value.shape[len(rows) + 1 :]), value.dtype)
        .at[at(0)]
        .set(value[at(-1)])
        for site, value in prefilled.items()
    }

    def going_on(value: Array, ended: Array) -> Array:
        return jnp.where(ended.reshape(*rows, *[1] * (value.ndim - len(rows))), 0, value)

    column = vision_language.next_column(inputs)
    slots = jnp.arange(length + max_new_tokens)
    prompt_valid = jnp.pad(prompts.mask, ((0, 0), (0, max_new_tokens)))

    squeezed = not variants and decoder.is_squeezed(batch)

    def carried(cache: dict) -> dict:
        return jax.tree.map(lambda x: x[0], cache) if squeezed else cache

    def unpacked(cache: dict) -> dict:
        return jax.tree.map(lambda x: x[None], cache) if squeezed else cache

    def go_on(carry: tuple[Any, ...]) -> Array:
        step, _, ended, *_ = carry
        return (step < max_new_tokens) & ~ended.all()

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, tokens, ended, finite, states, cache = carry
        slot = length + step - 1  # slot of the token chosen in the last step
        valid = prompt_valid | ((slots >= length) & (slots <= slot))
        logits, cache, new = decode_step(
            later,
            {**prompt_cache, "cache": unpacked(cache)},
            tokens[..., step - 1],
            prompts.next_positions + step - 1,
            valid,
            slot,
            None if column is None else column + step - 1,
        )
        # Rows that have ended keep zeros: their states predict nothing.
        states = {
            site: states[site]
            .at[at(step)]
            .set(going_on(value[at(0)], ended).astype(states[site].dtype))
            for site, value in new.items()
        }
        finite = finite & (ended | is_finite(logits))
        chosen, ended = pick(logits, tokens, step, ended)
        tokens = tokens.at[..., step].set(chosen)
        return step + 1, tokens, ended, finite, states, carried(cache)

    carry = (jnp.int32(1), tokens, ended, finite, states, carried(cache))
    _, tokens, _, finite, states, _ = jax.lax.while_loop(go_on, body, carry)
    return Generation(tokens, states, prefilled if prompt_states else {}, finite)
