"""Exports a directory of features as the reference's saved hidden states (see `importing`)."""

import itertools
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Int

from xlvlm_jax.features.pth.sidecar import read_kept
from xlvlm_jax.features.pth.writer import Numbers, View, write_pth
from xlvlm_jax.features.reader import Features, choose_sites
from xlvlm_jax.features.samples import unplaced
from xlvlm_jax.storage.zarr_rows import StoredRows

_BLOCK_BYTES = 2**24  # of rows held at once


def export_features(
    features: Features, path: str | os.PathLike[str], *, sites: Sequence[str] = ()
) -> None:
    """Writes a directory of features as the reference's .pth file.

    Imported features become the original file, bit by bit, if all its sites are exported, rows were
    not averaged and their dtype on disk holds every value of the file's. Where it does not, as
    float16 for a file of float64, states have the dtype on disk, and a warning says so.

    For other features, samples without a row are masked out and get a state of zeros, and the keys
    "manifest", "samples", "positions" and "tokens" (and, for image tokens, "cells" and "boxes")
    hold what the reference has no place for, so that an import restores the same directory.

    Args:
        features: the features to export.
        path: the file to write.
        sites: names or patterns of sites; all sites if empty.

    Raises:
        ValueError: the features do not have a site.
    """
    found = (choose_sites(features, site) for site in sites)
    sites = tuple(dict.fromkeys(itertools.chain.from_iterable(found))) or features.sites
    kept = read_kept(features.path) or {}
    dtypes = kept.get("dtypes", {})
    disk = np.dtype(_dtype(features.manifest.get("dtype", "float32")))
    dtypes = {site: _held(site, np.dtype(_dtype(dtypes.get(site, disk))), disk) for site in sites}
    rows = _BySample.of(features.sample_rows, len(features.samples))
    lengths, starts = rows.lengths.tolist(), rows.starts.tolist()
    stored = {site: features.stored(site) for site in sites}
    numbers = {site: _states(stored[site], rows.states(), dtypes[site]) for site in sites}

    def state(number: int, site: str) -> View | np.ndarray:
        dropped = kept.get("dropped", {}).get(number)
        if dropped is not None and site in dropped:
            return dropped[site].astype(dtypes[site], copy=False)
        width = stored[site].shape[1]
        shape = (lengths[number], width)
        if site not in kept.get("flat", ()):
            shape = (1, *shape)
        return View(numbers[site], starts[number] * width, shape)

    hidden = ({site: state(i, site) for site in sites} for i in range(len(features.samples)))
    if "rest" in kept:
        rest = kept["rest"]
        result = {key: hidden if key == "hidden_states" else rest[key] for key in kept["keys"]}
    else:
        result = {"hidden_states": hidden} | _rest(features, rows)
    write_pth(path, result)


def _held(site: str, original: np.dtype, disk: np.dtype) -> np.dtype:
    """Returns the dtype of the file that was imported, or of the disk if that has lost digits."""
    if np.can_cast(original, disk):
        return original
    warnings.warn(
        f"states of {site} were {original.name} and were imported as {disk.name}; they are "
        f"exported as {disk.name}",
        stacklevel=3,
    )
    return disk


class _BySample(NamedTuple):
    """Rows sorted by their samples. The reference has at least one position per sample."""

    order: Int[np.ndarray, " N"]  # row numbers, sample by sample
    counts: Int[np.ndarray, " S"]  # number of rows per sample

    @classmethod
    def of(cls, sample_rows: Int[np.ndarray, " N"], num_samples: int) -> "_BySample":
        """Sorts rows by their samples."""
        counts = np.bincount(sample_rows, minlength=num_samples)
        return cls(np.argsort(sample_rows, kind="stable"), counts)

    @property
    def lengths(self) -> Int[np.ndarray, " S"]:
        """Number of states to write per sample."""
        return np.maximum(self.counts, 1)

    @property
    def starts(self) -> Int[np.ndarray, " S"]:
        """Index of the first state of each sample."""
        return np.cumsum(self.lengths) - self.lengths

    def states(self) -> Int[np.ndarray, " M"]:
        """Returns the row of each state to write; -1 for the state of a sample without rows."""
        found = np.full(int(self.lengths.sum()), -1)
        found[np.repeat(self.counts > 0, self.lengths)] = self.order
        return found


def _states(stored: StoredRows, rows: Int[np.ndarray, " M"], dtype: np.dtype) -> Numbers:
    """Returns the states of rows, read block by block, with zeros for rows of -1."""
    width = stored.shape[1]

    def blocks() -> Iterator[np.ndarray]:
        size = max(_BLOCK_BYTES // (4 * width), 1)
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            block = np.zeros((len(some), width), np.float32)
            if (some >= 0).any():
                block[some >= 0] = stored.take(some[some >= 0])
            yield block.astype(dtype)

    return Numbers(dtype, len(rows) * width, blocks)


def _rest(features: Features, rows: _BySample) -> dict[str, Any]:
    """Returns the other keys of an export in the reference's form: batches of one."""
    samples, counts = features.samples, rows.counts
    mask = Numbers.of(counts > 0)
    firsts = np.cumsum(counts) - counts

    def of_rows(values: np.ndarray) -> Iterator[View]:
        numbers = Numbers.of(values[rows.order])
        pairs = zip(firsts.tolist(), counts.tolist(), strict=True)
        rest, size = values.shape[1:], int(np.prod(values.shape[1:]))
        return (View(numbers, first * size, (count, *rest)) for first, count in pairs)

    result: dict[str, Any] = {
        "token_of_interest_mask": (View(mask, i, (1,)) for i in range(len(samples))),
        "image": ([str(sample.get("image", ""))] for sample in samples),
    }
    if any("prediction" in sample for sample in unplaced(samples)):
        result["model_predictions"] = (
            [str(sample.get("prediction", ""))] for sample in unplaced(samples)
        )
    cells = features.cells
    placed = {} if cells is None else {"cells": of_rows(cells.grid), "boxes": of_rows(cells.box)}
    return result | {
        "manifest": json.dumps(features.manifest),
        "samples": (json.dumps(sample) for sample in samples),
        "positions": of_rows(features.positions),
        "tokens": of_rows(features.tokens),
        **placed,
    }


def _dtype(name: str | np.dtype) -> Any:
    return ml_dtypes.bfloat16 if name == "bfloat16" else name
