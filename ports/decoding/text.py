"""Decodes token ids to text.

N rows, T positions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ports.tracing import is_traced


def decode_tokens(
    tokenizer: Any, tokens: Any, size: int, end_tokens: Sequence[int], pad_token: int
) -> str | list[str]:
    """Decodes token ids to text, without special tokens and the padding after a row's end.

    Args:
        tokenizer: a Hugging Face tokenizer.
        tokens: int[T] or int[N, T], an array from any library, or lists.
        size: the model has the ids 0 to size - 1; those missing in the tokenizer give no text.
        end_tokens: ids that end a generated row.
        pad_token: id that fills a row after its end. The tokenizer may not count it as a special
            token; elsewhere in a row it is then text.

    Returns:
        One string for [T], N strings for [N, T].

    Raises:
        ValueError: the tokens are not integers, have another number of axes, or neither the model
            nor the tokenizer has an id.
    """
    ids = _as_ids(tokens, max(size, len(tokenizer)))
    rows = [_without_filling(row, end_tokens, pad_token) for row in np.atleast_2d(ids).tolist()]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return texts if ids.ndim == 2 else texts[0]


def _as_ids(tokens: Any, size: int) -> np.ndarray:
    if is_traced(tokens):
        raise ValueError(
            "tokens are traced (by jax.jit, vmap or grad); decode what the compiled function "
            "returns"
        )
    expected = "expected token ids, integers of shape [T] or [N, T]"
    try:
        ids = np.asarray(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"tokens are not an array ({reason}); {expected}") from error
    if ids.ndim not in (1, 2):
        raise ValueError(f"tokens have shape {ids.shape}; {expected}")
    if ids.size and ids.dtype.kind not in "iu":
        raise ValueError(f"tokens have dtype {ids.dtype}; {expected}")
    outside = np.argwhere((ids < 0) | (ids >= size))
    if len(outside):
        raise ValueError(
            f"token id {ids[tuple(outside[0])]} at {outside[0].tolist()} does not exist; expected "
            f"ids from 0 to {size - 1}, without the -100 that masks labels"
        )
    return ids


def _without_filling(row: list[int], end_tokens: Sequence[int], pad_token: int) -> list[int]:
    """Returns the row up to the token that ended it, if only padding follows."""
    length = len(row)
    while length and row[length - 1] == pad_token:
        length -= 1
    if length and row[length - 1] in end_tokens:
        return row[:length]
    return row[: length + 1] if pad_token in end_tokens else row
