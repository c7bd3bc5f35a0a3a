"""Outputs that a command is about to write: whether they can be, and replacing earlier ones.

What a directory holds of a command is named by patterns of paths in it, such as "sweep.json" or
"vectors/*.safetensors"; a star does not match a slash.
"""

import fnmatch
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath

UNFINISHED = ".tmp"  # the ending of what a killed process was writing, see `storage.atomic`


def require_writable(directory: Path) -> None:
    """Checks that a directory is there and can be written, or can be made; makes nothing.

    Raises:
        FileExistsError: it, or what it would be in, is a file.
        OSError: it, or what it would be in, can't be written.
    """
    there = directory.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise FileExistsError(f"{there} is a file; expected a directory to write to")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(
            f"{there}: cannot write to this directory ({error.strerror}); name another output"
        ) from None


def require_apart(output: Path, inputs: Iterable[Path]) -> None:
    """Checks that a directory that will be replaced holds nothing that is read.

    Raises:
        FileExistsError: it is or holds one of the inputs.
    """
    place = output.resolve()
    for each in inputs:
        if place in (each.resolve(), *each.resolve().parents):
            raise FileExistsError(f"{output} holds {each}; choose a new directory")


def require_replaceable(
    output: Path, written: Sequence[str], inputs: Iterable[Path] = (), what: str = "its own files"
) -> None:
    """Checks that a directory holds nothing but what a command wrote, so that it may be replaced.

    Args:
        output: the directory; one that does not exist passes.
        written: patterns of the files that the command writes; unfinished ones pass as well.
        inputs: files and directories that the command reads.
        what: what the command writes, for messages.

    Raises:
        FileExistsError: it is a file or a link, holds anything else, or is or holds an input.
    """
    if not os.path.lexists(output):
        return
    if output.is_symlink() or not output.is_dir():
        raise FileExistsError(f"{output} is a file or a link; expected a directory to replace")
    require_apart(output, inputs)
    for path, is_own in _entries(output, written):
        if not is_own:
            raise FileExistsError(
                f"{output} holds {path.relative_to(output)}, and only {what} are replaced; name "
                "another output, or move it"
            )


def remove_written(output: Path, written: Sequence[str]) -> None:
    """Removes the files that a command wrote, and the directories that are empty then.

    Args:
        output: the directory; nothing happens if it does not exist.
        written: as for `require_replaceable`.

    Raises:
        OSError: a file can't be removed.
    """
    for path, is_own in _entries(output, written):
        if is_own:
            path.unlink()
    for folder, _, _ in os.walk(output, topdown=False):
        if not os.listdir(folder):
            os.rmdir(folder)


def _entries(output: Path, written: Sequence[str]) -> Iterator[tuple[Path, bool]]:
    """Yields every file, and every directory that is not of the patterns, with whether it is."""
    unfinished = (f"{each}{UNFINISHED}" for each in written)
    patterns = [PurePath(each).parts for each in (*written, *unfinished, f"*{UNFINISHED}")]
    folders = [pattern[:depth] for pattern in patterns for depth in range(1, len(pattern))]
    for name, inner, files in os.walk(output):
        folder = Path(name)
        for file in sorted(files):
            yield folder / file, _any_matches((folder / file).relative_to(output), patterns)
        for each in sorted(inner):
            path = folder / each
            if path.is_symlink() or not _any_matches(path.relative_to(output), folders):
                inner.remove(each)
                yield path, False


def _any_matches(path: PurePath, patterns: Iterable[tuple[str, ...]]) -> bool:
    return any(
        len(path.parts) == len(pattern) and all(map(fnmatch.fnmatchcase, path.parts, pattern))
        for pattern in patterns
    )
