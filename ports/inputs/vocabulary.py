"""Checks that a model has embeddings for the given token ids.

B batch, T positions, V rows of the table of embeddings.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def check_ids(input_ids: np.ndarray, size: int, image_tokens: Sequence[int] = ()) -> None:
    """Refuses token ids without an embedding, including padding.

    Args:
        input_ids: int[B, T].
        size: V; the ids 0 to V - 1 have an embedding.
        image_tokens: ids that need none, because image features replace them.

    Raises:
        ValueError: an id is outside the vocabulary, or the ids are not integers.
    """
    if not np.issubdtype(input_ids.dtype, np.integer):
        raise ValueError(f"input_ids have dtype {input_ids.dtype}; expected integers")
    outside = ((input_ids < 0) | (input_ids >= size)) & ~np.isin(input_ids, image_tokens)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise ValueError(
            f"token id {input_ids[row, column]} in row {row} is outside the vocabulary of {size} "
            f"(ids 0 to {size - 1}); leave the token out, choose another padding token, or load a "
            "checkpoint whose embeddings were resized for it"
        )


def check_special_ids(ids: Mapping[str, Sequence[Any]], size: int, where: Any) -> None:
    """Refuses special tokens that the model does not have.

    Args:
        ids: name in the configuration -> its ids.
        size: V.
        where: the checkpoint's directory, for the message.

    Raises:
        ValueError: an id is not an integer from 0 to V - 1.
    """
    for name, tokens in ids.items():
        for token in tokens:
            if type(token) is not int:
                raise ValueError(f"{where}: {name} is {token!r:.80}; expected an integer id")
            if not 0 <= token < size:
                raise ValueError(
                    f"{where}: {name} is {token}, outside the vocabulary of {size} (ids 0 to "
                    f"{size - 1}); set it to one of these in generation_config.json or config.json"
                )


def check_image_token(processor: Any, image_tokens: Sequence[int], where: Any) -> None:
    """Refuses a processor whose image token is not the model's.

    Args:
        processor: the checkpoint's; one that names no image token passes.
        image_tokens: the ids that config.json names.
        where: the checkpoint's directory, for the message.

    Raises:
        ValueError: its image token has another id.
    """
    token = getattr(processor, "image_token", None)
    if token is None:
        return
    if token == getattr(processor, "boi_token", None):
        # Prompts of Gemma 3 mark an image by the token that begins it.
        token = processor.tokenizer.image_token
    number = processor.tokenizer.convert_tokens_to_ids(str(token))
    # Those of Molmo 2 mark an image by a token that none of its tokens is.
    others = getattr(processor, "image_token_ids", None) or [number]
    if number not in image_tokens and others[0] not in image_tokens:
        raise ValueError(
            f"{where}: image token {str(token)!r} has id {number} in the tokenizer, but "
            f"config.json says {image_tokens[0]}; use files from the same checkpoint"
        )


def warn_of_longer_tokenizer(
    tokenizer: Any, size: int, image_tokens: Sequence[int], where: Any
) -> None:
    """Warns if the tokenizer has tokens that the model has no embedding for.

    Args:
        tokenizer: a Hugging Face tokenizer.
        size: V.
        image_tokens: ids that need no embedding.
        where: the checkpoint's directory, for the message.
    """
    vocabulary = tokenizer.get_vocab()
    beyond = sorted({id for id in vocabulary.values() if id >= size} - set(image_tokens))
    if beyond:
        first = next(token for token, id in vocabulary.items() if id == beyond[0])
        warnings.warn(
            f"{where}: the tokenizer has {len(beyond)} tokens that the model has no embedding for, "
            f"from {first!r} (id {beyond[0]}) on; the model's vocabulary is {size}, and prompts "
            "with these tokens are refused",
            stacklevel=2,
        )
