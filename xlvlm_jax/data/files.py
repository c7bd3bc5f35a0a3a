"""JSON files of others: what is wrong in one is said in a line with the file and the place."""

import json
import os
from pathlib import Path
from typing import Any

_NAMES = {dict: "an object", list: "a list", str: "a string", int: "a whole number"}


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises FileNotFoundError, or ValueError when it is no JSON."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such file; give its name or another directory"
        ) from None
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror})") from error
    if not content.strip():
        raise ValueError(f"{path}: the file is empty; expected JSON")
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg})"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start}: not JSON in UTF-8") from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number of too many digits
        raise ValueError(f"{path}: not JSON that can be read ({error})") from None


def get(record: Any, key: str, kind: type, path: Path, place: str = "") -> Any:
    """`record[key]`, which must be of `kind`: dict, list, str or int.

    Raises ValueError naming file and place: "coco.json: images[3]: key 'cocoid' missing".
    """
    where = f"{path}: {place}" if place else f"{path}"
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, got {_shown(record)}")
    if key not in record:
        raise ValueError(f"{where}: key {key!r} missing; it has {', '.join(record) or 'none'}")
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: {key!r} must be {_NAMES[kind]}, got {_shown(value)}")
    return value


def get_texts(records: list[Any], key: str, path: Path, place: str) -> tuple[str, ...]:
    """`record[key]` of each of `records`, which lie at `place` and must be strings."""
    try:  # the places are made only when one is to be named: there are millions of answers
        texts = tuple(record[key] for record in records)
        if all(type(text) is str for text in texts):
            return texts
    except (KeyError, TypeError):
        pass
    return tuple(get(r, key, str, path, f"{place}[{i}]") for i, r in enumerate(records))


def get_records(content: Any, key: str, path: Path) -> list[Any]:
    """The list under `key` of a file's content. Raises ValueError when it is empty."""
    records = get(content, key, list, path)
    if not records:
        raise ValueError(f"{path}: {key!r} is empty; expected a sample or more")
    return records


def read_attributes(directory: Path) -> dict[str, dict[str, Any]]:
    """What is known of each image, {image id: {attribute: value}}: `attributes.json`, if any."""
    path = directory / "attributes.json"
    if not path.exists():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got {_shown(content)}")
    return {image: get(content, image, dict, path) for image in content}


def resolve(directory: Path, file: str | os.PathLike[str] | None, default: str) -> Path:
    """A file given by name is looked for in `directory`, one given by an absolute path is not."""
    return directory / (default if file is None else file)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
