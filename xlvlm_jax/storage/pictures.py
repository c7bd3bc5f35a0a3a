"""Finds the pictures of a run after it or its data were moved, from any working directory.

A file that names pictures names them relative to their common directory, the root, and records the
root twice: as it was, and relative to the file's own directory. A run that was moved together with
its data finds them by the second, a run that was moved alone by the first; neither depends on the
working directory. Files of earlier versions have names as typed: these are looked up in the working
directory and in the directories above the run, where the command was started.
"""

import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_PROBES = 8  # names looked up in a directory before it is taken as the root


def root_of(paths: Iterable[str | os.PathLike[str]]) -> Path | None:
    """Returns the common directory of all pictures.

    None for no pictures, and for paths that are not absolute: these are relative to an unknown
    directory and are kept as they are.
    """
    directories = {os.path.dirname(path) for path in paths}
    if not directories or not all(map(os.path.isabs, directories)):
        return None
    return Path(os.path.commonpath(list(directories)))


def name_in(root: Path | None, path: str | os.PathLike[str]) -> str:
    """Returns a picture's name as stored in files.

    Args:
        root: directory that the name is relative to; None keeps the path unchanged.
        path: path of the picture.
    """
    return str(path) if root is None else os.path.relpath(os.path.abspath(path), root)


def describe(root: Path | None, directory: Path) -> dict[str, str] | None:
    """Returns the root as JSON values, for a file in `directory`."""
    return None if root is None else {"root": str(root), "from here": from_here(root, directory)}


def digests_of(paths: Sequence[str | os.PathLike[str]]) -> dict[str, str]:
    """Returns digests of some pictures, to tell a directory that was moved from another one.

    Args:
        paths: paths of all pictures.

    Returns:
        {number of a picture: digest of its file}, for at most eight pictures that can be read.
    """
    found = {}
    for number in dict.fromkeys(len(paths) * i // _PROBES for i in range(_PROBES) if paths):
        try:
            with open(paths[number], "rb") as file:
                found[str(number)] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        except (OSError, ValueError):  # it is reported where it is opened to be shown to the model
            continue
    return found


def are_others(before: Mapping[str, str], now: Mapping[str, str], num_pictures: int) -> bool:
    """Returns whether most of the pictures in both differ: single ones may have been repaired.

    Args:
        before, now: returned by `digests_of`.
        num_pictures: number of different pictures; of several, one says nothing about the others.
    """
    both = before.keys() & now.keys()
    if len(both) < min(2, num_pictures):
        return False
    return 2 * sum(before[number] != now[number] for number in both) > len(both)


def from_here(path: str | os.PathLike[str], directory: Path) -> str:
    """Returns a path relative to the directory of a file, with which it may be moved."""
    return os.path.relpath(Path(path).resolve(), directory.resolve())


def find_all(
    names: Sequence[str | None],
    directory: Path,
    recorded: Mapping[str, str] | None,
    images: str | os.PathLike[str] | None = None,
) -> list[str | None]:
    """Returns the paths of pictures; absolute if any is found, else as they were.

    Args:
        names: as stored in a file in `directory`; None for a sample without a picture.
        directory: directory of the file.
        recorded: returned by `describe`; None for a file of an earlier version.
        images: where the pictures are now, if they were moved without the run: their root, its
            parent directory, or a directory with the files themselves.

    Raises:
        ValueError: as for `locate`.
    """
    known = [name for name in names if name is not None]
    probes = [known[len(known) * i // _PROBES] for i in range(_PROBES)] if known else []
    path_of = locate(probes, lambda: known, directory, recorded, images)
    return [None if name is None else path_of(name) for name in names]


def locate(
    probes: Sequence[str],
    names: Callable[[], Iterable[str]],
    directory: Path,
    recorded: Mapping[str, str] | None,
    images: str | os.PathLike[str] | None = None,
) -> Callable[[str], str]:
    """Returns a function from a picture's name to its path.

    Args:
        probes: some of the names, to find out where the pictures are.
        names: returns all names; called where pictures are only found by the ends of their names.
        directory: as for `find_all`.
        recorded: as for `find_all`.
        images: as for `find_all`.

    Raises:
        ValueError: `images` has none of the pictures, or several of them have one name there.

    Warns if `images` has less than half of them by the ends of their names.
    """
    some, best = False, (0, Path(), 0)
    for root, depth in _places(directory, recorded, images):
        # os.path.isfile accepts names that no file can have; pathlib would raise.
        there = sum(os.path.isfile(root / _tail(name, depth)) for name in probes)
        some |= there > 0
        if depth is None:
            if there:
                return functools.partial(_path_of, root, None)
            continue
        # By the ends of names other pictures may be found: cats/1.jpg for dogs/1.jpg.
        if there > best[0] and _are_unique(names(), depth):
            best = there, root, depth
    there, root, depth = best
    if there:
        if 2 * there < len(probes):
            warnings.warn(
                f"{images} has {there} of {len(probes)} pictures of {directory} that were looked "
                "up; if they are others of these names, pass the directory that contains them",
                stacklevel=2,
            )
        return functools.partial(_path_of, root, depth)
    if images is not None and probes:
        if some:
            raise ValueError(
                f"{images} has pictures of {directory} by their last names alone, which several "
                f"share, such as {Path(probes[0]).name!r}; pass the directory that contains their "
                "folders"
            )
        raise ValueError(
            f"{images} has none of the pictures of {directory}, such as {probes[0]!r}; pass the "
            "directory that contains them"
        )
    root_then = "" if recorded is None else recorded["root"]
    return lambda name: os.path.join(root_then, name)


def _places(
    directory: Path, recorded: Mapping[str, str] | None, images: str | os.PathLike[str] | None
) -> Iterator[tuple[Path, int | None]]:
    """Yields (directory to look in, how many of a name's last parts count there; None for all)."""
    if images is not None:
        images = Path(images).absolute()
        yield images, None
        if recorded is not None:
            yield images / Path(recorded["root"]).name, None
        yield images, 2
        yield images, 1
    elif recorded is not None:
        yield Path(os.path.normpath(directory.resolve() / recorded["from here"])), None
        yield Path(recorded["root"]), None
    else:
        yield Path.cwd(), None
        yield from ((above, None) for above in directory.absolute().parents)


def _path_of(root: Path, depth: int | None, name: str) -> str:
    return str(root / _tail(name, depth))


def _tail(name: str, depth: int | None) -> Path:
    path = Path(name)
    return path if depth is None else Path(*path.parts[-depth:])


def _are_unique(names: Iterable[str], depth: int) -> bool:
    different = set(names)
    return len({_tail(name, depth) for name in different}) == len(different)


def find_features(stored: Any, directory: Path) -> Any:
    """Returns the path of a directory of features that a file names relative to `directory`.

    Names as typed, of earlier versions, are looked up in the working directory and above
    `directory`. What is not found, or is not a name, is returned unchanged.
    """
    if not isinstance(stored, str):
        return stored
    directory = directory.resolve()
    for above in (directory, Path.cwd(), *directory.parents):
        if os.path.isfile(above / stored / "manifest.json"):
            return os.path.normpath(above / stored)
    return stored


def store_features(source: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Returns `source` with its features named relative to the directory of the file."""
    return {
        key: from_here(value, directory)
        if key in _FEATURES and isinstance(value, str) and Path(value).is_dir()
        else value
        for key, value in source.items()
    }


def restore_features(source: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Inverts `store_features`: its features become paths that can be opened from here."""
    return {
        key: find_features(value, directory) if key in _FEATURES else value
        for key, value in source.items()
    }


_FEATURES = ("features", "target features", "original features", "fine-tuned features")


def missing(paths: Iterable[str | None]) -> list[str]:
    """Returns the pictures that do not exist, each once."""
    return [path for path in dict.fromkeys(paths) if path is not None and not os.path.isfile(path)]
