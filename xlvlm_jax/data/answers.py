"""Answers put behind their prompts, as the model itself would have written them."""

from collections.abc import Sequence

import numpy as np

from ports import VLM


def answered(
    vlm: VLM, prompts: Sequence[str], answers: Sequence[str], *, ended: bool = True
) -> tuple[list[str], np.ndarray]:
    """Texts for the processor, and where their answers begin.

    Args:
        vlm: the model.
        prompts: rendered, one a row.
        answers: what follows each.
        ended: whether the token that ends an answer follows too.

    Returns:
        One text a row, and int[N]: how many of its last tokens are the answer.
    """
    end = end_token(vlm) if ended else ""
    texts = []
    for prompt, answer in zip(prompts, answers, strict=True):
        # A chat template may end in a line break; other prompts end in a word or a colon.
        space = "" if prompt[-1:].isspace() else " "
        texts.append(f"{prompt}{space}{answer}{end}")
    # The processor expands images in both alike, so the difference is that of the tokenizer.
    ids = vlm.tokenizer([*prompts, *texts])["input_ids"]
    lengths = np.array([len(row) for row in ids])
    return texts, lengths[len(prompts) :] - lengths[: len(prompts)]


def end_token(vlm: VLM) -> str:
    """The text of the token that ends an answer: the tokenizer's own, if generation stops there."""
    tokenizer = vlm.tokenizer
    if not vlm.eos_tokens:
        return tokenizer.eos_token or ""
    if tokenizer.eos_token_id in vlm.eos_tokens:
        return tokenizer.eos_token
    return tokenizer.convert_ids_to_tokens(vlm.eos_tokens[0])
