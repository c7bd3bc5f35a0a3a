"""Exchanges concepts with XL-VLMs, whose files torch.save writes:

    concepts [K, D], activations [N, K], decomposition_method, text_grounding,
    image_grounding_paths, analysis_model (an estimator of scikit-learn)

Of the estimator only a PCA's mean is read; nothing of it is run, and it is not written. XL-VLMs
needs it to score concepts on other samples, but for nothing else. Our own exports have the mean as
"mean" [D].
"""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from xlvlm_jax.concepts.methods import method_named
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.features.pth.reader import read_pth
from xlvlm_jax.features.pth.unpickle import PthError
from xlvlm_jax.features.pth.writer import write_pth


def import_concepts(
    path: str | os.PathLike[str], *, site: str | None = None, model: str | None = None
) -> Concepts:
    """Reads concepts of XL-VLMs; executes nothing in the file.

    Args:
        path: the .pth file.
        site: the site whose states they were learnt on, which the file does not name.
        model: the name of the model, for the record.

    Warns:
        UserWarning: the file has no mean of its PCA, so that new rows can't be projected.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or has no concepts.
    """
    data = read_pth(path, opaque=True)
    if not isinstance(data, dict) or len(np.shape(data.get("concepts", 0))) != 2:
        raise PthError(f"{path}: has no 'concepts' of shape [K, D]")
    components, activations = (
        np.asarray(data[name]).astype(np.float32) if name in data else None
        for name in ("concepts", "activations")
    )
    assert components is not None
    if activations is not None and activations.shape[1:] != components.shape[:1]:
        raise PthError(
            f"{path}: 'activations' have shape {activations.shape} for {len(components)} concepts; "
            "expected [N, K]"
        )
    how = method_named(str(data.get("decomposition_method", "snmf")))
    mean = _mean(data, path, components.shape[1]) if how.has_mean else None
    source = {"imported from": Path(path).name, "site": site, "model": model}
    return Concepts(
        components=components,
        activations=activations,
        method=how.name,
        mean=mean,
        words=data.get("text_grounding"),
        images=data.get("image_grounding_paths"),
        through_norm=False,
        source={name: value for name, value in source.items() if value is not None},
    )


def _mean(data: dict[str, Any], path: str | os.PathLike[str], width: int) -> np.ndarray | None:
    """Returns float32[D], what a PCA subtracts; None if the file does not tell."""
    mean = data.get("mean")
    if mean is None:
        state = getattr(data.get("analysis_model"), "state", None)
        mean = state.get("mean_") if isinstance(state, dict) else None
    if mean is None:
        warnings.warn(
            f"{path} has no mean of its PCA: project would subtract nothing, so that only the "
            "stored activations are right; decompose the features again to project other rows",
            stacklevel=3,
        )
        return None
    mean = np.asarray(mean)
    if mean.shape != (width,) or mean.dtype.kind != "f":
        raise PthError(f"{path}: the mean has shape {mean.shape}; expected ({width},)")
    return mean.astype(np.float32)


def export_concepts(concepts: Concepts, path: str | os.PathLike[str]) -> None:
    """Writes concepts as a file that XL-VLMs and torch.load can read.

    Args:
        concepts: the concepts.
        path: the file to write.
    """
    described: dict[str, Any] = {
        "concepts": np.asarray(concepts.components, np.float32),
        "decomposition_method": concepts.method,
        "text_grounding": concepts.words,
        "image_grounding_paths": concepts.images,
    }
    if concepts.mean is not None:
        described["mean"] = np.asarray(concepts.mean, np.float32)
    if concepts.activations is not None:
        described["activations"] = np.asarray(concepts.activations, np.float32)
    write_pth(path, {name: value for name, value in described.items() if value is not None})
