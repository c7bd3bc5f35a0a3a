"""config.json, and what is said of files of a checkpoint that do not load."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ports.checkpoint import quantised


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint. Raises ValueError where there is none."""
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
    """The transformers configuration of a checkpoint directory.

    readers: model_type -> what makes a configuration of config.json's values, for models that
    transformers does not know.

    Raises FileNotFoundError if it has no config.json, and ValueError if that is damaged, its
    model_type is not among `supported`, or the checkpoint is quantised or in the original LLaVA's
    format.
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
    except Exception as error:  # each configuration class has checks and kinds of errors of its own
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error


def _refuse_original_llava(values: dict[str, Any], file: Path) -> None:
    """ValueError for the format of LLaVA's authors, of which transformers reads nothing.

    Its model_type may be "llava" too; transformers' defaults would then stand for what is unknown.
    """
    kinds = [str(kind) for kind in values.get("architectures") or ()]
    original = [k for k in kinds if k.startswith("Llava") and k.endswith("ForCausalLM")]
    if not original and "mm_vision_tower" not in values:
        return
    what = f"{file}: the original LLaVA's format ({(original or ['mm_vision_tower'])[0]})"
    cut = (str(values.get(key, "")) for key in ("image_aspect_ratio", "mm_patch_merge_type"))
    if any("anyres" in value or "unpad" in value for value in cut):
        raise ValueError(f"{what}, of LLaVA-NeXT (1.6), which has no port; take a LLaVA-1.5")
    size = {4096: "7b", 5120: "13b"}.get(values.get("hidden_size", 0), "7b")
    raise ValueError(
        f"{what}, whose modules have other names; take the one converted for transformers, "
        f"llava-hf/llava-1.5-{size}-hf, or convert it with transformers' "
        "convert_llava_weights_to_hf.py"
    )


@contextlib.contextmanager
def making_model(directory: Path) -> Iterator[None]:
    """While a configuration becomes a model: one line, a ValueError, for values that make none."""
    try:
        yield
    except Exception as error:  # what a size of another kind ends in depends on who meets it
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        first = (str(error).strip() or "no reason given").splitlines()[0]
        file = directory / "config.json"
        raise ValueError(f"{file}: no model can be made of its values: {kind}{first}") from error


@contextlib.contextmanager
def loading(directory: Path | None, what: str) -> Iterator[None]:
    """While a part of a checkpoint is read: one line, a ValueError, that it has none that loads."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:  # the last for a library that is missing
        reason = " ".join(str(error).split())[:200]
        names = ("tokenizer.model", "tokenizer.json")
        if directory is not None and [(directory / name).exists() for name in names] == [
            True,
            False,
        ]:
            reason += "; tokenizer.model alone needs sentencepiece and protobuf: install them, or "
            reason += "add the tokenizer.json that transformers saves"
        raise ValueError(f"{directory} has no {what} that loads: {reason}") from error


def require_tokenizer(directory: Path) -> None:
    """FileNotFoundError unless a directory holds a tokenizer's vocabulary.

    Without one transformers makes a tokenizer that knows no word, and says nothing.
    """
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((directory / name).is_file() for name in names):
        raise FileNotFoundError(
            f"{directory} has no tokenizer: expected one of {', '.join(names)} beside the weights"
        )
