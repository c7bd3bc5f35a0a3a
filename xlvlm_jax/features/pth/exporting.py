"""Exports a directory of features as the reference's saved hidden states (see `importing`)."""

import itertools
import json
import os
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from xlvlm_jax.features.pth.sidecar import read_kept
from xlvlm_jax.features.pth.writer import write_pth
from xlvlm_jax.features.reader import Features, choose_sites


def export_features(
    features: Features, path: str | os.PathLike[str], *, sites: Sequence[str] = ()
) -> None:
    """Writes a directory of features as the reference's .pth file.

    Imported features become the original file, bit by bit (if all its sites are exported and rows
    were not averaged). For other features, samples without a row are masked out and get a state of
    zeros, and the keys "manifest", "samples", "positions" and "tokens" hold what the reference has
    no place for, so that an import restores the same directory.

    Args:
        features: the features to export.
        path: the file to write.
        sites: names or patterns of sites; all sites if empty.

    Raises:
        ValueError: the features do not have a site.
    """
    found = (choose_sites(features, site) for site in sites)
    sites = tuple(dict.fromkeys(itertools.chain.from_iterable(found))) or features.sites
    matrices = {site: features.matrix(site) for site in sites}
    kept = read_kept(features.path) or {}
    dtypes = kept.get("dtypes", {})
    disk = np.dtype(_dtype(features.manifest.get("dtype", "float32")))
    rows_of: list[list[int]] = [[] for _ in range(len(features.samples))]
    for row, sample in enumerate(features.sample_rows.tolist()):
        rows_of[sample].append(row)

    def states(number: int, site: str) -> np.ndarray:
        Z = matrices[site]
        dtype = np.dtype(_dtype(dtypes.get(site, disk.name)))
        dropped = kept.get("dropped", {}).get(number)
        if dropped is not None and site in dropped:
            return dropped[site]
        # The reference takes the mean of at least one position.
        own = Z[rows_of[number]] if rows_of[number] else np.zeros((1, Z.shape[1]), np.float32)
        return own.astype(dtype) if site in kept.get("flat", ()) else own.astype(dtype)[None]

    hidden = [{site: states(i, site) for site in sites} for i in range(len(features.samples))]
    if "rest" in kept:
        rest = kept["rest"]
        result = {key: hidden if key == "hidden_states" else rest[key] for key in kept["keys"]}
    else:
        result = {"hidden_states": hidden} | _rest(features, rows_of)
    write_pth(path, result)


def _rest(features: Features, rows_of: list[list[int]]) -> dict[str, Any]:
    """Returns the other keys of an export in the reference's form: batches of one."""
    samples = list(features.samples)
    result: dict[str, Any] = {
        "token_of_interest_mask": [np.array([bool(rows)]) for rows in rows_of],
        "image": [[str(sample.get("image", ""))] for sample in samples],
    }
    if any("prediction" in sample for sample in samples):
        result["model_predictions"] = [[str(sample.get("prediction", ""))] for sample in samples]
    return result | {
        "manifest": json.dumps(features.manifest),
        "samples": [json.dumps(sample) for sample in samples],
        "positions": [features.positions[rows] for rows in rows_of],
        "tokens": [features.tokens[rows] for rows in rows_of],
    }


def _dtype(name: str) -> Any:
    return ml_dtypes.bfloat16 if name == "bfloat16" else name
