"""Files that are there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# Directories that are being written, of which nothing is to be left if the process is ended.
unfinished: set[Path] = set()


def remove_unfinished() -> None:
    """Removes what is being written: before a process ends without coming back to Python."""
    for path in list(unfinished):
        shutil.rmtree(path, ignore_errors=True)


def write(path: Path, content: bytes | str) -> None:
    """Writes a file so that a reader finds the old one or the new one, and never a part.

    Raises OSError when the file can't be written.
    """
    with writing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file to write piece by piece, which takes its place when the block ends without an error.

    Until then it is `<name>.tmp` beside its place; then it is flushed to the disk and renamed. What
    a killed process left under that name is overwritten.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
