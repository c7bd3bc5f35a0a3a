"""The format version that concepts, vectors and shifts name; another one is refused by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

VERSION = 1  # files without a version are of this one


class UnknownVersionError(ValueError):
    """A file of a format version that this release does not read."""


def require(path: Path, described: Mapping[str, Any], advice: str) -> None:
    """Refuses a file of another format version.

    Args:
        path: the file, for the message.
        described: what the file says of itself, including its "version" if it has one.
        advice: what to do if no other release is at hand, such as "decompose again".

    Raises:
        UnknownVersionError: the version is not `VERSION`.
    """
    version = described.get("version", VERSION)
    if version != VERSION:
        raise UnknownVersionError(
            f"{path}: format version {version!r}, expected {VERSION}; read it with the release "
            f"that wrote it, or {advice}"
        )
