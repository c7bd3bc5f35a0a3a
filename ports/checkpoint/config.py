"""config.json, and error messages for checkpoint files that do not load."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ports.checkpoint import quantised

# Those that models run in.
DTYPES = ("float32", "bfloat16", "float16")


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        ValueError: the file is not JSON, or its value is not an object.
    """
    try:
        values = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a JSON object ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: not a JSON object (a {type(values).__name__})")
    return values


def read_config(
    directory: Path,
    supported: tuple[str, ...],
    readers: Mapping[str, Callable[[dict[str, Any]], Any]] | None = None,
) -> Any:
    """Reads the transformers configuration of a checkpoint.

    Args:
        directory: the checkpoint.
        supported: the model_types that are accepted.
        readers: model_type -> a function that turns the values of config.json into a configuration,
            for models that transformers does not include.

    Returns:
        A transformers configuration.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: config.json is damaged, its model_type is not supported, or the checkpoint is
            quantised or in the original LLaVA format.
    """
    from transformers import AutoConfig

    file = directory / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{directory} has no config.json; is it a checkpoint directory?")
    values = read_json(file)
    _refuse_original_llava(values, file)
    model_type = values.get("model_type")
    if model_type not in supported:
        raise ValueError(
            f"{file}: model_type {model_type!r} is not supported; supported: {', '.join(supported)}"
        )
    quantised.refuse_config(values, file)
    try:
        if readers is not None and model_type in readers:
            return readers[model_type](values)
        return AutoConfig.from_pretrained(directory)
    except Exception as error:  # each configuration class raises its own kinds of errors
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error


def _refuse_original_llava(values: dict[str, Any], file: Path) -> None:
    """Raises ValueError for the format of LLaVA's authors, which transformers can't read.

    Its model_type may also be "llava"; transformers would then silently fill in its defaults.
    """
    kinds = [str(kind) for kind in values.get("architectures") or ()]
    original = [k for k in kinds if k.startswith("Llava") and k.endswith("ForCausalLM")]
    if not original and "mm_vision_tower" not in values:
        return
    what = f"{file}: the original LLaVA's format ({(original or ['mm_vision_tower'])[0]})"
    cut = (str(values.get(key, "")) for key in ("image_aspect_ratio", "mm_patch_merge_type"))
    if any("anyres" in value or "unpad" in value for value in cut):
        raise ValueError(
            f"{what}, of LLaVA-NeXT (1.6), which is not supported; use a LLaVA-1.5 checkpoint"
        )
    size = {4096: "7b", 5120: "13b"}.get(values.get("hidden_size", 0), "7b")
    raise ValueError(
        f"{what}, whose modules have different names; use the one converted for transformers, "
        f"llava-hf/llava-1.5-{size}-hf, or convert it with transformers' "
        "convert_llava_weights_to_hf.py"
    )


def read_dtype(name: str) -> jnp.dtype:
    """Returns the dtype of parameters and computation with this name.

    Raises:
        ValueError: it is none of those that models run in.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; expected one of {', '.join(DTYPES)}")
    return jnp.dtype(name)


@contextlib.contextmanager
def making_model(directory: Path) -> Iterator[None]:
    """Reports any error while a model is built from its configuration in one line.

    Raises:
        ValueError: there was an error.
    """
    try:
        yield
    except Exception as error:  # a value of the wrong type can fail anywhere, with any error
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        first = (str(error).strip() or "no reason given").splitlines()[0]
        file = directory / "config.json"
        raise ValueError(
            f"{file}: cannot build a model from these values: {kind}{first}"
        ) from error


@contextlib.contextmanager
def loading(directory: Path | None, what: str) -> Iterator[None]:
    """Reports errors while a part of a checkpoint (`what`) is read in one line.

    Raises:
        ValueError: there was an error.
    """
    try:
        yield
    except (OSError, ValueError, ImportError) as error:  # ImportError: a missing library
        reason = " ".join(str(error).split())[:200]
        names = ("tokenizer.model", "tokenizer.json")
        if directory is not None and [(directory / name).exists() for name in names] == [
            True,
            False,
        ]:
            reason += "; reading tokenizer.model needs sentencepiece and protobuf: install them, or"
            reason += " add a tokenizer.json saved by transformers"
        raise ValueError(f"{directory}: cannot load the {what}: {reason}") from error


def require_tokenizer(directory: Path) -> None:
    """Checks that a directory holds a tokenizer's vocabulary.

    Without one, transformers silently creates a tokenizer with an empty vocabulary.

    Raises:
        FileNotFoundError: there is none.
    """
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((directory / name).is_file() for name in names):
        raise FileNotFoundError(
            f"{directory} has no tokenizer; expected one of {', '.join(names)} next to the weights"
        )
