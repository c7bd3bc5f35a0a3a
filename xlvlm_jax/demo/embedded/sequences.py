"""Training sequences: a picture, and behind it captions and questions that do not see each other.

Each continuation sees the picture and its own prompt and answer, and counts its positions from the
picture on. So the model trains on exactly what it is asked later, a picture and one prompt, while
the picture's keys and values are computed once for all of them.

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
    """A prompt, as the user writes it, and the answer to learn."""

    prompt: str
    answer: str
    weight: float = 1.0


class Continuations(NamedTuple):
    """What follows a picture; with a further leading axis, a batch of it."""

    input_ids: np.ndarray  # int32[G, S]
    target: np.ndarray  # int32[G, S]: the token that this position shall predict
    weight: np.ndarray  # float32[G, S]: of that prediction in the loss; 0 outside answers


def render(prompt: str) -> str:
    """The text of one user turn with a picture, as the chat template writes it."""
    return f"USER: <image>\n{prompt} ASSISTANT:"


def continuations(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], count: int, length: int
) -> Continuations:
    """The first `count` turns whose prompts fit into `length` positions, cut off at `length`."""
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
    """int32[F]: what every sequence begins with, up to the last image token."""
    ids = tokenizer(render(""))["input_ids"]
    return np.array([*ids[: ids.index(IMAGE)], *[IMAGE] * TOKENS_PER_IMAGE], np.int32)


def logits(
    model: llava.Llava, params: dict, prefix_ids: np.ndarray, pixels: jax.Array, ids: jax.Array
) -> jax.Array:
    """Logits [B, G, S, V] of the continuations ids[B, G, S] of the pictures [B, 3, H, W]."""
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
    # Every continuation gets its own copy of the picture's keys and values to go on from.
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
