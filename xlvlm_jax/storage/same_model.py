"""Records which model something was made with, and checks that a model is the same."""

import hashlib
from collections.abc import Mapping
from typing import Any

from ports import VLM
from ports.checkpoint import hub, peft_io


def model_of(vlm: VLM) -> dict[str, str | None]:
    """Returns the name and fingerprint of a model, as JSON values; None without a checkpoint.

    Args:
        vlm: a loaded model.

    Returns:
        {"model": name of its directory, or its id on the Hub, "fingerprint": `VLM.fingerprint`}.
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
        return {"adapter": None, "adapter fingerprint": None}
    weights = (vlm.adapter / peft_io.WEIGHTS).read_bytes()
    digest = hashlib.sha256(weights).hexdigest()[:16]
    return {"adapter": hub.name_of(vlm.adapter), "adapter fingerprint": digest}


def require_model(source: Mapping[str, Any], vlm: VLM, what: str) -> None:
    """Checks that a model is the one that something was made with.

    Args:
        source: entries of `model_of` from when it was made, among others; a missing or unknown
            fingerprint passes.
        vlm: the model to check.
        what: start of the message: "the steering vector was fitted on".

    Raises:
        ValueError: it is another model; both are named.
    """
    expected, got = source.get("fingerprint"), vlm.fingerprint
    if None not in (expected, got) and expected != got:
        raise ValueError(
            f"{what} {source.get('model')!r} ({expected}); {vlm.directory} is another model "
            f"({got}), use the original one"
        )
