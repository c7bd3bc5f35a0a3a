"""Steering on disk: a safetensors file, whose metadata say what the tensors are and are for."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import ArrayLike

from ports import VLM
from xlvlm_jax.storage import atomic, damaged, pictures, same_model


def save(
    path: str | Path, kind: str, tensors: Mapping[str, ArrayLike], specification: dict[str, Any]
) -> None:
    """Writes tensors in float32 and a specification of JSON values; the directory is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    source = pictures.store_features(specification.get("source") or {}, path.parent)
    specification = specification | {"source": source}
    metadata = {name: json.dumps(value) for name, value in specification.items()}
    arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
    atomic.write(path, safetensors.numpy.save(arrays, {"kind": kind, **metadata}))


def read(path: str | Path) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """(kind, tensors, specification) of what `save` wrote.

    Raises FileNotFoundError, or ValueError for another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected one that `xlvlm steer fit` wrote")
    with assembling(path):
        with safetensors.safe_open(path, "numpy") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        kind = metadata.pop("kind")
        specification = {name: json.loads(value) for name, value in metadata.items()}
        source = pictures.restore_features(specification.get("source") or {}, path.parent)
        return kind, tensors, specification | {"source": source}


def assembling(path: str | Path) -> AbstractContextManager[None]:
    """While a vector is made of what a file holds: a ValueError for one that holds none."""
    return damaged.reported(Path(path), "steering vector", "fit it again")


def read_as(path: str | Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """`read`, and ValueError for another kind than that."""
    found, tensors, specification = read(path)
    if found != kind:
        raise ValueError(f"{path} holds {found!r}; expected {kind!r} (see xlvlm_jax.steering.load)")
    return tensors, specification


def require_model(source: dict[str, Any], vlm: VLM) -> None:
    """ValueError if what was fitted on one model is to steer another; unknown ones pass."""
    same_model.require_model(source, vlm, "the steering vector was fitted on")
