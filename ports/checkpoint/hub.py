"""Directories of models: those here, and repositories of the Hugging Face hub in its cache."""

from pathlib import Path

# Other formats of the same weights, which nothing here reads.
_NOT_READ = (
    *("*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.tflite"),
    *("onnx/*", "openvino/*", "coreml/*", "original/*"),
)
_PREFIX = "models--"
_NAMED: dict[str, Path] = {}


def name_directory(name: str, directory: Path) -> None:
    """Lets `find_directory`, and with it every function that loads, take a name for a directory.

    The name comes before a directory that is called so: "./NAME" is that.
    """
    _NAMED[name] = directory


def find_directory(
    path: str | Path, expected: str = "config.json and safetensors", *, weights: bool = True
) -> Path:
    """The directory of that name or, where there is none, the hub's repository of that id.

    Args:
        path: a directory, a name that `name_directory` was told, or an id such as
            "llava-hf/llava-1.5-7b-hf", whose files are then downloaded into the hub's usual cache;
            offline they are taken from there.
        expected: what the directory should hold, for the message.
        weights: whether safetensors are downloaded too.

    Raises FileNotFoundError if there is neither.
    """
    if str(path) in _NAMED:
        return _NAMED[str(path)]
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if str(path).count("/") > 1 or directory.is_absolute() or str(path).startswith((".", "~")):
        raise FileNotFoundError(
            f"no directory {str(path)!r}; expected one with {expected}, or a hub id such as "
            "llava-hf/llava-1.5-7b-hf"
        )
    from huggingface_hub import snapshot_download

    try:
        ignored = [*_NOT_READ, *([] if weights else ["*.safetensors"])]
        return Path(snapshot_download(str(path), ignore_patterns=ignored))
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{str(path)!r} is no directory here and could not be had from the hub: {first}"
        ) from error


def name_of(directory: Path) -> str:
    """The name of a model's directory; of one in the hub's cache, the repository's id."""
    repository = directory.absolute().parent.parent.name
    if directory.absolute().parent.name != "snapshots" or not repository.startswith(_PREFIX):
        return directory.name
    return repository.removeprefix(_PREFIX).replace("--", "/")
