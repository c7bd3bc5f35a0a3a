"""Reads features: `Features`, their sites, and the samples they come from."""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int32, Int64

from ports.intervene.sites import match_sites
from ports.loading import hub_names
from ports.messages import few
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.features.manifest import PICTURES, ROW_FIELDS, SAMPLES, array_path, read_manifest
from xlvlm_jax.features.samples import StoredSamples
from xlvlm_jax.storage import pictures
from xlvlm_jax.storage.zarr_rows import StoredRows, check_chunks, open_array


@dataclass(frozen=True)
class Features:
    """Features as `FeaturesWriter` left them. Rows N; a sample has none, one or several.

    Attributes:
        path: the directory.
        manifest: what the run was asked for.
        sites: the captured sites.
        samples: a dict a sample, in the order of extraction; "image" is a path that opens from
            here, if the picture is found. Read from the disk whenever they are asked for; take
            `samples.columns` of many.
        sample_rows: int64[N], which of `samples` a row comes from.
        positions: int32[N], which position of the sample, padding not counted.
        tokens: int32[N], the token that was predicted there.
        complete: False when the run was interrupted and not finished.
    """

    path: Path
    manifest: dict[str, Any]
    sites: tuple[str, ...]
    samples: Sequence[dict[str, Any]]
    sample_rows: Int64[np.ndarray, " N"]
    positions: Int32[np.ndarray, " N"]
    tokens: Int32[np.ndarray, " N"]
    complete: bool

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        allow_incomplete: bool = False,
        images: str | os.PathLike[str] | None = None,
    ) -> "Features":
        """Open a directory of features; states are read by `matrix`, samples one by one.

        Args:
            path: the directory.
            allow_incomplete: open an unfinished run too.
            images: where the pictures lie now, if they were moved without the run.

        Raises FileNotFoundError when there is no manifest; ValueError for another format or
        version, missing or truncated files, pictures that do not lie in `images`, and, unless
        `allow_incomplete`, an unfinished run. A damaged sample raises when samples are read.
        """
        root = Path(path)
        state = read_manifest(root)
        if not state["complete"] and not allow_incomplete:
            raise ValueError(
                f"{root}: the run is not finished ({state['samples']} samples so far); start it"
                " again with the same arguments to finish it, or open it with allow_incomplete=True"
            )
        locate = functools.partial(
            pictures.locate,
            directory=root.absolute(),
            recorded=_read_pictures(root / PICTURES),
            images=images,
        )
        samples = StoredSamples(root / SAMPLES, state["samples"], state["bytes"], locate)
        if images is not None:
            samples.find_pictures()
        rows = {field: np.zeros(0, dtype) for field, dtype in ROW_FIELDS.items()}
        if state["sites"]:
            rows = {name: _read_array(root / "rows" / name, state["rows"]) for name in ROW_FIELDS}
            for site in state["sites"]:
                where = array_path(root, site)
                check_chunks(where, open_array(where), state["rows"])
        return cls(
            path=root,
            manifest=state["arguments"],
            sites=tuple(state["sites"]),
            samples=samples,
            sample_rows=rows["sample"],
            positions=rows["position"],
            tokens=rows["token"],
            complete=state["complete"],
        )

    def __repr__(self) -> str:
        state = "" if self.complete else ", unfinished"
        return (
            f"Features({str(self.path)!r}, sites: {few(self.sites) or 'none'}; "
            f"{len(self.tokens):,} rows of {len(self.samples):,} samples{state})"
        )

    def matrix(self, site: str) -> Float[np.ndarray, "N D"]:
        """Z of one site, float32[N, D]. Raises ValueError for a site that was not captured."""
        self._check_site(site)
        states = _read_array(array_path(self.path, site), len(self.tokens))
        return states.astype(np.float32, copy=False)

    def _check_site(self, site: str) -> None:
        if site not in self.sites:
            raise ValueError(
                f"{self.path}: no site {site!r}; expected one of {few(self.sites) or 'none'}"
            )

    def stored(self, site: str) -> StoredRows:
        """Z of one site where it is, on disk; for `decompose_stored`. Raises as `matrix`."""
        self._check_site(site)
        return StoredRows(array_path(self.path, site), len(self.tokens))


def _read_array(path: Path, rows: int) -> np.ndarray:
    array = open_array(path)
    check_chunks(path, array, rows)
    return array[:rows].read().result()


def stored_samples(path: Path) -> StoredSamples:
    """The samples of a directory of features as they are stored: pictures by their names."""
    state = read_manifest(path)
    return StoredSamples(path / SAMPLES, state["samples"], state["bytes"])


def _read_pictures(path: Path) -> dict[str, str] | None:
    if not path.exists():
        return None
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        return {key: os.fspath(recorded[key]) for key in ("root", "from here")}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"{path}: does not say where pictures lie; remove it and give --images"
        ) from None


def choose_sites(features: Features, site: str | None) -> list[str]:
    """The sites that a name or a pattern means; without one, the only one there is.

    Raises ValueError if that is none (see `ports.intervene.sites.match_sites`).
    """
    if site is None and len(features.sites) == 1:
        return list(features.sites)
    found = [] if site is None else match_sites(site, features.sites, hub_names)
    if not found:
        raise ValueError(
            f"{features.path} holds the sites {few(features.sites)}; choose one of them, "
            f"got {site!r}; name it by --site"
        )
    return found


def choose_site(features: Features, site: str | None) -> str:
    """As `choose_sites`, and ValueError if there are several."""
    found = choose_sites(features, site)
    if len(found) > 1:
        raise ValueError(f"{site!r} means {len(found)} sites, {few(found)}; choose one of them")
    return found[0]


def samples_of(features: Features) -> list[Sample]:
    """The samples that features were extracted from, as the readers of data give them.

    Runs on the host: it does not trace.
    """
    return [sample_of(kept) for kept in features.samples]


def sample_of(kept: Mapping[str, Any]) -> Sample:
    """A stored sample as the readers of data give it."""
    own = ("id", "image", "image_id", "prompt", "references")
    return Sample(
        id=kept["id"],
        image=Path(kept["image"]),
        image_id=kept["image_id"],
        prompt=kept["prompt"],
        references=tuple(kept["references"]),
        metadata={name: value for name, value in kept.items() if name not in own},
    )
