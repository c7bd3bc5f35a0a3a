"""Training sequences: a picture followed by captions and questions that do not see each other.

Each continuation attends to the picture and to itself, and counts its positions from the picture
on. The model thus trains on exactly what it sees later, a picture and one prompt, while the
picture's keys and values are computed once for all continuations.

B pictures, G continuations of each, S positions of a continuation, F positions of the prefix.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from ports.models import llava
from xlvlm_jax.demo.embedded.blueprint import IMAGE, TOKENS_PER_IMAGE


@dataclasses.dataclass(frozen=True)
class Turn:
    """A user's prompt and the answer to learn."""

    prompt: str
    answer: str
    weight: float = 1.0


class Continuations(NamedTuple):
    """The continuations of a picture; for a batch, with another leading axis."""

    input_ids: np.ndarray  # int32[G, S]
    target: np.ndarray  # int32[G, S]: the token to predict at this position
    weight: np.ndarray  # float32[G, S]: weight of the prediction in the loss; 0 outside answers


def render(prompt: str) -> str:
    """Returns the text of a user turn with a picture, as the chat template writes it."""
    return f"USER: <image>\n{prompt} ASSISTANT:"


def continuations(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], count: int, length: int
) -> Continuations:
    """Tokenizes the first `count` turns whose prompts fit into `length` positions.

    Args:
        tokenizer: the tokenizer.
        turns: prompts and answers.
        count: G.
        length: S, at which turns are cut off.

    Returns:
        The continuations; unused rows have weight 0.
    """
    prompts = [render(turn.prompt) for turn in turns]
    texts = [f"{prompt} {turn.answer}</s>" for prompt, turn in zip(prompts, turns, strict=True)]
    ids = tokenizer([*prompts, *texts])["input_ids"]
    rows = Continuations(*(np.zeros((count, length), kind) for kind in ("i4", "i4", "f4")))
    row = 0
    for turn, prompt, text in zip(turns, ids[: len(turns)], ids[len(turns) :], strict=True):
        head = prompt.index(IMAGE) + 1
        if row == count or len(prompt) - head > length - 1:
            continue
        own = np.array(text[head:], np.int32)
        end = min(len(own) - 1, length)
        first = len(prompt) - head - 1  # the prompt's last position predicts the answer's first
        rows.input_ids[row, :end] = own[:end]
        rows.target[row, :end] = own[1 : end + 1]
        rows.weight[row, first:end] = turn.weight
        row += 1
    return rows


@functools.cache
def prefix(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Returns int32[F], the start of every sequence up to the last image token."""
    ids = tokenizer(render(""))["input_ids"]
    return np.array([*ids[: ids.index(IMAGE)], *[IMAGE] * TOKENS_PER_IMAGE], np.int32)


def logits(
    model: llava.Llava,
    params: dict,
    prefix_ids: np.ndarray,
    pixels: jax.Array | np.ndarray,
    ids: jax.Array | np.ndarray,
) -> jax.Array:
    """Computes the logits of continuations.

    Args:
        model: the LLaVA.
        params: its parameters.
        prefix_ids: int32[F].
        pixels: float32[B, 3, H, W], the pictures.
        ids: int32[B, G, S], the continuations of each.

    Returns:
        float32[B, G, S, V].
    """
    batch, count, length = ids.shape
    size = len(prefix_ids)
    cache = model.init_cache(batch, size + length)
    inputs = {
        "input_ids": jnp.broadcast_to(prefix_ids, (batch, size)),
        "pixel_values": pixels,
    }
    _, variables = model.apply(
        {"params": params, "cache": cache}, inputs, method="states", mutable=["cache"]
    )
    # Each continuation gets its own copy of the picture's keys and values.
    cache = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), variables["cache"])
    position = size + jnp.arange(length)
    visible = position[:, None] >= jnp.arange(size + length)
    flat = (batch * count, length)
    result, _ = model.apply(
        {"params": params, "cache": cache},
        ids.reshape(flat),
        jnp.broadcast_to(position, flat),
        visible[None, None],
        size,
        method="extend",
        mutable=["cache"],
    )
    return model.bind({"params": params}).unembed(result).reshape(*ids.shape, -1)
