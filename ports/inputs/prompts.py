"""Prompts in the checkpoint's chat template, and the arrays of prompts with and without images."""

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ports.inputs.model_inputs import pair_prompts


def has_processor(directory: Path | None) -> bool:
    """Returns whether a checkpoint has the settings of a processor."""
    names = ("processor_config.json", "preprocessor_config.json")
    return directory is not None and any((directory / name).is_file() for name in names)


def render(processor: Any, prompt: Any, *, image_text: str, where: Any) -> str:
    """Renders a user's prompt with one image in the checkpoint's chat template.

    If the template does not support images, the image is inserted as text, on its own line before
    the prompt.

    Args:
        processor: the checkpoint's processor.
        prompt: the user's text.
        image_text: how an image is written as text; "{}" is the image token.
        where: the checkpoint's directory, for the messages.

    Returns:
        The prompt for `run_processor`, ending where the answer starts.

    Raises:
        ValueError: `prompt` is not a string, or there is no chat template or one that fails.
    """
    if not isinstance(prompt, str):
        raise ValueError(
            f"the prompt is a {type(prompt).__name__}; expected a string, one prompt per call"
        )
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"{where} has no chat template; add that of its model family as chat_template.jinja"
        )
    token = str(getattr(processor, "image_token", ""))
    parts = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = f"{image_text.format(token)}\n{prompt}"
    reasons = []
    for content in (parts, text, [{"type": "text", "text": text}]):
        message = [{"role": "user", "content": content}]
        try:
            said = processor.apply_chat_template(message, add_generation_prompt=True)
        except Exception as error:  # Jinja's errors, and any that the template's code raises
            reasons.append(" ".join(f"{type(error).__name__}: {error}".split())[:200])
            continue
        if not token or said.count(token) == 1 + prompt.count(token):
            return said
        reasons.append(f"it renders {said.count(token)} {token} for one image")
    raise ValueError(
        f"{where}: its chat template fails ({'; '.join(dict.fromkeys(reasons))}); replace it "
        "with that of its model family, as chat_template.jinja"
    )


def run_processor(
    processor: Any, texts: Sequence[str], images: Sequence[Any] | None, options: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Returns the processor's arrays of rendered prompts with their images, padded on the left.

    Args:
        processor: the checkpoint's processor.
        texts: as for `pair_prompts`.
        images: as for `pair_prompts`.
        options: further arguments of the processor.

    Returns:
        Name -> array. The beginning-of-sequence token stands once in a row, whether the template or
        the tokenizer writes it; without any image, there are no arrays of images.

    Raises:
        ValueError: as for `pair_prompts`, or the processor does not take an option.
    """
    pairs = pair_prompts(texts, images, getattr(processor, "image_token", None))
    _check_options(processor, options)
    processor.tokenizer.padding_side = "left"
    rendered = [text for text, _ in pairs]
    batch = processor(
        text=rendered,
        # transformers' image processors refuse a batch without any image.
        images=[listed for _, listed in pairs] if any(listed for _, listed in pairs) else None,
        padding=True,
        return_tensors="np",
        **options,
    )
    arrays = {name: np.asarray(value) for name, value in batch.items()}
    return _with_one_start(processor.tokenizer, rendered, arrays, options)


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, where: Any) -> str:
    """Renders a chat without images in the checkpoint's chat template.

    Some templates read the text of a message, others a list of its parts and, without an error,
    nothing of a plain text. Which form a template reads is tried with a mark in place of every
    message's text: all marks must be in the result. The text itself may be changed, as by templates
    that leave out the reasoning of earlier turns.

    Args:
        tokenizer: the checkpoint's tokenizer.
        messages: {"role": "user" or "assistant" ..., "content": text} in turn.
        where: the checkpoint's directory, for the messages.

    Returns:
        The prompt for `tokenize`, ending where the answer starts.

    Raises:
        ValueError: there is no chat template, or it fails or leaves out a message.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(f"{where} has no chat template; add that of the model's authors")

    def rendered(texts: Sequence[str], in_parts: bool) -> str:
        chat = [
            {**each, "content": [{"type": "text", "text": text}] if in_parts else text}
            for each, text in zip(messages, texts, strict=True)
        ]
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    # Unlike a message, a mark is in no template.
    marks = [f"message-{i}-f3b1" for i in range(len(messages))]
    reasons = []
    for in_parts in (False, True):
        try:
            said = rendered(marks, in_parts)
            missing = [
                each["role"] for each, mark in zip(messages, marks, strict=True) if mark not in said
            ]
            if not missing:
                return rendered([each["content"] for each in messages], in_parts)
            reasons.append(f"it leaves out a message of role {missing[0]!r}")
        except Exception as error:  # Jinja's errors, and any that the template's code raises
            reasons.append(" ".join(f"{type(error).__name__}: {error}".split())[:200])
    raise ValueError(
        f"{where}: its chat template fails for this chat ({'; '.join(dict.fromkeys(reasons))})"
    )


def tokenize(tokenizer: Any, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the arrays of prompts without images, padded on the left.

    Args:
        tokenizer: the checkpoint's tokenizer.
        texts: prompts from `render_chat`, which has written the special tokens.

    Returns:
        input_ids and attention_mask, int[B, T].

    Raises:
        ValueError: there are no prompts.
    """
    if not len(texts):
        raise ValueError("got no prompts; expected one or more")
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    length = max(map(len, rows))
    arrays = {name: np.zeros((len(rows), length), np.int32) for name in ("ids", "mask")}
    for row, (ids, mask) in zip(rows, zip(*arrays.values(), strict=True), strict=True):
        ids[length - len(row) :], mask[length - len(row) :] = row, 1
    return {"input_ids": arrays["ids"], "attention_mask": arrays["mask"]}


def _with_one_start(
    tokenizer: Any,
    texts: Sequence[str],
    arrays: dict[str, np.ndarray],
    options: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Drops the beginning-of-sequence token of rows whose text and tokenizer both write it.

    It stays in the text until then: without it, some tokenizers begin the first word otherwise.
    Whether the tokenizer writes it is read from the arrays: a call without padding would switch off
    the padding of a tokenizer that other threads use.
    """
    start = tokenizer.bos_token_id
    if start is None:
        return arrays
    ids, first = arrays["input_ids"], (arrays["attention_mask"] != 0).argmax(1)
    twice = []
    for row, (text, place) in enumerate(zip(texts, first, strict=True)):
        said = re.match(f"(?:{re.escape(tokenizer.bos_token)})*", text)
        count = len(said[0]) // len(tokenizer.bos_token) if said else 0
        if count and ids[row, place : place + count + 1].tolist() == [start] * (count + 1):
            twice.append(row)
    if not twice:
        return arrays
    of_tokens = {
        name: value.copy() for name, value in arrays.items() if value.shape[:2] == ids.shape
    }
    padding = {"input_ids": tokenizer.pad_token_id or 0, "special_tokens_mask": 1}
    for name, value in of_tokens.items():
        value[twice, first[twice]] = padding.get(name, 0)
    # Columns that are now padding in all rows, but for those up to the multiple that was asked for.
    given = {**options, **(options.get("text_kwargs") or {})}
    multiple = given.get("pad_to_multiple_of") or 1
    length = ids.shape[1] - (of_tokens["attention_mask"] != 0).any(0).argmax()
    begin = max(0, ids.shape[1] - math.ceil(length / multiple) * multiple)
    return arrays | {name: value[:, begin:] for name, value in of_tokens.items()}


def _check_options(processor: Any, options: Mapping[str, Any]) -> None:
    # A class passes what it does not know on to its base. transformers' processors take any option,
    # and warn of those that they do not know.
    calls = [vars(each)["__call__"] for each in type(processor).__mro__ if "__call__" in vars(each)]
    taken = [inspect.signature(call).parameters for call in calls]
    unknown = [name for name in options if not any(name in each for each in taken)]
    is_open = all(any(p.kind is p.VAR_KEYWORD for p in each.values()) for each in taken)
    if unknown and not is_open:
        raise ValueError(
            f"the processor has no option {', '.join(unknown)}; expected texts and images alone"
        )
