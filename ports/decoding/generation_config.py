"""generation_config.json: the values that change generated tokens, and those that are refused.

Keys and their meaning are those of transformers' `GenerationConfig`.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ports import checkpoint
from ports.inputs import vocabulary

NAME = "generation_config.json"
ENDS = ("eos_token_id", "pad_token_id")  # kept even if the other values are ignored


class _Key(NamedTuple):
    neutral: tuple[Any, ...]  # values that change nothing; null never does
    fits: Callable[[Any], bool]
    expected: str


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and all(_are_ids(word) and word for word in value)


def _are_biases(value: Any) -> bool:
    pairs = isinstance(value, list) and all(isinstance(pair, list) for pair in value)
    return pairs and all(
        len(pair) == 2 and _are_words([pair[0]]) and _is_number(pair[1]) for pair in value
    )


def _is_decay(value: Any) -> bool:
    pair = isinstance(value, list | tuple) and len(value) == 2
    return pair and _is_count(value[0]) and _is_number(value[1])


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


_POSITIVE = (lambda value: _is_number(value) and value > 0, "a number above 0")
_COUNT = (_is_count, "a whole number, at least 0")
_IDS = (_are_ids, "a list of token ids")
_SHARE = (_is_share, "a number from 0 to 1")
_FORCED = (lambda value: _is_count(value) or (_are_ids(value) and value), "a token id, or several")

_LOGITS = {
    "sequence_bias": _Key(([],), _are_biases, "a list of [token ids, number]"),
    "repetition_penalty": _Key((1,), *_POSITIVE),
    "no_repeat_ngram_size": _Key((0,), *_COUNT),
    "bad_words_ids": _Key(([],), _are_words, "a list of lists of token ids"),
    "min_length": _Key((0,), *_COUNT),
    "min_new_tokens": _Key((), *_COUNT),
    "forced_bos_token_id": _Key((), _is_count, "a token id"),
    "forced_eos_token_id": _Key((), *_FORCED),
    "remove_invalid_values": _Key((False,), lambda value: value is True, "true or false"),
    "exponential_decay_length_penalty": _Key((), _is_decay, "[start, factor]"),
    "suppress_tokens": _Key(([],), *_IDS),
    "begin_suppress_tokens": _Key(([],), *_IDS),
}
_SAMPLING = {
    "temperature": _Key((1,), *_POSITIVE),
    "top_k": _Key((0,), *_COUNT),
    "top_p": _Key((1,), *_SHARE),
    "min_p": _Key((), *_SHARE),
    "typical_p": _Key((1,), *_SHARE),
    "epsilon_cutoff": _Key((0, 1), *_SHARE),
    "eta_cutoff": _Key((0, 1), *_SHARE),
}
# Not implemented: options that must be null or one of these values.
_REFUSED = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "constraints": (),
    "force_words_ids": (),
    "forced_decoder_ids": (),
    "watermarking_config": (),
    "stop_strings": ([],),
    "max_time": (),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "dola_layers": (),
    "token_healing": (False,),
}
_REFUSED_OF_SAMPLES = {"top_h": ()}
_DEFAULT_TOP_K = 50  # transformers' default


def read(directory: Path | None) -> dict[str, Any]:
    """Reads a checkpoint's generation_config.json, or the values in config.json if there is none.

    Args:
        directory: the checkpoint; None gives no values.

    Returns:
        Key -> value.

    Raises:
        ValueError: a file is damaged.
    """
    if directory is None:
        return {}
    if (directory / NAME).exists():
        return checkpoint.read_json(directory / NAME)
    # From the file, as transformers' configuration objects drop these values; the top level counts
    # before text_config.
    config = checkpoint.read_json(directory / "config.json")
    text = config.get("text_config")
    values = {**(text if isinstance(text, dict) else {}), **_without_null(config)}
    return {key: values[key] for key in (*ENDS, *_LOGITS, *_SAMPLING, *_REFUSED) if key in values}


def special_tokens(
    config: Any, chosen: Mapping[str, Any], directory: Path | None, vocabulary_size: int
) -> tuple[tuple[int, ...], int]:
    """Returns the ids that end a row, and the one that fills it up afterwards.

    Args:
        config: the configuration of transformers.
        chosen: the values of generation_config.json, which precede it.
        directory: the checkpoint's, for the message.
        vocabulary_size: the ids 0 to this - 1 exist.

    Raises:
        ValueError: an id outside the vocabulary.
    """
    text = config.get_text_config()
    # The text configuration of Molmo2 has no such values, unless they are in the file.
    eos = chosen.get("eos_token_id", getattr(text, "eos_token_id", None))
    eos = tuple(eos) if isinstance(eos, list | tuple) else (() if eos is None else (eos,))
    candidates = (
        chosen.get("pad_token_id"),
        # Idefics3 and SmolVLM have a property of this name, which is not the token that pads.
        vars(config).get("pad_token_id"),
        getattr(text, "pad_token_id", None),
        *eos[:1],
        0,
    )
    pad = next(token for token in candidates if token is not None)
    named = {"eos_token_id": eos, "pad_token_id": (pad,)}
    vocabulary.check_special_ids(named, vocabulary_size, directory)
    return eos, pad


def given(values: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a caller's values, plus the stored end-of-sequence and padding tokens.

    Args:
        values: the caller's values.
        stored: the values that they replace.

    Returns:
        The caller's values; eos_token_id and pad_token_id are kept from `stored` if not given.

    Raises:
        ValueError: transformers does not know a key.
    """
    from transformers import GenerationConfig

    known = {*GenerationConfig().to_dict(), *_LOGITS, *_SAMPLING, *_REFUSED, *_REFUSED_OF_SAMPLES}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            nearest = f"; nearest: {close[0]}" if close else ""
            raise ValueError(f"generation_config has no {key!r}{nearest}")
    return {key: stored[key] for key in ENDS if key in stored} | dict(values)


def changing_logits(values: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the values that change greedy decoding, for `logits.make_rules`.

    Args:
        values: all values of a generation configuration.

    Returns:
        The selected values.

    Raises:
        ValueError: a value is invalid or not implemented; with do_sample, also for sampling values.
    """
    _refuse(values, _REFUSED)
    if values.get("do_sample"):
        of_sampling(values)
    chosen = _chosen(values, _LOGITS)
    suppressed = set(chosen.get("suppress_tokens", ()))
    for key in ("forced_bos_token_id", "forced_eos_token_id"):
        ids = chosen.get(key, [])
        if ids != [] and suppressed.issuperset(ids if isinstance(ids, list) else [ids]):
            raise ValueError(
                f"generation_config: {key} is {ids}, which suppress_tokens forbids; remove one"
            )
    return chosen


def of_sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the values for sampling, as the arguments of `Sampling`.

    Args:
        values: all values of a generation configuration.

    Returns:
        The selected values; missing ones have transformers' defaults.

    Raises:
        ValueError: a value is invalid or not implemented.
    """
    _refuse(values, _REFUSED_OF_SAMPLES)
    return {"top_p": None} | _chosen({"top_k": _DEFAULT_TOP_K, **_without_null(values)}, _SAMPLING)


def check_sampling(name: str, value: Any) -> None:
    """Checks a value of `Sampling` against the range that it has in a generation configuration.

    Raises:
        ValueError: it is outside.
    """
    _, fits, expected = _SAMPLING[name]
    if not fits(value):
        raise ValueError(f"sampling: {name} is {value!r:.80}; expected {expected}")


def is_idle(name: str, value: Any) -> bool:
    """Returns whether transformers ignores a filter of `Sampling` with this value."""
    return value in _SAMPLING[name].neutral


def _without_null(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _chosen(values: Mapping[str, Any], keys: Mapping[str, _Key]) -> dict[str, Any]:
    chosen = {}
    for key, (neutral, fits, expected) in keys.items():
        value = values.get(key)
        if value is None or value in neutral:
            continue
        if not fits(value):
            raise ValueError(f"generation_config: {key} is {value!r:.80}; expected {expected}")
        chosen[key] = value
    return chosen


def _refuse(values: Mapping[str, Any], refused: Mapping[str, tuple[Any, ...]]) -> None:
    for key, neutral in refused.items():
        value = values.get(key)
        if value is not None and value not in neutral:
            wanted = f"expected {neutral[0]}" if neutral else "expected null"
            raise ValueError(
                f"generation_config: {key} is {value!r:.80}, which is not implemented; {wanted}, "
                "or ignore the values: generation_config={} or --ignore-generation-config"
            )
