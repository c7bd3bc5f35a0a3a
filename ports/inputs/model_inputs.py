"""Checks what callers pass to a model: the processor's arrays, or prompts with their images.

B batch, T positions.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ports.tracing import is_traced


def to_numpy(inputs: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Selects the arrays that a model takes and converts them to numpy.

    Args:
        inputs: name -> array, in a dict or transformers' BatchFeature; numpy or JAX arrays, torch
            tensors on the CPU, or lists.
        names: the arrays that the model takes; others are dropped.

    Returns:
        Name -> numpy array.

    Raises:
        ValueError: `inputs` is not a mapping, or a value is traced or not numeric.
    """
    if not isinstance(inputs, Mapping):
        raise ValueError(
            f"inputs is a {type(inputs).__name__}; expected the processor's arrays by name, as "
            "vlm.process([vlm.render(text)], [image]) returns them"
        )
    arrays = {}
    for name in names:
        value = inputs.get(name)
        if value is None:
            continue
        if is_traced(value):
            raise ValueError(
                f"inputs[{name!r}] is traced (by jax.jit, vmap or grad), but the methods of VLM "
                "are already compiled; call them with arrays, or transform the pure vlm.apply"
            )
        try:
            arrays[name] = np.asarray(value)
            reason = f"its dtype is {arrays[name].dtype}"
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
        # Object arrays pass: a port has a better message for them (the processor did not pad).
        if name not in arrays or arrays[name].dtype.kind in "SU":
            raise ValueError(
                f"inputs[{name!r}] is a {type(value).__name__} that is not an array of numbers "
                f"({reason}); pass what the processor returns with return_tensors='np'"
            )
    return arrays


def with_mask(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays with an attention_mask, of ones where there is none.

    Raises:
        ValueError: no input_ids [B, T], or a mask of another shape.
    """
    if "input_ids" not in arrays or arrays["input_ids"].ndim != 2:
        raise ValueError(
            "inputs have no input_ids of shape [batch, positions]; pass what the processor "
            "returns with return_tensors='np'"
        )
    mask = arrays.get("attention_mask", np.ones_like(arrays["input_ids"]))
    if mask.shape != arrays["input_ids"].shape:
        raise ValueError(
            f"attention_mask has shape {mask.shape}; expected the shape of input_ids, "
            f"{arrays['input_ids'].shape}"
        )
    return arrays | {"attention_mask": mask}


def check_count(max_new_tokens: Any) -> None:
    """Checks that `max_new_tokens` is a whole number of at least 1.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected a whole number >= 1")


def check_length(tokens: Any, longest: int) -> None:
    """Checks that tokens int[B, T] have learnt positions.

    Raises:
        ValueError: T is larger than `longest`.
    """
    if tokens.shape[1] > longest:
        raise ValueError(
            f"texts have {tokens.shape[1]} tokens; expected at most {longest}: truncate them"
        )


def pair_prompts(texts: Any, images: Any, mark: str | None) -> list[tuple[str, list[Any]]]:
    """Pairs each rendered prompt with the list of its images.

    Args:
        texts: rendered prompts.
        images: an image or a list of images per prompt; an image may be a path.
        mark: text that stands for an image in a prompt; None if the prompts contain none.

    Returns:
        (prompt, images) for each prompt.

    Raises:
        ValueError: `texts` is a single string or empty, or `images` a single image, their numbers
            differ, a prompt does not contain `mark` once per image, or a file does not exist.
    """
    if isinstance(texts, str):
        raise ValueError(
            "texts is one string; expected a list of rendered prompts: "
            "process([vlm.render(text)], [image])"
        )
    if images is None:
        raise ValueError(
            "images are missing; expected an image, or a list of images, for each prompt ([] for "
            "none): process([vlm.render(text)], [image])"
        )
    if not hasattr(images, "__len__") or isinstance(images, str) or getattr(images, "ndim", 4) < 4:
        raise ValueError(
            f"images is a single {type(images).__name__}; expected a list with an image, or a list "
            "of images, for each prompt"
        )
    if not len(texts):
        raise ValueError("got no prompts; expected one or more")
    if len(texts) != len(images):
        raise ValueError(
            f"there are {len(texts)} prompts and {len(images)} images; expected an image, or a "
            "list of images, for each prompt"
        )
    pairs = []
    for text, entry in zip(texts, images, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"a prompt is a {type(text).__name__}; expected a string")
        listed = [_image(each) for each in (entry if isinstance(entry, list | tuple) else [entry])]
        if mark is not None and text.count(mark) != len(listed):
            raise ValueError(
                f"the prompt {text!r:.60} contains {mark} {text.count(mark)} times for "
                f"{len(listed)} image{'s' * (len(listed) != 1)}; expected it once per image, as "
                "vlm.render(text) writes it"
            )
        pairs.append((text, listed))
    return pairs


def _image(given: Any) -> Any:
    """Returns an image as processors take it; raises ValueError for None or a missing file."""
    if given is None:
        raise ValueError("an image is None; expected a PIL image, an array, or a file's path")
    if not isinstance(given, str | os.PathLike):
        return given
    name = os.fspath(given)
    if not (name.startswith(("http://", "https://", "data:")) or os.path.isfile(name)):
        raise ValueError(f"no image file {name!r:.200}; expected a file's path, or a PIL image")
    return name
