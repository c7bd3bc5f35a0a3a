"""Generation one token at a time: a caller sees each token as it is chosen, and may stop.

Two programs, of which the second runs once per token. `generate` does the same in one program,
which is faster for whoever needs only the whole answer.

B batch, T positions of the prompt, M new tokens, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ports.decoding import prefill
from ports.decoding.generate import choose
from ports.decoding.logits import Prompt, Rules, process, read_prompt
from ports.intervene.edits import Edits
from ports.nn import vision_language
from ports.parallel import compiled

Array = jax.Array


class Step(NamedTuple):
    """What `VLM.stream` yields: the next token of each row.

    Attributes:
        tokens: int32[B]; the pad token in rows that have ended.
        logits: float32[B, V] that the tokens were chosen from, after the checkpoint's rules.
    """

    tokens: Array
    logits: Array


class Unfinished(NamedTuple):
    """What the next step continues from."""

    cache: dict  # keys and values of T + M slots
    tokens: Array  # int32[B, M], pad tokens where none is chosen yet
    chosen: Array  # int32[], how many are
    ended: Array  # bool[B]
    valid: Array  # bool[B, T + M], which slots hold tokens of the prompt
    positions: Array  # int32[B], rotary position of the first new token
    column: Array | None  # column of the first new token in the caller's inputs
    prompt: Prompt | None  # what the rules need


@compiled.program(static=["max_new_tokens", "eos_tokens", "pad_token"])
def begin(
    model: vision_language.VisionLanguageModel,
    params: dict,
    inputs: vision_language.Inputs,
    edits: Edits,
    rules: Rules | None,
    max_new_tokens: int,
    eos_tokens: tuple[int, ...],
    pad_token: int,
) -> tuple[Unfinished, Step]:
    """Runs the prompts, rows padded on the left, and chooses the first token of each answer."""
    prompts = prefill.read(model, inputs)
    batch, length = prompts.mask.shape
    slots = length + max_new_tokens
    logits, cache, _ = prefill.prefill(model, params, prompts, edits, (), slots, False)
    tokens = jnp.full((batch, max_new_tokens), pad_token, jnp.int32)
    prompt = None
    if rules is not None:
        ids, mask = jnp.asarray(inputs["input_ids"]), vision_language.attention_mask(inputs)
        prompt = read_prompt(rules, ids, mask != 0, logits.shape[-1])
        logits = process(rules, prompt, logits, tokens, jnp.int32(0))
    first, ended = choose(logits, jnp.zeros(batch, bool), eos_tokens, pad_token)
    unfinished = Unfinished(
        cache=cache,
        tokens=tokens.at[:, 0].set(first),
        chosen=jnp.int32(1),
        ended=ended,
        valid=jnp.pad(prompts.mask, ((0, 0), (0, max_new_tokens))),
        positions=prompts.next_positions,
        column=vision_language.next_column(inputs),
        prompt=prompt,
    )
    return unfinished, Step(first, logits)


@compiled.program(static=["eos_tokens", "pad_token"], donate=["unfinished"])
def proceed(
    model: vision_language.VisionLanguageModel,
    params: dict,
    unfinished: Unfinished,
    edits: Edits,
    rules: Rules | None,
    eos_tokens: tuple[int, ...],
    pad_token: int,
) -> tuple[Unfinished, Step]:
    """Feeds the last tokens back and chooses the next ones. The cache is updated in place."""
    cache, tokens, done, ended, valid, positions, column, prompt = unfinished
    length = valid.shape[1] - tokens.shape[1]
    slots, slot = jnp.arange(valid.shape[1]), length + done - 1
    # The vision tower runs only for the prompt.
    later = {site: listed for site, listed in edits.items() if model.is_of_decoder(site)}
    logits, cache, _ = prefill.run(
        model,
        params,
        later,
        (),
        {"cache": cache},
        "decode_step",
        tokens[:, done - 1],
        positions + done - 1,
        valid | ((slots >= length) & (slots <= slot)),
        slot,
        None if column is None else column + done - 1,
    )
    if rules is not None and prompt is not None:
        logits = process(rules, prompt, logits, tokens, done)
    chosen, ended = choose(logits, ended, eos_tokens, pad_token)
    tokens = tokens.at[:, done].set(chosen)
    following = unfinished._replace(cache=cache, tokens=tokens, chosen=done + 1, ended=ended)
    return following, Step(chosen, logits)
