"""What callers hand to a model: the processor's arrays, or prompts with their images.

B batch, T positions.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ports.intervene.edits import is_traced


def to_numpy(inputs: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns those of a processor's arrays that a model takes, as numpy arrays.

    Args:
        inputs: name -> array: a dict or transformers' BatchFeature of numpy or JAX arrays, of torch
            tensors in the main memory, or of lists.
        names: those that the model takes; others are left out.

    Raises:
        ValueError: something else than a mapping, values that are traced, or no numbers.
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
                f"inputs[{name!r}] is traced (by jax.jit, vmap or grad), and the methods of VLM "
                "compile by themselves; call them with arrays, or transform the pure vlm.apply"
            )
        try:
            arrays[name] = np.asarray(value)
            reason = f"its dtype is {arrays[name].dtype}"
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
        # An array of arrays has a port's own message: the processor was told not to pad.
        if name not in arrays or arrays[name].dtype.kind in "SU":
            raise ValueError(
                f"inputs[{name!r}] is a {type(value).__name__} that is no array of numbers "
                f"({reason}); pass what the processor returns with return_tensors='np'"
            )
    return arrays


def check_count(max_new_tokens: Any) -> None:
    """Raises ValueError for no number of tokens to generate."""
    if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1, a whole number")


def pair_prompts(texts: Any, images: Any, mark: str | None) -> list[tuple[str, list[Any]]]:
    """Returns each rendered prompt with the list of its images.

    Args:
        texts: rendered prompts.
        images: for each prompt an image, or a list of images; an image may be a path.
        mark: the text that stands for an image in a prompt; None where prompts hold none.

    Raises:
        ValueError: one string, one image, another number of images than of prompts, a prompt that
            does not hold `mark` once for each of its images, or a file that is not there.
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
            f"images is one {type(images).__name__}; expected a list with an image, or a list of "
            "images, for each prompt"
        )
    if len(texts) != len(images):
        raise ValueError(
            f"there are {len(texts)} prompts and {len(images)} images; expected an image, or a "
            "list of images, for each prompt"
        )
    pairs = []
    for text, entry in zip(texts, images, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"a prompt is a {type(text).__name__}; expected a string")
        listed = [_image(each) for each in (entry if isinstance(entry, list) else [entry])]
        if mark is not None and text.count(mark) != len(listed):
            raise ValueError(
                f"the prompt {text!r:.60} holds {mark} {text.count(mark)} times and has "
                f"{len(listed)} image{'s' * (len(listed) != 1)}; expected it once for each, as "
                "vlm.render(text) writes it"
            )
        pairs.append((text, listed))
    return pairs


def _image(given: Any) -> Any:
    """An image as processors take it. ValueError for None, and for a file that is not there."""
    if given is None:
        raise ValueError("an image is None; expected a PIL image, an array, or the path of a file")
    if not isinstance(given, str | os.PathLike):
        return given
    name = os.fspath(given)
    if not (name.startswith(("http://", "https://", "data:")) or os.path.isfile(name)):
        raise ValueError(f"no image file {name!r:.200}; expected the path of one, or a PIL image")
    return name
