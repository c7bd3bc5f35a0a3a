"""Finds model directories: local ones, and Hugging Face Hub repositories in the local cache."""

import importlib.metadata
import os
from pathlib import Path

# Other formats of the same weights, which are never read.
_NOT_READ = (
    *("*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.tflite"),
    *("onnx/*", "openvino/*", "coreml/*", "original/*", "consolidated*.safetensors"),
)
_PREFIX = "models--"
# Installed packages name directories by entry points of this group, each the place of a Path.
_GROUP = "ports.directories"
_NAMED: dict[str, Path] = {}


def name_directory(name: str, directory: Path) -> None:
    """Registers a name for a directory, for `find_directory` and so for every function that loads.

    The name takes precedence over a local directory with that name; use "./NAME" for the latter.
    A package can also name a directory by an entry point of the group "ports.directories", which
    needs no import.

    Args:
        name: the name, such as "embedded".
        directory: the directory it stands for.
    """
    _NAMED[name] = directory


def find_directory(
    path: str | Path, expected: str = "config.json and safetensors", *, weights: bool = True
) -> Path:
    """Finds a local directory or, if there is none, downloads the Hub repository with that id.

    Args:
        path: a directory, a name (see `name_directory`), or a repository id such as
            "llava-hf/llava-1.5-7b-hf", which is downloaded to the Hub's cache (offline, it is read
            from there).
        expected: what the directory should hold, for the error message.
        weights: whether to download safetensors too.

    Returns:
        The local directory, an absolute path.

    Raises:
        FileNotFoundError: neither exists.
        ValueError: `path` is neither a string nor a path.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(
            f"got {path!r:.80}; expected a directory with {expected}, or a Hub id such "
            "as 'llava-hf/llava-1.5-7b-hf'"
        )
    named = _directory_named(str(path))
    if named is not None:
        return named
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory.absolute()  # tokenizers and processors are read later, on first use
    if str(path).count("/") > 1 or directory.is_absolute() or str(path).startswith((".", "~")):
        raise FileNotFoundError(
            f"no directory {str(path)!r}; expected one with {expected}, or a Hub id such as "
            "llava-hf/llava-1.5-7b-hf"
        )
    from huggingface_hub import snapshot_download

    try:
        ignored = [*_NOT_READ, *([] if weights else ["*.safetensors"])]
        return Path(snapshot_download(str(path), ignore_patterns=ignored)).absolute()
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{str(path)!r} is not a local directory and could not be downloaded from the Hub: "
            f"{first}"
        ) from error


def _directory_named(name: str) -> Path | None:
    if name not in _NAMED and name.isidentifier():  # as names are, and few paths
        for entry in importlib.metadata.entry_points(group=_GROUP, name=name):
            _NAMED[name] = entry.load()
    return _NAMED.get(name)


def name_of(directory: Path) -> str:
    """Returns the name of a model's directory, or its repository id if it is in the Hub's cache."""
    repository = directory.absolute().parent.parent.name
    if directory.absolute().parent.name != "snapshots" or not repository.startswith(_PREFIX):
        return directory.name
    return repository.removeprefix(_PREFIX).replace("--", "/")
