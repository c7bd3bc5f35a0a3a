"""Steering on disk: a safetensors file whose metadata describe the tensors and their use."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
from markupsafe import Markup
from numpy.typing import ArrayLike

from ports import VLM
from ports.messages import few
from ports.tables import flat, html_table, kind
from xlvlm_jax.storage import atomic, damaged, pictures, same_model, versions
from xlvlm_jax.storage.tensors import as_bytes


def save(
    path: str | Path, kind: str, tensors: Mapping[str, ArrayLike], specification: dict[str, Any]
) -> None:
    """Writes tensors and their specification as a safetensors file.

    Args:
        path: the file to write; a missing parent directory is created.
        kind: what the tensors are, such as "vector".
        tensors: written as float32.
        specification: JSON values; arrays in them are written as lists.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    source = pictures.store_features(specification.get("source") or {}, path.parent)
    specification = specification | {"source": source, "version": versions.VERSION}
    metadata = {name: json.dumps(value, default=_listed) for name, value in specification.items()}
    arrays = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    atomic.write(path, as_bytes(arrays, {"kind": kind, **metadata}))


def _listed(value: Any) -> Any:
    """Returns an array as a list, for JSON."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"{value!r} of type {type(value).__name__} can't be stored as JSON")


def plain(where: Any) -> Any:
    """Returns token positions as they are read from a file: arrays as lists, which compare."""
    return json.loads(json.dumps(where, default=_listed))


def read(path: str | Path) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """Reads what `save` wrote.

    Args:
        path: the file.

    Returns:
        (kind, tensors, specification).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or of another kind, or `path` is a directory.
    """
    path = Path(path)
    if path.is_dir():
        inside = few(sorted(file.name for file in path.glob("*.safetensors")), 3)
        raise ValueError(
            f"{path} is a directory; expected a file that `xlvlm steer fit` wrote"
            + (f", such as those in it: {inside}" if inside else "")
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected one that `xlvlm steer fit` wrote")
    with assembling(path):
        with safetensors.safe_open(path, "numpy") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        # JSON texts, but for the kind.
        kind = metadata.pop("kind")
        specification = {name: json.loads(value) for name, value in metadata.items()}
        versions.require(path, specification, "fit it again")
        specification.pop("version", None)
        source = pictures.restore_features(specification.get("source") or {}, path.parent)
        return kind, tensors, specification | {"source": source}


def digest(path: str | Path) -> str:
    """Returns a digest of what a file does when it steers, whatever it was learnt from.

    Not of the file's bytes: safetensors writes the same specification in any order.

    Raises:
        FileNotFoundError: as for `read`.
        ValueError: as for `read`.
    """
    kind, tensors, specification = read(path)
    described = [kind, {key: value for key, value in specification.items() if key != "source"}]
    found = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        found.update(tensor.tobytes())
    return found.hexdigest()[:16]


def assembling(path: str | Path) -> AbstractContextManager[None]:
    """Returns a context in which errors become a ValueError about a damaged file `path`."""
    return damaged.reported(Path(path), "steering vector", "fit it again")


def read_as(path: str | Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a file that must be of one kind.

    Args:
        path: the file.
        kind: the expected kind.

    Returns:
        (tensors, specification).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or of another kind.
    """
    found, tensors, specification = read(path)
    if found != kind:
        raise ValueError(
            f"{path} holds {found!r}; expected {kind!r}, use xlvlm_jax.steering.load for any kind"
        )
    return tensors, specification


def require_numbers(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Checks that the tensors of a file have no NaN.

    Inf can be meant, as the threshold of a feature that is never active.

    Raises:
        ValueError: a tensor has NaN; it is named.
    """
    for name, values in tensors.items():
        if np.isnan(values).any():
            raise ValueError(f"{path}: {name} has NaN; fit it again, on states that are finite")


def require_fitted_model(source: dict[str, Any], vlm: VLM) -> None:
    """Checks that `vlm` is the model that a vector was fitted on; an unknown origin passes.

    Another adapter of the same checkpoint is a warning: a vector fitted before fine-tuning may be
    tried after it, and the other way round.

    Args:
        source: the `source` of the vector.
        vlm: the model to steer.

    Raises:
        ValueError: the vector was fitted on another model.
    """
    same_model.require_model(source, vlm, "the steering vector was fitted on", other_adapter="warn")


def common_model(sources: Sequence[Mapping[str, Any]], doing: str) -> dict[str, Any]:
    """Returns the model that vectors were fitted on, with its adapter; those that don't say pass.

    Args:
        sources: the `source` of each.
        doing: what can't be done with others, for the message: "add".

    Returns:
        The entries of `same_model.model_of` in the first source that has a fingerprint; if none
        has, those of the first source, if there is one. The adapter is that of the first source
        that says which; that there is none, only if all say so.

    Raises:
        ValueError: two were fitted on different models, or with different adapters, or one without.
    """
    of_model = [source for source in sources if source.get("fingerprint") is not None]
    for source in of_model[1:]:
        ours, theirs = of_model[0]["fingerprint"], source["fingerprint"]
        if ours != theirs:
            raise ValueError(
                f"cannot {doing} vectors of fingerprint {ours} and {theirs}; expected the same "
                "fingerprint"
            )
    known = [source for source in sources if same_model.ADAPTER in source]
    for source in known[1:]:
        if source[same_model.ADAPTER] != known[0][same_model.ADAPTER]:
            first, other = map(same_model.named_adapter, (known[0], source))
            raise ValueError(
                f"cannot {doing} vectors of models with {first} and {other}; expected the same "
                "adapter"
            )
    told: dict[str, Any] = {}
    for source in [*known[:1], *[*of_model, *sources][:1]]:  # the latter counts
        told |= {name: source[name] for name in same_model.MODEL if name in source}
    # That there is none is known only if all say so.
    if told.get(same_model.ADAPTER, "") is None and len(known) < len(sources):
        told = {name: told[name] for name in told if not name.startswith("adapter")}
    return {name: told[name] for name in same_model.MODEL if name in told}


def as_html(fitted: Any, **told: Any) -> Markup:
    """Returns the HTML table by which a vector, map or network shows itself in a notebook.

    Args:
        fitted: has `site`, `where` and `source`.
        **told: what else to say of it, such as its width.
    """
    where = kind(fitted.where) if hasattr(fitted.where, "shape") else fitted.where
    rows = {"site": fitted.site, "where": where, **told, "source": fitted.source}
    return html_table(flat(rows), title=type(fitted).__name__)
