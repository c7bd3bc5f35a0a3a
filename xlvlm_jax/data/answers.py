"""Appends answers to their prompts, in the form that the model itself would write them."""

from collections.abc import Sequence

import numpy as np

from ports import VLM


def answered(
    vlm: VLM, prompts: Sequence[str], answers: Sequence[str], *, ended: bool = True
) -> tuple[list[str], np.ndarray]:
    """Returns texts for the processor, and where their answers start.

    Args:
        vlm: the model.
        prompts: rendered, one per row.
        answers: what follows each prompt.
        ended: whether the end-of-answer token follows too.

    Returns:
        one text per row, and int[N]: the number of its last tokens that are the answer.

    Raises:
        ValueError: the model takes prompts and answers apart (a prefix-LM).
    """
    if vlm.module.prefix_lm:
        raise ValueError(
            f"a {vlm.config.model_type} sees its prompt both ways and ends it with a line break: "
            "an answer can't follow in the same text; use generated answers (--mode generate)"
        )
    end = end_token(vlm) if ended else ""
    texts = []
    for prompt, answer in zip(prompts, answers, strict=True):
        # A chat template may end in a line break; other prompts end in a word or a colon.
        space = "" if prompt[-1:].isspace() else " "
        texts.append(f"{prompt}{space}{answer}{end}")
    # The processor expands images equally in both, so the tokenizer's lengths differ by as much.
    ids = vlm.tokenizer([*prompts, *texts])["input_ids"]
    lengths = np.array([len(row) for row in ids])
    return texts, lengths[len(prompts) :] - lengths[: len(prompts)]


def end_token(vlm: VLM) -> str:
    """Returns the text of the end-of-answer token: the tokenizer's, if generation stops there."""
    tokenizer = vlm.tokenizer
    if not vlm.eos_tokens:
        return tokenizer.eos_token or ""
    if tokenizer.eos_token_id in vlm.eos_tokens:
        return tokenizer.eos_token
    return tokenizer.convert_ids_to_tokens(vlm.eos_tokens[0])
