"""Changes logits before a token is chosen: penalties, bans, forced tokens.

B batch, T positions of the prompt, M new tokens, V vocabulary, S token sequences, the longest of
them with L + 1 tokens.

The rules, their order and the tokens they take into account match transformers' `generate`: image
tokens count; padding counts, as in the caller's inputs, except for the repetition penalty. Numbers
are arguments of the compiled program, so changing one never recompiles; the set of rules is part of
the program, which is unchanged if there are none.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
_NOTHING = -2  # id that marks "no token"; processors use -1 for padding


class Sequences(NamedTuple):
    """Token sequences whose last token gets a bias where the other tokens precede it."""

    before: Any  # int32[S, L], shorter ones padded on the left with _NOTHING
    last: Any  # int32[S]
    bias: Any  # float32[S]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "fill",
        "sequence_bias",
        "repetition_penalty",
        "bad_words",
        "end_tokens",
        "min_new_tokens",
        "forced_first",
        "forced_last",
        "decay",
        "suppressed",
        "suppressed_at_begin",
        "begin",
    ],
    meta_fields=["ngram_size", "remove_invalid"],
)
@dataclasses.dataclass(frozen=True)
class Rules:
    """Rules of a generation, made by `make_rules`; None (0, False) turns a rule off.

    Attributes:
        fill: int32[], number of columns added to pad the prompts to a compiled length.
        sequence_bias: `Sequences` with the bias added to their last tokens.
        repetition_penalty: float32[]; logits of earlier tokens are divided by it if positive,
            multiplied if negative.
        ngram_size: length of token sequences that may not occur twice.
        bad_words: `Sequences` that may not occur.
        end_tokens: bool[V], tokens that end a row.
        min_new_tokens: int32[], minimum number of tokens before an end token.
        forced_first: bool[V], tokens allowed as the first one.
        forced_last: bool[V], tokens allowed as the last of M tokens.
        remove_invalid: replace NaN by 0 and infinities by the largest finite numbers.
        decay: (start int32[], factor float32[]): after step `start`, the logits of end tokens grow
            exponentially.
        suppressed: bool[V], tokens that may not occur.
        suppressed_at_begin: bool[V], tokens that may not occur at step `begin`.
        begin: int32[], the step for `suppressed_at_begin`.
    """

    fill: Any
    sequence_bias: Sequences | None = None
    repetition_penalty: Any = None
    ngram_size: int = 0
    bad_words: Sequences | None = None
    end_tokens: Any = None
    min_new_tokens: Any = None
    forced_first: Any = None
    forced_last: Any = None
    remove_invalid: bool = False
    decay: tuple[Any, Any] | None = None
    suppressed: Any = None
    suppressed_at_begin: Any = None
    begin: Any = None


class Prompt(NamedTuple):
    """The prompt's tokens, the same at every step."""

    ids: Array  # int32[B, T], _NOTHING in columns that pad to a compiled length
    seen: Array | None  # bool[B, V], tokens in the prompt, for the repetition penalty


def make_rules(
    values: Mapping[str, Any],
    *,
    vocabulary: int,
    end_tokens: Sequence[int],
    length: int,
    fill: int,
) -> Rules | None:
    """Makes the rules from values with transformers' names.

    Args:
        values: values from `generation_config.changing_logits`.
        vocabulary: number of tokens, V.
        end_tokens: ids that end a row.
        length: length of the caller's prompts, including padding, as transformers counts it.
        fill: number of columns added to pad the prompts to a compiled length.

    Returns:
        The rules, with numpy arrays; None if there are none.

    Raises:
        ValueError: a token is not in the vocabulary.
    """
    masks = functools.partial(_mask, vocabulary=vocabulary)
    rules: dict[str, Any] = {}
    for name, key in (("sequence_bias", "sequence_bias"), ("bad_words", "bad_words_ids")):
        listed = values.get(key, [])
        if name == "bad_words":  # bad words never prevent a row from ending
            listed = [[word, -np.inf] for word in listed if word not in [[i] for i in end_tokens]]
        if listed:
            _require_known(key, [i for ids, _ in listed for i in ids], vocabulary)
            rules[name] = _sequences(listed)
    if "repetition_penalty" in values:
        rules["repetition_penalty"] = np.float32(values["repetition_penalty"])
    rules["ngram_size"] = values.get("no_repeat_ngram_size", 0)
    least = values.get("min_new_tokens", values.get("min_length", 0) - length)
    if least > 0 and end_tokens:
        rules["min_new_tokens"] = np.int32(least)
    if "exponential_decay_length_penalty" in values and end_tokens:
        start, factor = values["exponential_decay_length_penalty"]
        rules["decay"] = np.int32(start), np.float32(factor)
    if "min_new_tokens" in rules or "decay" in rules:
        rules["end_tokens"] = masks(end_tokens)
    # As in transformers, forced only after a single token: an encoder-decoder's start token.
    first = values.get("forced_bos_token_id") if length == 1 else None
    for name, forced in (
        ("forced_first", first),
        ("forced_last", values.get("forced_eos_token_id")),
    ):
        if forced is not None:
            ids = forced if isinstance(forced, list) else [forced]
            _require_known("a forced token", ids, vocabulary)
            rules[name] = masks(ids)
    rules["remove_invalid"] = values.get("remove_invalid_values", False)
    for name, key in (
        ("suppressed", "suppress_tokens"),
        ("suppressed_at_begin", "begin_suppress_tokens"),
    ):
        if key in values:
            _require_known(key, values[key], vocabulary)
            rules[name] = masks(values[key])
    if "begin_suppress_tokens" in values:
        rules["begin"] = np.int32(first is not None)
    return Rules(np.int32(fill), **rules) if any(_is_set(rule) for rule in rules.values()) else None


def _is_set(rule: Any) -> bool:
    return not isinstance(rule, int) or bool(rule)


def _require_known(what: str, ids: Sequence[int], vocabulary: int) -> None:
    unknown = [i for i in ids if i >= vocabulary]
    if unknown:
        raise ValueError(
            f"generation_config.json: {what} contains token {unknown[0]}, but the vocabulary has "
            f"{vocabulary} tokens; fix it or ignore the file's values"
        )


def _mask(ids: Sequence[int], vocabulary: int) -> np.ndarray:
    return np.isin(np.arange(vocabulary), ids)


def _sequences(listed: Sequence[Sequence[Any]]) -> Sequences:
    length = max(len(ids) for ids, _ in listed) - 1
    before = [[_NOTHING] * (length - len(ids) + 1) + list(ids[:-1]) for ids, _ in listed]
    return Sequences(
        np.array(before, np.int32).reshape(len(listed), length),
        np.array([ids[-1] for ids, _ in listed], np.int32),
        np.array([bias for _, bias in listed], np.float32),
    )


def read_prompt(rules: Rules, ids: Array, mask: Array, vocabulary: int) -> Prompt:
    """Prepares prompts for `process`.

    Args:
        rules: the rules.
        ids: int32[B, T], prompts padded on the left.
        mask: bool[B, T], True at tokens.
        vocabulary: number of tokens, V.

    Returns:
        The prompts' tokens.
    """
    seen = None
    if rules.repetition_penalty is not None:
        seen = _said(jnp.where(mask, ids, _NOTHING), vocabulary)
    return Prompt(jnp.where(jnp.arange(ids.shape[1]) < rules.fill, _NOTHING, ids), seen)


def _said(ids: Array, vocabulary: int) -> Array:
    """Returns bool[B, V], which tokens occur in ids[B, N]; ids outside the vocabulary do not."""
    rows = jnp.arange(len(ids))[:, None]
    said = jnp.zeros((len(ids), vocabulary), bool)
    return said.at[rows, jnp.where(ids < 0, vocabulary, ids)].set(True, mode="drop")


def process(rules: Rules, prompt: Prompt, logits: Array, tokens: Array, step: Array) -> Array:
    """Applies all rules to the logits of one step, in transformers' order. Pure.

    Args:
        rules: the rules.
        prompt: the prompt from `read_prompt`.
        logits: float[B, V].
        tokens: int32[B, M]; the first `step` are already chosen.
        step: int32[], index of the token to choose.

    Returns:
        float[B, V].
    """
    count = tokens.shape[-1]
    said = jnp.where(jnp.arange(count) < step, tokens, _NOTHING)
    history, end = jnp.concatenate([prompt.ids, said], axis=-1), prompt.ids.shape[-1] + step
    if rules.sequence_bias is not None:
        logits = _add_bias(rules.sequence_bias, logits, history, end)
    if prompt.seen is not None:  # there is a repetition penalty
        seen = prompt.seen | _said(said, logits.shape[-1])
        logits = jnp.where(seen, _penalised(logits, rules.repetition_penalty), logits)
    if rules.ngram_size:
        logits = _ban(logits, _repeating(history, end, rules.ngram_size, logits.shape[-1]))
    if rules.bad_words is not None:
        logits = _add_bias(rules.bad_words, logits, history, end)
    if rules.min_new_tokens is not None:
        logits = _ban(logits, rules.end_tokens & (step < rules.min_new_tokens))
    if rules.forced_first is not None:
        logits = _force(logits, rules.forced_first, step == 0)
    if rules.forced_last is not None:
        logits = _force(logits, rules.forced_last, step == count - 1)
    if rules.remove_invalid:
        logits = jnp.nan_to_num(logits)
    if rules.decay is not None:
        start, factor = rules.decay
        growth = jnp.abs(logits) * (factor ** jnp.maximum(step - start, 0) - 1)
        logits = jnp.where(rules.end_tokens & jnp.isfinite(logits), logits + growth, logits)
    if rules.suppressed is not None:
        logits = _ban(logits, rules.suppressed)
    if rules.suppressed_at_begin is not None:
        logits = _ban(logits, rules.suppressed_at_begin & (step == rules.begin))
    return logits


def _ban(logits: Array, banned: Array) -> Array:
    return jnp.where(banned, -jnp.inf, logits)


def _force(logits: Array, forced: Array, now: Array) -> Array:
    return jnp.where(now, jnp.where(forced, 0, -jnp.inf), logits)


def _penalised(logits: Array, penalty: Array) -> Array:
    """Applies the repetition penalty of Keskar et al. 2019."""
    return jnp.where(logits < 0, logits * penalty, logits / penalty)


def _last(history: Array, end: Array, count: int) -> Array:
    """Returns int32[B, count], the tokens before column `end`; _NOTHING before the first column."""
    columns = end - count + jnp.arange(count)
    return jnp.where(columns < 0, _NOTHING, history[:, jnp.maximum(columns, 0)])


def _add_bias(sequences: Sequences, logits: Array, history: Array, end: Array) -> Array:
    before = jnp.asarray(sequences.before)
    last = _last(history, end, before.shape[1])[:, None]  # [B, 1, L]
    fits = ((before == last) | (before == _NOTHING)).all(-1)  # [B, S]
    bias = jnp.where(fits, sequences.bias, 0)
    return logits + jnp.zeros_like(logits).at[:, sequences.last].add(bias)


def _repeating(history: Array, end: Array, size: int, vocabulary: int) -> Array:
    """Returns bool[B, V], the tokens that would repeat a sequence of `size` tokens."""
    windows = history.shape[1] - size + 1
    if windows < 1:
        return jnp.zeros((len(history), vocabulary), bool)
    begun = _last(history, end, size - 1)
    same = jnp.ones((len(history), windows), bool)
    for place in range(size - 1):
        same &= history[:, place : place + windows] == begun[:, place, None]
    complete = (begun != _NOTHING).all(-1, keepdims=True)
    # Tokens not generated yet are _NOTHING, which bans nothing.
    return _said(jnp.where(same & complete, history[:, size - 1 :], _NOTHING), vocabulary)
