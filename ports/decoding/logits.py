"""What changes logits before a token is chosen: penalties, bans, forced tokens.

B batch, T positions of the prompt, M new tokens, V vocabulary, S sequences of tokens of which the
longest has L + 1.

The rules, their order and what they count as said before are those of transformers' `generate`:
prompts count with their image tokens, without padding in the repetition penalty and with the
caller's padding elsewhere. Numbers are arguments of a compiled program, so that changing one never
compiles again; which rules there are is part of it, and without any it has none of this.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
_NOTHING = -2  # the id of what is not there; processors fill with ids from -1 on


class Sequences(NamedTuple):
    """Sequences of tokens whose last one gets a bias where the others precede it."""

    before: Any  # int32[S, L], on the left of shorter ones _NOTHING
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
    """The rules of a generation; None (0, False) leaves one out. `make_rules` makes them.

    Attributes:
        fill: int32[], how many columns of the prompts were added up to a compiled length.
        sequence_bias: `Sequences` and what is added to their last tokens.
        repetition_penalty: float32[]; logits of tokens that were there are divided by it, negative
            ones multiplied.
        ngram_size: no sequence of so many tokens comes twice.
        bad_words: `Sequences` that may not come at all.
        end_tokens: bool[V], those that end a row.
        min_new_tokens: int32[], how many tokens come before those.
        forced_first: bool[V], the first token is one of these.
        forced_last: bool[V], the last of M tokens is one of these.
        remove_invalid: NaN becomes 0, infinities the largest numbers.
        decay: (start int32[], factor float32[]): from the start on, the logits of end tokens grow.
        suppressed: bool[V], tokens that never come.
        suppressed_at_begin: bool[V], tokens that do not come at step `begin`.
        begin: int32[].
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
    """What was said before the first new token; the same at every step."""

    ids: Array  # int32[B, T], _NOTHING where columns were filled up
    seen: Array | None  # bool[B, V], for a repetition penalty


def make_rules(
    values: Mapping[str, Any],
    *,
    vocabulary: int,
    end_tokens: Sequence[int],
    length: int,
    fill: int,
) -> Rules | None:
    """The rules that transformers' names ask for, with numpy arrays; None if there are none.

    Args:
        values: of `generation_config.changing_logits`.
        vocabulary: V.
        end_tokens: ids that end a row.
        length: of the caller's prompts, padding included, as transformers counts it.
        fill: how many more columns the compiled program has.

    Raises ValueError for a token that is not in the vocabulary.
    """
    masks = functools.partial(_mask, vocabulary=vocabulary)
    rules: dict[str, Any] = {}
    for name, key in (("sequence_bias", "sequence_bias"), ("bad_words", "bad_words_ids")):
        listed = values.get(key, [])
        if name == "bad_words":  # which never keep a row from ending
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
    # Forced is the token after a single one, which is that of an encoder-decoder's beginning.
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
            f"generation_config.json: {what} names token {unknown[0]}, and the vocabulary has "
            f"{vocabulary}; mend it or leave the file's values out"
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
    """Prompts int32[B, T], bool[B, T], padded on the left, as `process` takes them."""
    seen = None
    if rules.repetition_penalty is not None:
        seen = _said(jnp.where(mask, ids, _NOTHING), vocabulary)
    return Prompt(jnp.where(jnp.arange(ids.shape[1]) < rules.fill, _NOTHING, ids), seen)


def _said(ids: Array, vocabulary: int) -> Array:
    """bool[B, V]: which tokens are among the ids[B, N]; others than the vocabulary's are not."""
    rows = jnp.arange(len(ids))[:, None]
    said = jnp.zeros((len(ids), vocabulary), bool)
    return said.at[rows, jnp.where(ids < 0, vocabulary, ids)].set(True, mode="drop")


def process(rules: Rules, prompt: Prompt, logits: Array, tokens: Array, step: Array) -> Array:
    """Logits [B, V] for token `step` after all rules, in transformers' order.

    prompt: of `read_prompt`; tokens int32[B, M], of which the first `step` were chosen. Pure.
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
    """Keskar et al. 2019."""
    return jnp.where(logits < 0, logits * penalty, logits / penalty)


def _last(history: Array, end: Array, count: int) -> Array:
    """int32[B, count]: what stands before column `end`; _NOTHING before the first column."""
    columns = end - count + jnp.arange(count)
    return jnp.where(columns < 0, _NOTHING, history[:, jnp.maximum(columns, 0)])


def _add_bias(sequences: Sequences, logits: Array, history: Array, end: Array) -> Array:
    before = jnp.asarray(sequences.before)
    last = _last(history, end, before.shape[1])[:, None]  # [B, 1, L]
    fits = ((before == last) | (before == _NOTHING)).all(-1)  # [B, S]
    bias = jnp.where(fits, sequences.bias, 0)
    return logits + jnp.zeros_like(logits).at[:, sequences.last].add(bias)


def _repeating(history: Array, end: Array, size: int, vocabulary: int) -> Array:
    """bool[B, V]: the tokens with which a sequence of `size` tokens would come again."""
    windows = history.shape[1] - size + 1
    if windows < 1:
        return jnp.zeros((len(history), vocabulary), bool)
    begun = _last(history, end, size - 1)
    same = jnp.ones((len(history), windows), bool)
    for place in range(size - 1):
        same &= history[:, place : place + windows] == begun[:, place, None]
    complete = (begun != _NOTHING).all(-1, keepdims=True)
    # What was not said yet is _NOTHING, and bans nothing.
    return _said(jnp.where(same & complete, history[:, size - 1 :], _NOTHING), vocabulary)
