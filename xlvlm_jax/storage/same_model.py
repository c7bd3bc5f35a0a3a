"""Records which model something was made with, and checks that a model is the same."""

import functools
import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ports import VLM
from ports.checkpoint import hub, peft_io

ADAPTER = "adapter fingerprint"  # key of everything that records a model; None for no adapter
MODEL = ("model", "fingerprint", "adapter", ADAPTER)  # keys of `model_of`


def model_of(vlm: VLM) -> dict[str, str | None]:
    """Returns the name and fingerprint of a model and of its adapter, as JSON values.

    Args:
        vlm: a loaded model.

    Returns:
        The entries of `checkpoint_of` and `adapter_of`.

    Raises:
        OSError: the adapter's weights can't be read.
    """
    return checkpoint_of(vlm) | adapter_of(vlm)


def checkpoint_of(vlm: VLM) -> dict[str, str | None]:
    """Returns the name and fingerprint of a checkpoint, with or without an adapter merged in.

    Args:
        vlm: a loaded model.

    Returns:
        {"model": name of its directory, or its id on the Hub, "fingerprint": `VLM.fingerprint`};
        both None without a checkpoint.
    """
    return {
        "model": None if vlm.directory is None else hub.name_of(vlm.directory),
        "fingerprint": vlm.fingerprint,
    }


def adapter_of(vlm: VLM) -> dict[str, str | None]:
    """Returns the name and a digest of the adapter merged into a model, as JSON values.

    The model's fingerprint is that of the checkpoint, with or without an adapter.

    Args:
        vlm: a loaded model.

    Returns:
        {"adapter": name of its directory, or its id on the Hub, "adapter fingerprint": digest of
        its weights}; both None without an adapter.

    Raises:
        OSError: the weights can't be read.
    """
    if vlm.adapter is None:
        return {"adapter": None, ADAPTER: None}
    file = vlm.adapter / peft_io.WEIGHTS
    return {"adapter": hub.name_of(vlm.adapter), ADAPTER: digest_of(file)}


def processor_of(vlm: VLM) -> dict[str, str]:
    """Returns the name and a digest of another checkpoint's processor, as JSON values.

    Args:
        vlm: a loaded model.

    Returns:
        {"processor": name of its directory, or its id on the Hub, "processor digest": digest of its
        files}; {} for the model's own.

    Raises:
        OSError: a file can't be read.
    """
    directory = vlm.processor_directory
    if directory is None or directory == vlm.directory:
        return {}
    names = (*_PROCESSOR, *sorted(file.name for file in directory.glob("*.jinja")))
    digest = hashlib.sha256()
    for file in (directory / name for name in names):
        if file.is_file():
            digest.update(f"{file.name} {digest_of(file)}\n".encode())
    return {"processor": hub.name_of(directory), "processor digest": digest.hexdigest()[:16]}


# Files that tokenizers and processors of transformers are read from; templates are *.jinja.
_PROCESSOR = (
    "added_tokens.json",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)


def digest_of(file: Path) -> str:
    """Returns a digest of a file, read once as long as its size and time stay the same.

    Raises:
        OSError: it can't be read.
    """
    told = file.stat()
    return _digest(file, told.st_size, told.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _digest(file: Path, size: int, changed: int) -> str:
    """Returns the digest of a file, read once as long as its size and time stay the same."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def with_adapter_of(record: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record with the adapter of another where an earlier release did not record it.

    What is made again only if the record differs is then kept: the adapter may be the same.

    Args:
        record: entries of `model_of` from when something was made, among others.
        now: the same of the model that is loaded.
    """
    return {"adapter": now["adapter"], ADAPTER: now[ADAPTER], **record}


def require_model(
    source: Mapping[str, Any],
    vlm: VLM,
    what: str,
    *,
    other_adapter: Literal["refuse", "warn"] = "refuse",
) -> None:
    """Checks that a model is the one that something was made with, with the same adapter.

    Args:
        source: entries of `model_of` from when it was made, among others; a missing or unknown
            fingerprint passes, and so does an adapter of which earlier releases say nothing.
        vlm: the model to check.
        what: start of the message: "the steering vector was fitted on".
        other_adapter: whether another adapter of the same checkpoint is an error or a warning.

    Raises:
        ValueError: it is another model; both are named.
        OSError: the adapter's weights can't be read.
    """
    expected, got = source.get("fingerprint"), vlm.fingerprint
    if None in (expected, got):
        return
    if expected != got:
        raise ValueError(
            f"{what} {source.get('model')!r} ({expected}); {vlm.directory} is another model "
            f"({got}), use the original one"
        )
    here = adapter_of(vlm)
    if ADAPTER not in source or source[ADAPTER] == here[ADAPTER]:
        return
    said = (
        f"{what} {source.get('model')!r} with {named_adapter(source)}; the model is loaded with "
        f"{named_adapter(here)}"
    )
    if other_adapter == "refuse":
        todo = "without an adapter" if source[ADAPTER] is None else "with that adapter"
        raise ValueError(f"{said}, load it {todo}")
    warnings.warn(said, stacklevel=3)


def named_adapter(record: Mapping[str, Any]) -> str:
    """Returns how a message names the adapter of a record that says whether there is one."""
    if record[ADAPTER] is None:
        return "no adapter"
    name = record.get("adapter")
    return f"adapter {record[ADAPTER]}" if name is None else f"adapter {name!r} ({record[ADAPTER]})"
