"""Features on disk: the rows of Z for every captured site, and the samples they come from.

    features/
        manifest.json       the run's arguments, how much is written, whether it is complete
        samples.jsonl       one JSON line per sample
        images.json         where the pictures named in samples.jsonl are (see `pictures`)
        states/<site>/      Zarr v3, [rows, D]
        rows/sample         Zarr v3, int64[rows], the line in samples.jsonl
        rows/position       Zarr v3, int32[rows]
        rows/token          Zarr v3, int32[rows]
        rows/cell           Zarr v3, int32[rows, 4], only where rows are image tokens: "cells" in
        rows/box            Zarr v3, float32[rows, 4], the manifest is then true (`image_cells`)

`states` and `rows` are Zarr groups, which zarr-python and xarray open.

A batch counts once the manifest, replaced last and atomically, counts it. Anything a killed run
wrote beyond that is cut off when the run is resumed, so that it ends with the same bytes as a run
that was never interrupted: there are no time stamps, and `zarr_rows` writes the same chunks
whatever the batches. (`images.json` says where the last run found its pictures, and
has digests of a few, by which other pictures under the same IDs are told.)

States in bfloat16 have the data type "bfloat16", which TensorStore (Python, C++) reads and
zarr-python does not (3.1 says "No Zarr data type found"): read them with `Features.matrix`, or
extract with float32 or float16 states.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from xlvlm_jax.storage import versions
from xlvlm_jax.storage.same_model import ADAPTER
from xlvlm_jax.storage.zarr_rows import reason

FORMAT = "xlvlm-features"
VERSION = 1
SAMPLES = "samples.jsonl"
PICTURES = "images.json"
STATE_DTYPES = ("float32", "float16", "bfloat16")
ROW_FIELDS = {"sample": "int64", "position": "int32", "token": "int32"}
CELL_FIELDS = {"cell": "int32", "box": "float32"}  # of image tokens, [rows, 4]
_FINETUNED = "finetuned:"


def read_manifest(root: Path) -> dict[str, Any]:
    """Reads the manifest of a directory of features.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another format or version.
    """
    path = root / "manifest.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{root}: no manifest.json; expected a directory of features written by xlvlm extract"
        )
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not JSON ({reason(error)}); extract the features again"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        got = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path}: format {got!r}, expected {FORMAT!r}; extract the features again")
    versions.require(path, {"version": None} | state, "extract the features again", VERSION)
    for key in ("arguments", "dtype", "sites", "samples", "rows", "bytes", "complete"):
        if key not in state:
            raise ValueError(f"{path}: key {key!r} is missing; extract the features again")
        if not _is_sound(key, state[key]):
            raise ValueError(f"{path}: {key!r} has an invalid value; extract the features again")
    if type(state.setdefault("cells", False)) is not bool:
        raise ValueError(f"{path}: 'cells' has an invalid value; extract the features again")
    selection = state["arguments"].get("selection")
    if isinstance(selection, dict) and selection.get("mode") in ("token-of-interest", "class"):
        selection.setdefault("match", "first-token")  # the only rule before there was a choice
    return state


def _is_sound(key: str, value: Any) -> bool:
    if key in ("samples", "rows", "bytes"):
        return type(value) is int and value >= 0
    if key == "sites":
        return isinstance(value, list) and all(
            isinstance(site, str) and site.strip(".") and site.isprintable() for site in value
        )
    kinds = {"arguments": dict, "dtype": str, "complete": bool}
    return isinstance(value, kinds[key])


def manifest_of(path: Path) -> dict[str, Any] | None:
    """Reads the manifest of a directory of features, complete or not; None if there is none.

    Raises:
        ValueError: it is damaged, or of another format or version.
    """
    return read_manifest(path) if (path / "manifest.json").exists() else None


def array_path(root: Path, site: str) -> Path:
    """Returns the path of a site's states."""
    # keeps dots, so that the folder has the module's name, but escapes slashes
    return root / "states" / quote(site, safe="")


def finetuned_site(site: str) -> str:
    """Returns the name under which the fine-tuned model's states are stored.

    Runs on the host and cannot be traced.
    """
    return f"{_FINETUNED}{site}"


def is_finetuned(site: str) -> bool:
    """Returns whether a site holds the states of the fine-tuned model of two."""
    return site.startswith(_FINETUNED)


def module_of(site: str) -> str:
    """Returns the name of the module whose outputs a site holds, in either model."""
    return site.removeprefix(_FINETUNED)


def is_hook_point(site: str) -> bool:
    """Returns whether a name is that of a hook, as in files of SAELens, and not of a module.

    TransformerLens has hooks such as "blocks.3.hook_resid_post", Gemma Scope 2 names the input or
    output of a module: "model.layers.3.output".
    """
    parts = site.split(".")
    return parts[-1] in ("input", "output") or any(part.startswith("hook_") for part in parts)


def model_at(manifest: Mapping[str, Any], site: str) -> dict[str, Any]:
    """Returns the model whose states a site holds.

    Args:
        manifest: arguments of the run.
        site: the site; that of the fine-tuned model's states names the fine-tuned model.

    Returns:
        "model", its name, "fingerprint", that of its checkpoint, and "adapter fingerprint", that of
        the LoRA adapter that was merged into it; None where unknown, or without an adapter.
    """
    of = (manifest.get("finetuned") or {}) if is_finetuned(site) else manifest
    return {name: of.get(name) for name in ("model", "fingerprint", ADAPTER)}
