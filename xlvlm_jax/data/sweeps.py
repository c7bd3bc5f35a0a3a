"""Answers a batch under several edits, in as few runs as the key-value cache has room for.

B batch, M new tokens.
"""

from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from ports import VLM
from ports.intervene.edits import Edits

MOST_ROWS, CACHE_BYTES = 512, 4 * 2**30  # maximum rows and key-value cache of one run


def rows_at_once(vlm: VLM, inputs: Mapping[str, np.ndarray], max_new_tokens: int) -> int:
    """Returns how many rows, variants times batch, keep the cache within its bound.

    Args:
        vlm: the model.
        inputs: the processor's arrays of a batch.
        max_new_tokens: maximum number of tokens per answer.

    Returns:
        The number of rows, at least those of the batch.
    """
    rows, length = inputs["input_ids"].shape
    row = vlm.cache_bytes(rows, length + max_new_tokens) // rows
    return max(min(MOST_ROWS, CACHE_BYTES // row), rows)


def sweep_in_runs(
    vlm: VLM,
    inputs: Mapping[str, np.ndarray],
    variants: Sequence[Edits],
    max_new_tokens: int,
    max_rows: int | None = None,
) -> Iterator[jax.Array]:
    """Yields the answers of a batch under each variant, see `VLM.sweep`.

    Args:
        vlm: the model.
        inputs: the processor's arrays of a batch.
        variants: edits of the same sites and kinds.
        max_new_tokens: maximum number of tokens per answer.
        max_rows: maximum number of rows, variants times batch, of one run; None for `rows_at_once`.

    Yields:
        Tokens int32[B, M], for each variant in order.
    """
    at_once = max_rows or rows_at_once(vlm, inputs, max_new_tokens)
    runs = -(-len(variants) * len(inputs["input_ids"]) // at_once)
    size = -(-len(variants) // runs)
    for start in range(0, len(variants), size):
        chunk = list(variants[start : start + size])
        kept = len(chunk)
        # Padded, so that every run uses the same program.
        chunk += chunk[:1] * (size - kept)
        result = vlm.sweep(inputs, chunk, max_new_tokens=max_new_tokens)
        yield from result.tokens[:kept]
