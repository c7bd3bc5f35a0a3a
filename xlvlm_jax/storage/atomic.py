"""Files that are written completely or not at all."""

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

# Directories being written, which are removed if the process is terminated.
unfinished: set[Path] = set()


def remove_unfinished() -> None:
    """Removes directories being written, before a process ends without returning to Python."""
    for path in list(unfinished):
        shutil.rmtree(path, ignore_errors=True)


def write(path: Path, content: bytes | str) -> None:
    """Writes a file atomically: a reader finds the old one or the new one, never a part.

    Raises:
        OSError: the file can't be written.
    """
    with writing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Names the file in an OSError of the block that names none: a full disk says only that."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


class _Named(io.FileIO):
    """A file whose own errors name it; others in the block, as of what is read, do not."""

    def __init__(self, temporary: Path, path: Path) -> None:
        super().__init__(temporary, "w")
        self._path = path

    def write(self, content: Any, /) -> int:
        with named(self._path):
            return super().write(content)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to write piece by piece, which replaces the old one if the block succeeds.

    Until then it is `<name>.tmp` in the same directory, which is made if it is missing; at the end
    it is flushed to disk and renamed. A leftover of a killed process under that name is
    overwritten.

    Raises:
        OSError: the file can't be written; it is named.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with io.BufferedWriter(_Named(temporary, path)) as file:
            yield file
            file.flush()
            with named(path):
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
