"""Where the pictures of a run lie, however the run and its data were moved, wherever it is opened.

A file that names pictures names them relative to their common directory, the root, and records the
root twice: as it was, and relative to the file's own directory. So a run that was moved with its
data finds them by the second, one that was moved alone by the first, and neither depends on the
directory that a command is given in. Files of earlier versions hold names as they were typed: these
are looked for here and in the directories above the run, where the command was given.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_PROBES = 8  # names that are looked for in a directory before it is taken for the root


def root_of(paths: Iterable[str | os.PathLike[str]]) -> Path | None:
    """The directory that all pictures lie in or below.

    None for no pictures, and for paths that are not absolute: names of which nobody knows where
    they are, which are then kept as they are.
    """
    directories = {os.path.dirname(path) for path in paths}
    if not directories or not all(map(os.path.isabs, directories)):
        return None
    return Path(os.path.commonpath(list(directories)))


def name_in(root: Path | None, path: str | os.PathLike[str]) -> str:
    """A picture's name as files keep it: relative to the root, or as it is without one."""
    return str(path) if root is None else os.path.relpath(os.path.abspath(path), root)


def describe(root: Path | None, directory: Path) -> dict[str, str] | None:
    """The root as JSON values, for a file in `directory`."""
    return None if root is None else {"root": str(root), "from here": from_here(root, directory)}


def from_here(path: str | os.PathLike[str], directory: Path) -> str:
    """A path relative to a directory that a file is written to, which may be moved with it."""
    return os.path.relpath(Path(path).resolve(), directory.resolve())


def find_all(
    names: Sequence[str | None],
    directory: Path,
    recorded: Mapping[str, str] | None,
    images: str | os.PathLike[str] | None = None,
) -> list[str | None]:
    """The paths of pictures, absolute where any of them is found; otherwise where they were.

    Args:
        names: as a file in `directory` keeps them; None of a sample without a picture.
        directory: of the file.
        recorded: what `describe` gave; None for a file of an earlier version.
        images: where the pictures lie now, if neither they nor the run say: their root, the
            directory above it, or one that holds the files themselves.

    Raises ValueError if `images` holds none of the pictures looked for.
    """
    known = [name for name in names if name is not None]
    probes = [known[len(known) * i // _PROBES] for i in range(_PROBES)] if known else []
    path_of = locate(probes, directory, recorded, images)
    return [None if name is None else path_of(name) for name in names]


def locate(
    probes: Sequence[str],
    directory: Path,
    recorded: Mapping[str, str] | None,
    images: str | os.PathLike[str] | None = None,
) -> Callable[[str], str]:
    """The function from a picture's name to its path, by where some of the pictures are found.

    Args and Raises as for `find_all`, of which `probes` are some of the names.
    """
    for root, depth in _places(directory, recorded, images):
        # Of a name that no file can have, pathlib would raise what the system says.
        if any(os.path.isfile(root / _tail(name, depth)) for name in probes):
            return lambda name: str(root / _tail(name, depth))
    if images is not None and probes:
        raise ValueError(
            f"{images} holds none of the pictures of {directory}, such as {probes[0]!r}; give the "
            "directory that they lie in"
        )
    root_then = "" if recorded is None else recorded["root"]
    return lambda name: os.path.join(root_then, name)


def _places(
    directory: Path, recorded: Mapping[str, str] | None, images: str | os.PathLike[str] | None
) -> Iterator[tuple[Path, int | None]]:
    """(directory to look in, how many of a name's last parts count there; None: all)."""
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


def _tail(name: str, depth: int | None) -> Path:
    path = Path(name)
    return path if depth is None else Path(*path.parts[-depth:])


def find_features(stored: Any, directory: Path) -> Any:
    """A directory of features that a file in `directory` names by `from_here`, as a path here.

    Names that were typed, of earlier versions, are looked for here and above `directory`. What is
    not found, or is no name, comes back as it is.
    """
    if not isinstance(stored, str):
        return stored
    directory = directory.resolve()
    for above in (directory, Path.cwd(), *directory.parents):
        if os.path.isfile(above / stored / "manifest.json"):
            return os.path.normpath(above / stored)
    return stored


def store_features(source: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """What `source` says, its features named relative to the directory of the file."""
    return {
        key: from_here(value, directory)
        if key in _FEATURES and isinstance(value, str) and Path(value).is_dir()
        else value
        for key, value in source.items()
    }


def restore_features(source: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """What `store_features` was given, its features as paths that open from here."""
    return {
        key: find_features(value, directory) if key in _FEATURES else value
        for key, value in source.items()
    }


_FEATURES = ("features", "target features", "original features", "fine-tuned features")


def missing(paths: Iterable[str | None]) -> list[str]:
    """The pictures that are not there, each once."""
    return [path for path in dict.fromkeys(paths) if path is not None and not os.path.isfile(path)]
