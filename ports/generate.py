"""Generation: prefill and decode steps in one jitted program.

B batch, T positions of the prompt, M new tokens, S = T + M cache slots, D width, V vocabulary.

The state that belongs to a generated token is the state from which it was predicted: that of the
last prompt position for the first token.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ports import joiner, steering
from ports.sites import capture

Array = jax.Array


class Sampling(NamedTuple):
    """How tokens are drawn; greedy decoding has none of this."""

    key: Array
    temperature: Array | float = 1.0  # logits are divided by it
    top_p: Array | float = 1.0  # the smallest set of tokens whose probability reaches it is kept


class Generation(NamedTuple):
    """What `VLM.generate` returns."""

    tokens: Array  # int32[B, M], after the end-of-sequence token the pad token
    states: dict[str, Array]  # site -> [B, M, D]; states[site][:, m] predicted tokens[:, m]
    prompt_states: dict[str, Array]  # site -> [B, T, D], if asked for: states of the prompt


def _sample(logits: Array, sampling: Sampling, step: Array) -> Array:
    """Draws int32[B] from logits[B, V] by temperature and nucleus (Holtzman et al. 2020)."""
    logits = logits / sampling.temperature
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    probabilities = jax.nn.softmax(ordered, axis=-1)
    # A token is kept while the probability of the likelier ones is below top_p: at least one is.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < sampling.top_p) | (before == 0)
    lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return jax.random.categorical(jax.random.fold_in(sampling.key, step), logits)


def generate(
    model: joiner.VisionLanguageModel,
    params: dict,
    inputs: joiner.Inputs,
    sampling: Sampling | None = None,
    edits: steering.Edits | None = None,
    *,
    max_new_tokens: int,
    eos_tokens: tuple[int, ...],
    pad_token: int,
    sites: tuple[str, ...] = (),
    prompt_states: bool = False,
) -> Generation:
    """Prefills the cache with the prompt and decodes until every row has ended. Pure; jit it.

    inputs: the processor's arrays, rows padded on the left to T. sampling: None for greedy.
    edits: of the residual stream, in the prefill and in every step.
    Rows end by themselves; the loop ends with the last of them.
    """
    mask = joiner.attention_mask(inputs).astype(bool)
    batch, length = mask.shape
    variables = {"cache": model.init_cache(batch, length + max_new_tokens)}
    apply = capture(steering.steer(model.apply, edits or {}), sites)

    def pick(logits: Array, step: Array, ended: Array) -> tuple[Array, Array]:
        logits = logits.astype(jnp.float32)
        tokens = jnp.argmax(logits, -1) if sampling is None else _sample(logits, sampling, step)
        tokens = jnp.where(ended, pad_token, tokens.astype(jnp.int32))
        return tokens, ended | jnp.isin(tokens, jnp.array(eos_tokens, jnp.int32))

    (logits, variables), prefilled = apply(
        {"params": params, **variables}, inputs, method="prefill", mutable=["cache"]
    )
    first, ended = pick(logits, jnp.int32(0), jnp.zeros(batch, bool))
    tokens = jnp.full((batch, max_new_tokens), pad_token, jnp.int32).at[:, 0].set(first)
    states = {
        site: jnp.zeros((batch, max_new_tokens, value.shape[-1]), value.dtype)
        .at[:, 0]
        .set(value[:, -1])
        for site, value in prefilled.items()
    }
    next_positions = model.positions(inputs).reshape(batch, -1).max(-1) + 1
    slots = jnp.arange(length + max_new_tokens)
    prompt_valid = jnp.pad(mask, ((0, 0), (0, max_new_tokens)))

    def go_on(carry: tuple[Any, ...]) -> Array:
        step, _, ended, *_ = carry
        return (step < max_new_tokens) & ~ended.all()

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, tokens, ended, states, variables = carry
        slot = length + step - 1  # of the token that the last step chose
        valid = prompt_valid | ((slots >= length) & (slots <= slot))
        (logits, variables), new = apply(
            {"params": params, **variables},
            tokens[:, step - 1],
            next_positions + step - 1,
            valid,
            slot,
            method="decode_step",
            mutable=["cache"],
        )
        # Rows that ended keep zeros: their states predict nothing.
        states = {
            site: states[site]
            .at[:, step]
            .set(jnp.where(ended[:, None], 0, value[:, 0]).astype(states[site].dtype))
            for site, value in new.items()
        }
        chosen, ended = pick(logits, step, ended)
        return step + 1, tokens.at[:, step].set(chosen), ended, states, variables

    carry = (jnp.int32(1), tokens, ended, states, variables)
    _, tokens, _, states, _ = jax.lax.while_loop(go_on, body, carry)
    return Generation(tokens, states, prefilled if prompt_states else {})
