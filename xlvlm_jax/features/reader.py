"""Reads features: `Features`, their sites, and the samples they come from."""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int32, Int64

from ports.intervene.sites import match_sites
from ports.loading import hub_names
from ports.messages import counted, few
from ports.tables import flat, html_table
from xlvlm_jax.data.frames import to_pandas
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.features.image_cells import Cells
from xlvlm_jax.features.manifest import (
    CELL_FIELDS,
    PICTURES,
    ROW_FIELDS,
    SAMPLES,
    array_path,
    is_finetuned,
    is_hook_point,
    model_at,
    module_of,
    read_manifest,
)
from xlvlm_jax.features.samples import StoredSamples, name_of
from xlvlm_jax.storage import pictures
from xlvlm_jax.storage.same_model import ADAPTER, named_adapter
from xlvlm_jax.storage.zarr_rows import StoredRows, check_chunks, open_array

if TYPE_CHECKING:
    import pandas

_TILE = 2**14  # rows that are read together


@dataclass(frozen=True, eq=False)
class Features:
    """Features as written by `FeaturesWriter`: N rows; a sample has none, one or several.

    Attributes:
        path: the directory.
        manifest: arguments of the run.
        sites: the captured sites.
        samples: one dict per sample, in the order of extraction; "image" is a path that can be
            opened from here, if the picture is found. Read from disk on every access; use
            `samples.columns` for a few keys of many samples.
        num_rows: N.
        sample_rows: int64[N], index into `samples` of each row. This and the next arrays are read
            on first access.
        positions: int32[N], position of each row in its sample, not counting padding.
        tokens: int32[N], the token predicted at each row.
        complete: False if the run was interrupted and not finished.
        cells: for rows that are image tokens, where in its picture each lies: `cells.grid`
            int32[N, 4] (picture, view, row, column) and `cells.box` float32[N, 4]; else None.

    Examples:
        >>> import numpy as np, tempfile, xlvlm_jax
        >>> from xlvlm_jax.features.writer import FeaturesWriter
        >>> Z, run, index = np.eye(4, dtype="float32"), tempfile.mkdtemp(), np.arange(4)
        >>> with FeaturesWriter(run, {}) as writer:
        ...     writer.append([{"id": str(i)} for i in index], {"norm": Z}, index, index, index)
        ...     writer.close()
        >>> features = xlvlm_jax.Features.open(run)
        >>> features.sites, features.matrix("norm").shape
        (('norm',), (4, 4))
    """

    path: Path
    manifest: dict[str, Any]
    sites: tuple[str, ...]
    samples: Sequence[dict[str, Any]]
    num_rows: int
    complete: bool
    _has_cells: bool = False

    @functools.cached_property
    def sample_rows(self) -> Int64[np.ndarray, " N"]:
        """int64[N], index into `samples` of each row."""
        return self._of_rows("sample")

    @functools.cached_property
    def positions(self) -> Int32[np.ndarray, " N"]:
        """int32[N], position of each row in its sample, not counting padding."""
        return self._of_rows("position")

    @functools.cached_property
    def tokens(self) -> Int32[np.ndarray, " N"]:
        """int32[N], the token predicted at each row."""
        return self._of_rows("token")

    @functools.cached_property
    def cells(self) -> Cells | None:
        """Where in its picture each row lies, if rows are image tokens; else None."""
        return Cells(*map(self._of_rows, CELL_FIELDS)) if self._has_cells else None

    def _of_rows(self, field: str) -> np.ndarray:
        if not self.sites:
            return np.zeros(0, ROW_FIELDS[field])
        return _read_array(self.path / "rows" / field, self.num_rows)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        allow_incomplete: bool = False,
        images: str | os.PathLike[str] | None = None,
    ) -> "Features":
        """Opens a directory of features; `matrix` reads states, samples are read one by one.

        Args:
            path: the directory.
            allow_incomplete: also open an unfinished run.
            images: where the pictures are now, if they were moved without the run.

        Raises:
            FileNotFoundError: there is no manifest.
            ValueError: the format or version differs, files are missing or truncated, the pictures
                are not in `images`, or the run is unfinished and `allow_incomplete` is False. A
                damaged sample raises when it is read.
        """
        root = Path(path)
        state = read_manifest(root)
        if not state["complete"] and not allow_incomplete:
            raise ValueError(
                f"{root}: the run is not finished ({state['samples']} samples so far); finish it "
                "by running it again with the same arguments, or open it with "
                "allow_incomplete=True"
            )
        root = root.absolute()  # samples and states are read later, maybe from elsewhere
        locate = functools.partial(
            pictures.locate,
            directory=root,
            recorded=_read_pictures(root / PICTURES),
            images=images,
        )
        samples = StoredSamples(root / SAMPLES, state["samples"], state["bytes"], locate)
        if images is not None:
            samples.find_pictures()
        fields = [*ROW_FIELDS] * bool(state["sites"]) + [*CELL_FIELDS] * state["cells"]
        stored = [root / "rows" / name for name in fields]
        for where in (*stored, *(array_path(root, site) for site in state["sites"])):
            check_chunks(where, open_array(where), state["rows"])
        return cls(
            path=root,
            manifest=state["arguments"],
            sites=tuple(state["sites"]),
            samples=samples,
            num_rows=state["rows"],
            complete=state["complete"],
            _has_cells=state["cells"],
        )

    def __repr__(self) -> str:
        sites, here = few(self.sites) or "none", Path.cwd()
        path = self.path.relative_to(here) if self.path.is_relative_to(here) else self.path
        return f"Features({str(path)!r}, sites: {sites}; {self._in_short()})"

    def _in_short(self) -> str:
        state = "" if self.complete else ", unfinished"
        rows, samples = self.num_rows, len(self.samples)
        return f"{counted(rows, 'row')} of {counted(samples, 'sample')}{state}"

    def _repr_html_(self) -> str:
        widths = {site: open_array(array_path(self.path, site)).shape[1] for site in self.sites}
        sites = [(site, self.num_rows, widths[site]) for site in self.sites]
        asked = flat({"directory": str(self.path), **self.manifest, "sites": None})
        return html_table(sites, head=("site", "rows", "width"), title=self._in_short()) + (
            html_table(asked, head=("asked for", ""))
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """Returns a table with a line per row: position, token, and the sample it comes from.

        Rows of image tokens also have picture, view, row, column, x0, y0, x1 and y1. Columns of
        the sample begin with "sample." ("sample.prediction"). Line n belongs to row n of
        `matrix`, whose states are not in it.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        table = to_pandas(self.samples).add_prefix("sample.").iloc[self.sample_rows]
        table = table.reset_index(drop=True)
        table.insert(0, "position", self.positions)
        table.insert(1, "token", self.tokens)
        if self.cells is not None:
            named = zip(("picture", "view", "row", "column"), self.cells.grid.T, strict=True)
            boxes = zip(("x0", "y0", "x1", "y1"), self.cells.box.T, strict=True)
            for place, (name, values) in enumerate((*named, *boxes), 2):
                table.insert(place, name, values)
        return table

    def matrix(self, site: str) -> Float[np.ndarray, "N D"]:
        """Reads Z of one site.

        Args:
            site: a captured site.

        Returns:
            float32[N, D].

        Raises:
            ValueError: the site was not captured.
        """
        self._check_site(site)
        states = _read_array(array_path(self.path, site), self.num_rows)
        return states.astype(np.float32, copy=False)

    def mean(self, site: str) -> Float[np.ndarray, " D"]:
        """Returns the mean row of Z of one site, without reading all rows at once.

        Args:
            site: a captured site.

        Returns:
            float32[D], from sums in float64; NaN without rows.

        Raises:
            ValueError: the site was not captured.
        """
        stored = self.stored(site)
        total = np.zeros(stored.shape[1])
        for _, rows in stored.tiles(_TILE):
            total += rows.sum(axis=0, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            return (total / np.float64(len(stored))).astype(np.float32)

    def _check_site(self, site: str) -> None:
        if site not in self.sites:
            raise ValueError(
                f"{self.path}: no site {site!r}; expected one of {few(self.sites) or 'none'}"
            )

    def stored(self, site: str) -> StoredRows:
        """Returns Z of one site on disk, for `decompose` and `decompose_stored`.

        Raises:
            ValueError: the site was not captured.
        """
        self._check_site(site)
        return StoredRows(array_path(self.path, site), self.num_rows)


def _read_array(path: Path, rows: int) -> np.ndarray:
    array = open_array(path)
    check_chunks(path, array, rows)
    return array[:rows].read().result()


def stored_samples(path: Path) -> StoredSamples:
    """Returns the samples of a directory of features as stored, with names of pictures."""
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
            f"{path}: does not say where the pictures are; remove it and use --images"
        ) from None


def matching_sites(name: str, sites: Sequence[str]) -> list[str]:
    """Returns the sites that a name or pattern matches.

    Args:
        name: a name or pattern (see `ports.intervene.sites.match_sites`). Where there are sites of
            two models it means those of the model itself, after "finetuned:" those of the other.
        sites: the sites.
    """
    for of_tuned in (True,) if is_finetuned(name) else (False, True):
        own = {module_of(site): site for site in sites if is_finetuned(site) == of_tuned}
        if found := match_sites(module_of(name), own, hub_names):
            return [own[module] for module in found]
    return []


def choose_sites(features: Features, site: str | None, option: str = "--site") -> list[str]:
    """Returns the sites that a name or a pattern matches; without one, the only site.

    Args:
        features: the features.
        site: a name or pattern (see `matching_sites`); None for the only site.
        option: the option of the command line that names it, for messages.

    Raises:
        ValueError: no site matches, or there are several and none was named.
    """
    if site is None and len(features.sites) == 1:
        return list(features.sites)
    found = [] if site is None else matching_sites(site, features.sites)
    if not found:
        raise ValueError(
            f"{features.path} has the sites {few(features.sites)}; choose one of them with "
            f"{option}" + (f", got {site!r}" if site is not None else "")
        )
    return found


def choose_site(features: Features, site: str | None, option: str = "--site") -> str:
    """Returns the only site that a name or a pattern matches; as `choose_sites`.

    Raises:
        ValueError: none or several match.
    """
    found = choose_sites(features, site, option)
    if len(found) > 1:
        raise ValueError(f"{site!r} matches {len(found)} sites, {few(found)}; choose one of them")
    return found[0]


def site_of(source: Mapping[str, Any], features: Features) -> str | None:
    """Returns the site of features that holds states as those that concepts were learnt on.

    Concepts of the fine-tuned model, learnt on features of two models, are of the module's own site
    where the features are of that model alone.

    Args:
        source: where the concepts come from.
        features: the features.

    Returns:
        A name or pattern, as for `choose_site`, which may match nothing; None if the source names
        none.
    """
    site = source.get("site")
    return site if site is None or matching_sites(site, features.sites) else module_of(site)


def require_states(
    source: Mapping[str, Any], features: Features, site: str, what: str, *, named: bool = False
) -> None:
    """Checks that concepts were learnt on states of a site of some features.

    Of two models, the fine-tuned one may be called so in one of the two ("finetuned:" before the
    site) and be the only one in the other: the fingerprints tell which model is meant.

    Args:
        source: where the concepts come from; a missing site or fingerprint passes.
        features: the features.
        site: one of their sites.
        what: what such concepts can't be, for the message: "scored".
        named: whether the caller named the site; a source whose site is a hook point, which no
            model here has, then passes.

    Raises:
        ValueError: they were learnt on states of another site or model.
    """
    learnt, model = source.get("site"), model_at(features.manifest, site)
    models = source.get("fingerprint"), model["fingerprint"]
    if learnt is not None:
        is_hook = is_hook_point(learnt)
        alike = match_sites(module_of(learnt), [module_of(site)], hub_names)
        if not (alike or (named and is_hook)) or _is_of_other_model(source, features, site):
            todo = "name the site of these states" if is_hook else "extract the same site for both"
            raise ValueError(
                f"concepts of site {learnt!r} cannot be {what} on states of {site!r}; {todo}"
            )
    if None in models or _is_of_earlier_release(source, features, site):
        return
    if models[0] != models[1]:
        raise ValueError(
            f"concepts are from model {source.get('model')!r} ({models[0]}), but {features.path} "
            f"has states of {model['model']!r} ({models[1]}); extract with the same model"
        )
    if ADAPTER in source and source[ADAPTER] != model[ADAPTER]:
        raise ValueError(
            f"concepts are from model {source.get('model')!r} with {named_adapter(source)}, but "
            f"{features.path} has states of it with {named_adapter(model)}; extract with the same "
            "adapter"
        )


def _is_of_other_model(source: Mapping[str, Any], features: Features, site: str) -> bool:
    """Returns whether concepts are of the other of two models, whatever the fingerprints say."""
    tuned, known = is_finetuned(source["site"]), source.get("fingerprint") is not None
    if tuned == is_finetuned(site):
        return False
    if source.get("features") == str(features.path.resolve()):
        # A shift of an earlier release wrote neither the prefix nor a model.
        return tuned or known
    # Earlier releases wrote the original's fingerprint.
    return tuned and known and ADAPTER not in source


def _is_of_earlier_release(source: Mapping[str, Any], features: Features, site: str) -> bool:
    """Returns whether concepts of fine-tuned states have the original's fingerprint, as once."""
    tuned = is_finetuned(source.get("site") or "") and is_finetuned(site)
    original = features.manifest.get("fingerprint")
    return tuned and ADAPTER not in source and source.get("fingerprint") == original


def samples_of(features: Features) -> list[Sample]:
    """Returns the samples that features were extracted from, like the readers of data.

    Runs on the host and cannot be traced.

    Raises:
        ValueError: as for `sample_of`.
    """
    return [sample_of(kept, number) for number, kept in enumerate(features.samples)]


def sample_of(kept: Mapping[str, Any], number: int | None = None) -> Sample:
    """Converts a stored sample to the form that the readers of data return.

    Args:
        kept: the stored sample.
        number: its place among the samples, which names it if it has no ID.

    Returns:
        The sample; its metadata lack an "error", which was of that run.

    Raises:
        ValueError: it has no image or prompt, as some imported features.
    """
    name = name_of("" if number is None else number, kept.get("id"))
    for needed in ("image", "prompt"):
        if kept.get(needed) is None:
            raise ValueError(
                f"sample {name!r} has no {needed}, so the model can't run on it again; "
                "extract features from a data set"
            )
    own = ("id", "image", "image_id", "prompt", "references", "error")
    image_id = kept.get("image_id")
    references = kept.get("references") or ()
    if isinstance(references, str):  # of imports by earlier versions
        references = (references,)
    return Sample(
        id=name,
        image=Path(kept["image"]),
        image_id="" if image_id is None else str(image_id),
        prompt=kept["prompt"],
        references=tuple(references),
        metadata={name: value for name, value in kept.items() if name not in own},
    )
