"""Prompts in the checkpoint's chat template, and the processor's arrays of prompts with images."""

import inspect
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
        f"{where}: its chat template fails ({reasons[0]}); replace it with that of its "
        "model family, as chat_template.jinja"
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

    Raises:
        ValueError: as for `pair_prompts`, or the processor does not take an option.
    """
    pairs = pair_prompts(texts, images, getattr(processor, "image_token", None))
    _check_options(processor, options)
    processor.tokenizer.padding_side = "left"
    batch = processor(
        text=[text for text, _ in pairs],
        images=[images for _, images in pairs],
        padding=True,
        return_tensors="np",
        **options,
    )
    return {name: np.asarray(value) for name, value in batch.items()}


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
