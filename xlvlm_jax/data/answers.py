"""Appends answers to their prompts, in the form that the model itself would write them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ports import VLM


class Answered(NamedTuple):
    """Texts for the processor, and where their answers start."""

    texts: list[str]
    suffixes: list[str] | None  # the answers, where the processor takes them apart (a prefix-LM)
    lengths: np.ndarray  # int[N]: the number of a text's last tokens that are the answer


def answered(
    vlm: VLM, prompts: Sequence[str], answers: Sequence[str], *, ended: bool = True
) -> Answered:
    """Returns texts for the processor, and where their answers start.

    Args:
        vlm: the model.
        prompts: rendered, one per row.
        answers: what follows each prompt.
        ended: whether the end-of-answer token follows too.

    Returns:
        One text per row, with its answer or beside it.
    """
    end = end_token(vlm) if ended else ""
    if vlm.module.prefix_lm:
        # The processor writes the answers, with an end token, where the model does not see ahead.
        written = [f"{answer}{end}" for _, answer in zip(prompts, answers, strict=True)]
        ids = vlm.tokenizer(written, add_special_tokens=False)["input_ids"]
        return Answered(list(prompts), list(answers), np.array([len(row) for row in ids]))
    texts = []
    for prompt, answer in zip(prompts, answers, strict=True):
        # A chat template may end in a line break; other prompts end in a word or a colon.
        space = "" if prompt[-1:].isspace() else " "
        texts.append(f"{prompt}{space}{answer}{end}")
    # The processor expands images equally in both, so the tokenizer's lengths differ by as much.
    ids = vlm.tokenizer([*prompts, *texts])["input_ids"]
    lengths = np.array([len(row) for row in ids])
    return Answered(texts, None, lengths[len(prompts) :] - lengths[: len(prompts)])


def without_end(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drops the last position, the end token that a prefix-LM's processor writes in every row."""
    shape = arrays["input_ids"].shape
    return {name: x[:, :-1] if x.shape == shape else x for name, x in arrays.items()}


def end_token(vlm: VLM) -> str:
    """Returns the text of the end-of-answer token: the tokenizer's, if generation stops there."""
    tokenizer = vlm.tokenizer
    if not vlm.eos_tokens:
        return tokenizer.eos_token or ""
    if tokenizer.eos_token_id in vlm.eos_tokens:
        return tokenizer.eos_token
    return tokenizer.convert_ids_to_tokens(vlm.eos_tokens[0])
