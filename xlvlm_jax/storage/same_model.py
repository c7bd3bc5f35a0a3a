"""Records which model something was made with, and checks that a model is the same."""

from collections.abc import Mapping
from typing import Any

from ports import VLM
from ports.checkpoint import hub


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
