"""Imports the reference's saved hidden states into a directory of features.

XL-VLMs saves a dictionary with torch.save:

    hidden_states            a list with one {module: [1, n, D]} per sample ([n, D] works too)
    token_of_interest_mask   bool[samples], or a list of one-element tensors: which samples count
    image, model_predictions, ...    lists with one entry per sample, bare or in a list of one

Here **each of the n positions is a row**, and its number is its position. With rows="mean" a sample
is one row, the mean of its positions, as when the reference stacks its matrix. The token of a row
is unknown, and is -1. A sample outside the mask has no row: its state in the reference is that of a
position where the token was not found.
"""

import collections
import itertools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ports.messages import few
from xlvlm_jax.features.image_cells import Cells
from xlvlm_jax.features.manifest import STATE_DTYPES, manifest_of
from xlvlm_jax.features.pth.reader import read_pth
from xlvlm_jax.features.pth.sidecar import write_kept
from xlvlm_jax.features.pth.unpickle import PthError
from xlvlm_jax.features.reader import Features, matching_sites
from xlvlm_jax.features.writer import FeaturesWriter
from xlvlm_jax.storage import outputs
from xlvlm_jax.storage.pictures import name_in

BATCH = 256  # samples written at a time
ROWS = ("each", "mean")
# The reference's keys of a sample -> ours; the first one present counts.
_NAMES = {
    "image": "image",
    "model_predictions": "prediction",
    "instruction": "prompt",
    "text": "prompt",
    "response": "answer",
    "img_id": "image_id",
}
# Keys that only our own exports have; those of image tokens have "cells" and "boxes" too.
_OWN = ("manifest", "samples", "positions", "tokens")


def import_features(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    sites: Sequence[str] = (),
    rows: str = "each",
    dtype: str | None = None,
    images: str | os.PathLike[str] | None = None,
    model: str | None = None,
    overwrite: bool = False,
) -> Features:
    """Reads the reference's .pth file into a new directory of features; executes nothing in it.

    Args:
        path: the file.
        output: the directory to create; it appears complete or not at all.
        sites: the modules to take, by default all.
        rows: "each" for one row per position, "mean" for the mean of a sample's positions, or the
            number of one of them, counted from 0, or from the end if negative: "-1" for the last.
        dtype: dtype of the states on disk; by default the file's (the widest, if modules differ).
        images: the directory in which the pictures are now, found by their names (or by the last
            two parts of their paths); by default the paths stay as they are.
        model: the name of the model that the states come from, for the record.
        overwrite: replace a directory of features.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, asks for a forbidden global, or has other contents; modules
            differ in length; a site is unknown; no supported dtype fits the states.
        FileExistsError: `output` already exists and may not be replaced, or holds more than
            features.
    """
    path, output = Path(path), Path(output)
    if rows not in ROWS and _number(rows) is None:
        raise ValueError(f"rows is {rows!r}; expected one of {', '.join(ROWS)}, or a number")
    if Path.cwd().is_relative_to(output.resolve()):
        raise FileExistsError(f"{output} holds the working directory; choose a new directory")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not overwrite:
            raise FileExistsError(f"{output}: already exists; choose a new directory")
        _require_features(output, path, images)
    data = read_pth(path)
    try:
        states, sites = _states(data, sites)
        kept = _mask(data, len(states))
        described, manifest = _described(data, len(states), images)
        if manifest is not None:
            _check_rows(data, states, kept, sites[0])
    except PthError as error:
        raise PthError(f"{path}: {error}") from None
    dtypes = {site: states[0][site].dtype for site in sites}
    manifest = {"model": model, "source": {"imported from": path.name}} | (manifest or {})
    manifest |= {"rows": rows, "dtype": _disk_dtype(path, dtypes, dtype)}

    temporary = output.with_name(f"{output.name}.importing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with FeaturesWriter(temporary, manifest, dtype=manifest["dtype"]) as writer:
            if images is not None:
                shown = [sample for sample in described if isinstance(sample.get("image"), str)]
                root = writer.record_pictures([sample["image"] for sample in shown])
                for sample in shown:
                    sample["image"] = name_in(root, sample["image"])
            for start in range(0, len(states), BATCH):
                part = range(start, min(start + BATCH, len(states)))
                writer.append(
                    [described[i] for i in part], *_rows(data, states, kept, part, sites, rows)
                )
            if writer.rows_done == 0:
                raise PthError(
                    f"{path}: its mask excludes every sample; expected some with the token"
                )
            writer.close()
        if not _is_ours(data):
            rest = {key: value for key, value in data.items() if key != "hidden_states"}
            _keep(temporary, data, states, kept, sites, rows, rest, path.stat().st_size)
        _replace(temporary, output)
    except PthError as error:
        raise error if str(path) in str(error) else PthError(f"{path}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Features.open(output)


def _require_features(output: Path, path: Path, images: str | os.PathLike[str] | None) -> None:
    """Checks that a directory holds features alone, so that they may be replaced.

    Raises:
        FileExistsError: it holds something else.
    """
    advice = "choose a new directory"
    if not output.is_dir() or output.is_symlink():
        raise FileExistsError(f"{output} is a file or a link; {advice}")
    outputs.require_apart(output, [path] if images is None else [path, Path(images)])
    try:
        known = manifest_of(output)
    except ValueError:
        known = None
    if known is None:
        raise FileExistsError(f"{output} holds no features that could be replaced; {advice}")
    own = {"states", "rows"}
    others = sorted(
        each.name for each in output.iterdir() if each.is_dir() and each.name not in own
    )
    if others:
        raise FileExistsError(f"{output} holds more than features, such as {others[0]!r}; {advice}")


def _replace(temporary: Path, output: Path) -> None:
    """Moves a directory to its place; what was there is removed last, and back if that fails."""
    if not output.exists():
        os.replace(temporary, output)
        return
    aside = output.with_name(f"{output.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(output, aside)
    try:
        os.replace(temporary, output)
    except BaseException:
        os.replace(aside, output)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _states(data: Any, sites: Sequence[str]) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Returns the checked hidden states, and the sites to take."""
    if not isinstance(data, dict) or not isinstance(data.get("hidden_states"), list):
        held = (
            ", ".join(map(str, list(data)[:6])) if isinstance(data, dict) else type(data).__name__
        )
        raise PthError(f"has {held}; expected a dictionary with a list 'hidden_states'")
    states = data["hidden_states"]
    if not states or not all(isinstance(each, dict) and each for each in states):
        raise PthError("'hidden_states' is not a list of {module: tensor}, one per sample")
    known = tuple(states[0])
    if not all(isinstance(name, str) for name in known):
        raise PthError("'hidden_states' has modules whose names are not text")
    found = [matching_sites(site, known) for site in sites]
    unknown = [site for site, matches in zip(sites, found, strict=True) if not matches]
    if unknown:
        raise PthError(f"has no module {unknown[0]!r}; expected one of {few(known)}")
    sites = tuple(dict.fromkeys(itertools.chain(*found))) or known
    axes, width = {}, {}
    for number, each in enumerate(states):
        lengths = {}
        for site in sites:
            shape = getattr(each.get(site), "shape", None)
            if shape is None or len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1):
                raise PthError(
                    f"sample {number} has {_short(shape)} at {site}; expected a tensor [1, n, D]"
                )
            if axes.setdefault(site, len(shape)) != len(shape) or (
                width.setdefault(site, shape[-1]) != shape[-1]
            ):
                raise PthError(
                    f"sample {number} has shape {_short(shape)} at {site}, others have width "
                    f"{width[site]} and {axes[site]} axes; expected the same for all"
                )
            if each[site].dtype != states[0][site].dtype:
                raise PthError(f"sample {number} has another dtype at {site} than the first sample")
            lengths[site] = shape[-2]
        if len(set(lengths.values())) > 1:
            raise PthError(
                f"sample {number} has {lengths} positions, expected the same number for each "
                "module; import them one by one (--site)"
            )
    return states, sites


def _short(shape: Any) -> str:
    return "nothing" if shape is None else str(list(shape))


def _mask(data: dict, count: int) -> np.ndarray:
    """Returns bool[samples], which samples count."""
    mask = data.get("token_of_interest_mask")
    if mask is None:
        return np.ones(count, bool)
    parts = mask if isinstance(mask, list | tuple) else [mask]
    if all(isinstance(part, bool) or hasattr(part, "shape") for part in parts):
        flat = np.concatenate([np.asarray(part).reshape(-1) for part in parts] or [np.zeros(0)])
        if flat.shape == (count,):
            return flat.astype(bool)
    raise PthError(f"'token_of_interest_mask' is not a mask of {count} samples")


def _disk_dtype(path: Path, dtypes: Mapping[str, np.dtype], asked: str | None) -> str:
    if asked is not None:
        return asked
    names = {dtype.name for dtype in dtypes.values()}
    strange = sorted(names - {*STATE_DTYPES})
    if strange:
        raise ValueError(
            f"{path}: states are {strange[0]}, but can only be stored as "
            f"{', '.join(STATE_DTYPES)}; choose one to round them to (--dtype)"
        )
    return names.pop() if len(names) == 1 else "float32"


def _described(
    data: dict, count: int, images: str | os.PathLike[str] | None
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Returns each sample's entry in samples.jsonl, and the manifest if it is our own export."""
    if _is_ours(data):
        try:
            manifest = json.loads(data["manifest"])
            samples = [json.loads(text) for text in data["samples"]]
        except (TypeError, ValueError):
            raise PthError("'samples' or 'manifest' is not as written by an export") from None
        if len(samples) != count or not isinstance(manifest, dict):
            raise PthError(f"'samples' describes {len(samples)} samples, expected {count}")
        return _placed(samples, images), manifest
    samples: list[dict[str, Any]] = [{"id": str(number)} for number in range(count)]
    for key, values in data.items():
        if not isinstance(values, list) or len(values) != count or not isinstance(key, str):
            continue
        for sample, value in zip(samples, values, strict=True):
            if isinstance(value, list | tuple) and len(value) == 1:
                value = value[0]
            if key == "targets" and isinstance(value, str):
                sample["references"] = value.split("$$")
            elif key == "references":
                texts = [value] if isinstance(value, str) else value
                if isinstance(texts, list | tuple) and all(isinstance(t, str) for t in texts):
                    sample["references"] = list(texts)
            elif isinstance(value, str | bool | int) and key != "id":
                sample.setdefault(_NAMES.get(key, key), value)
    return _placed(samples, images), None


def _placed(
    samples: list[dict[str, Any]], images: str | os.PathLike[str] | None
) -> list[dict[str, Any]]:
    """Returns the samples with the current paths of their pictures."""
    if images is None:
        return samples
    shown = [sample for sample in samples if isinstance(sample.get("image"), str)]
    names = [Path(sample["image"].replace("\\", "/")) for sample in shown]
    # A base name may be that of several pictures: cats/1.jpg, dogs/1.jpg.
    of_base = collections.Counter(name.name for name in set(names))
    for sample, name in zip(shown, names, strict=True):
        places = [Path(images) / name.parent.name / name.name, Path(images) / name.name]
        if of_base[name.name] > 1:
            places.pop()
        place = next((place for place in places if place.is_file()), places[0])
        sample["image"] = str(place)
    return samples


def _is_ours(data: Mapping[Any, Any]) -> bool:
    return all(key in data for key in _OWN)


def _has_cells(data: Mapping[Any, Any]) -> bool:
    return _is_ours(data) and "cells" in data and "boxes" in data


def _check_rows(
    data: dict, states: Sequence[Mapping[str, Any]], kept: np.ndarray, site: str
) -> None:
    """Checks what an export of ours says of each position of the samples that count.

    Raises:
        PthError: its lengths are not those of the states.
    """
    shapes: dict[str, tuple[int, ...]] = {"positions": (), "tokens": ()}
    if _has_cells(data):
        shapes |= {"cells": (4,), "boxes": (4,)}
    for key, rest in shapes.items():
        values = data[key]
        if not isinstance(values, list) or len(values) != len(states):
            raise PthError(f"{key!r} is not a list with an entry for each of {len(states)} samples")
        for number in np.flatnonzero(kept):
            expected = (states[number][site].shape[-2], *rest)
            shape = getattr(values[number], "shape", None)
            if shape is None or tuple(shape) != expected:
                raise PthError(
                    f"sample {number} has {_short(shape)} in {key!r}; expected a tensor of shape "
                    f"{list(expected)}, as its states have {expected[0]} positions"
                )


def _rows(
    data: dict,
    states: list[dict[str, Any]],
    kept: np.ndarray,
    part: range,
    sites: Sequence[str],
    rows: str,
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, Cells | None]:
    """Returns the arguments of FeaturesWriter.append: states, sample index, positions, tokens and,
    of our own exports of image tokens, cells; a mean of positions lies in none."""
    blocks: dict[str, list[np.ndarray]] = {site: [] for site in sites}
    index, positions, tokens = [], [], []
    has_cells = rows != "mean" and _has_cells(data)
    cells = [Cells.empty()]
    for number in part:
        lengths = states[number][sites[0]].shape[-2]
        if not kept[number] or not lengths:
            continue
        for site in sites:
            tensor = states[number][site]
            values = np.asarray(tensor).reshape(lengths, tensor.shape[-1])
            if values.dtype.kind in "iub":  # to be rounded to the dtype that was asked for
                values = values.astype(np.float64)
            if rows == "mean":
                values = values.astype(np.float32).mean(0, keepdims=True)
            blocks[site].append(values[_chosen(rows, len(values), number)])
        here = range(1 if rows == "mean" else lengths)[_chosen(rows, lengths, number)]
        index += [number - part.start] * len(here)
        own = [data[key][number] if _is_ours(data) else None for key in ("positions", "tokens")]
        positions += here if own[0] is None else np.asarray(own[0])[list(here)].tolist()
        tokens += [-1] * len(here) if own[1] is None else np.asarray(own[1])[list(here)].tolist()
        if has_cells:
            grid, box = (np.asarray(data[key][number]) for key in ("cells", "boxes"))
            cells.append(Cells(grid, box).take(np.array(here, int)))
    stacked = {site: np.concatenate(arrays) for site, arrays in blocks.items() if arrays}
    placed = Cells(*(np.concatenate(parts) for parts in zip(*cells, strict=True)))
    index, positions, tokens = (np.array(each, int) for each in (index, positions, tokens))
    return stacked, index, positions, tokens, placed if has_cells else None


def _number(rows: str) -> int | None:
    """Returns the number of the position that is asked for; None if it is not one."""
    return int(rows) if rows.removeprefix("-").isdecimal() else None


def _chosen(rows: str, length: int, sample: int) -> slice:
    """Returns which of a sample's rows are taken."""
    position = _number(rows)
    if position is None:
        return slice(None)
    if not -length <= position < length:
        raise PthError(
            f"sample {sample} has {length} positions, none with the number {position}; take another"
        )
    position %= length
    return slice(position, position + 1)


def _keep(
    directory: Path,
    data: dict,
    states: list[dict[str, Any]],
    kept: np.ndarray,
    sites: Sequence[str],
    rows: str,
    rest: dict,
    size: int,
) -> None:
    """Keeps what an export needs in addition to the rows to restore the file."""
    whole = rows == "each" and tuple(states[0]) == tuple(sites)
    gone = [i for i in range(len(states)) if not kept[i] or not states[i][sites[0]].shape[-2]]
    value = {
        "dtypes": {site: states[0][site].dtype.name for site in sites},
        "flat": [site for site in sites if len(states[0][site].shape) == 2],
        "dropped": {i: {site: states[i][site] for site in sites} for i in gone} if whole else {},
        "keys": list(data),
        "rest": rest,
    }
    write_kept(directory, value, limit=max(16 * size, 2**16))
