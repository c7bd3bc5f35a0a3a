"""Reads JSON files from elsewhere; errors name the file and the place in one line."""

import json
import os
from pathlib import Path
from typing import Any

_NAMES = {dict: "an object", list: "a list", str: "a string", int: "a whole number"}


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: the file can't be read.
        ValueError: the file is not JSON.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such file; pass its name or another directory"
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
    except (RecursionError, ValueError) as error:  # nested too deeply; too many digits
        raise ValueError(f"{path}: not readable JSON ({error})") from None


def read_lines(path: Path) -> list[tuple[str, Any]]:
    """Reads a file with a JSON value per line; empty lines do not count.

    Returns:
        (place for error messages, value) of each line.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not UTF-8, or a line is not JSON.
    """
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such file; pass its name or another directory"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start}: not UTF-8") from None
    records = []
    # Not splitlines: strings in JSON may hold other characters that end lines, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append((f"line {number}", json.loads(line)))
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: not JSON ({error})") from None
    return records


def get(
    record: Any,
    key: str,
    kind: type | tuple[type, ...],
    path: Path,
    place: str = "",
    expected: str | None = None,
) -> Any:
    """Returns a value of a JSON object.

    Args:
        record: the object.
        key: the key.
        kind: expected type: dict, list, str or int; or several of them.
        path: the file, for error messages.
        place: the place in it, for error messages.
        expected: the kind of file, for error messages: what another one is taken for.

    Raises:
        ValueError: the key is missing or the type differs; names the file and the place:
            "coco.json: images[3]: key 'cocoid' missing".
    """
    where = f"{path}: {place}" if place else f"{path}"
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, got {_shown(record)}")
    if key not in record:
        hint = "" if expected is None else f"; expected {expected}"
        has = ", ".join(list(record)[:8]) or "none"
        raise ValueError(f"{where}: key {key!r} missing; it has {has}{hint}")
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        named = " or ".join(_NAMES[each] for each in kinds)
        raise ValueError(f"{where}: {key!r} must be {named}, got {_shown(value)}")
    return value


def get_texts(records: list[Any], key: str, path: Path, place: str) -> tuple[str, ...]:
    """Returns `record[key]`, a string, of each of `records`, which are at `place`."""
    try:  # the places are only built if one is needed: there are millions of answers
        texts = tuple(record[key] for record in records)
        if all(type(text) is str for text in texts):
            return texts
    except (KeyError, TypeError):
        pass
    return tuple(get(r, key, str, path, f"{place}[{i}]") for i, r in enumerate(records))


def get_records(content: Any, key: str, path: Path, expected: str | None = None) -> list[Any]:
    """Returns the list under `key` of a file's content; `expected` is as for `get`.

    Raises:
        ValueError: it is missing, not a list, or empty.
    """
    records = get(content, key, list, path, expected=expected)
    if not records:
        raise ValueError(f"{path}: {key!r} is empty; expected one or more samples")
    return records


def read_attributes(directory: Path) -> dict[str, dict[str, Any]]:
    """Returns {image id: {attribute: value}} from `attributes.json`; {} if there is none.

    Raises:
        ValueError: the file is not an object of objects.
    """
    path = directory / "attributes.json"
    if not path.exists():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got {_shown(content)}")
    return {image: get(content, image, dict, path) for image in content}


def resolve(directory: Path, file: str | os.PathLike[str] | None, default: str) -> Path:
    """Returns the path of a file: a relative name is looked up in `directory`."""
    return directory / (default if file is None else file)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
