"""Which model something was made with, and whether the one at hand is that model."""

from collections.abc import Mapping
from typing import Any

from ports import VLM
from ports.checkpoint import hub


def model_of(vlm: VLM) -> dict[str, str | None]:
    """The name and the fingerprint of a model, as JSON values; None for one without a checkpoint.

    Args:
        vlm: a loaded model.

    Returns:
        {"model": name of its directory, or its id on the hub, "fingerprint": `VLM.fingerprint`}.
    """
    return {
        "model": None if vlm.directory is None else hub.name_of(vlm.directory),
        "fingerprint": vlm.fingerprint,
    }


def require_model(source: Mapping[str, Any], vlm: VLM, what: str) -> None:
    """Refuses a model that is not the one that something was made with.

    Args:
        source: what `model_of` gave when it was made, among other entries; a missing or unknown
            fingerprint passes.
        vlm: the model at hand.
        what: what was made, as the message begins: "the steering vector was fitted on".

    Raises ValueError for another model; names both.
    """
    expected, got = source.get("fingerprint"), vlm.fingerprint
    if None not in (expected, got) and expected != got:
        raise ValueError(
            f"{what} {source.get('model')!r} ({expected}); {vlm.directory} is another model "
            f"({got}), give that one"
        )
