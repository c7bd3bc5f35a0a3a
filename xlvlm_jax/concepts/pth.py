"""Exchanges concepts with XL-VLMs, whose files torch.save writes:

    concepts [K, D], activations [N, K], decomposition_method, text_grounding,
    image_grounding_paths, analysis_model (an estimator of scikit-learn)

The estimator is passed over: nothing of it is read or run, and it is not written. XL-VLMs needs it
to score concepts on other samples, but for nothing else.
"""

import os
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
    source = {"imported from": Path(path).name, "site": site, "model": model}
    return Concepts(
        components=components,
        activations=activations,
        method=method_named(str(data.get("decomposition_method", "snmf"))).name,
        words=data.get("text_grounding"),
        images=data.get("image_grounding_paths"),
        through_norm=False,
        source={name: value for name, value in source.items() if value is not None},
    )


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
    if concepts.activations is not None:
        described["activations"] = np.asarray(concepts.activations, np.float32)
    write_pth(path, {name: value for name, value in described.items() if value is not None})
