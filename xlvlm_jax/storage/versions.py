"""The format version that a file names; another one is refused by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

VERSION = 1  # files without a version are of this one


class UnknownVersionError(ValueError):
    """A file of a format version that this release does not read."""


def require(path: Path, described: Mapping[str, Any], advice: str, expected: int = VERSION) -> None:
    """Refuses a file of another format version.

    Args:
        path: the file, for the message.
        described: what the file says of itself, including its "version" if it has one.
        advice: what to do if no other release is at hand, such as "decompose again".
        expected: the version that this release reads.

    Raises:
        UnknownVersionError: the version is another one, or not a whole number.
    """
    version = described.get("version", expected)
    # In Python, 1.0 and True equal 1.
    if type(version) is not int or version != expected:
        raise UnknownVersionError(
            f"{path}: format version {version!r}, expected {expected}; read it with the release "
            f"that wrote it, or {advice}"
        )
