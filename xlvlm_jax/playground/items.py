"""What the page steers by: concepts and vectors, with words and pictures.

K concepts, D width.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ports import VLM
from xlvlm_jax import steering
from xlvlm_jax.concepts.methods import method_named
from xlvlm_jax.concepts.picture_maps import concept_site
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.concepts.removal import concept_directions
from xlvlm_jax.steering import SampleVectors, SiteVectors, SteeringVector, files
from xlvlm_jax.steering.methods import Steering
from xlvlm_jax.storage.same_model import require_model
from xlvlm_jax.storage.zarr_rows import StoredRows

VECTORS = "vectors"  # the group of all that is no concept
_ROWS = 4096  # rows of activations that tell how active a concept usually is


@dataclasses.dataclass(frozen=True)
class Item:
    """A concept, vector, map or network that the page has a slider for.

    Attributes:
        id: unique on the page.
        name: what the page calls it.
        group: the name of the directory of a concept, or `VECTORS`.
        path: the file or directory that it was read from.
        site: the site it is meant for; only said of what is not one vector.
        where: the token positions it is meant for, see `ports.add`.
        words: what a concept is read as.
        pictures: files of the pictures that show a concept.
        number: of a concept in its directory.
        concepts: the concepts in that directory.
        scale: how long a concept's vector is at strength 1.
        steering: what steers, for all but concepts.
    """

    id: str
    name: str
    group: str
    path: Path
    site: str
    where: Any = "all"
    words: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    number: int | None = None
    concepts: Concepts | None = None
    scale: float = 1.0
    steering: Steering | None = None

    @property
    def is_vector(self) -> bool:
        """Whether it adds one vector, the same for all prompts, at one site."""
        return self.concepts is not None or isinstance(self.steering, SteeringVector)

    @property
    def vector(self) -> Float[np.ndarray, " D"] | None:
        """The vector that strength 1 adds; None for what is not one vector."""
        if self.concepts is not None:
            return np.float32(self.scale) * concept_directions(self.concepts)[self.number]
        if isinstance(self.steering, SteeringVector):
            return np.asarray(self.steering.vector, np.float32)
        return None


def find_items(
    vlm: VLM,
    run: Path | None = None,
    concepts: Sequence[Path] = (),
    vectors: Sequence[Path] = (),
    tell: Callable[[str], None] | None = None,
) -> list[Item]:
    """Returns what a run directory holds, and what is named besides.

    Args:
        vlm: the model to steer.
        run: a directory with `concepts*/` or `steering/*.safetensors`.
        concepts: directories of concepts.
        vectors: files that `xlvlm steer fit` wrote.
        tell: called with a message about what a run holds that has no slider.

    Raises:
        FileNotFoundError: a file is missing, or the run holds nothing to steer by.
        ValueError: something is damaged or belongs to another model.
    """
    directories, paths, beside = [*concepts], [*vectors], []
    if run is not None:
        found = sorted(path for path in run.glob("concepts*") if path.is_dir())
        beside = sorted((run / "steering").glob("*.safetensors"))
        if not found and not beside:
            raise FileNotFoundError(
                f"{run}: has no concepts*/ and no steering/*.safetensors; run `xlvlm decompose` or "
                "`xlvlm steer fit` first"
            )
        directories += found
    items = [item for each in dict.fromkeys(directories) for item in read_concepts(vlm, each)]
    items += [read_vector(vlm, path) for path in dict.fromkeys(paths)]
    for path in beside:
        fitted = steering.load(path)
        if not isinstance(fitted, SampleVectors):
            items.append(_item_of(vlm, path, fitted))
        elif tell is not None:
            tell(f"{path} holds vectors of single samples, which have no slider")
    return [*with_unique_names(items)]


def with_unique_names(items: Sequence[Item]) -> Iterator[Item]:
    """Yields the items, those whose id another has already with the number of their place."""
    seen: set[str] = set()
    for place, item in enumerate(items):
        unique = item.id if item.id not in seen else f"{item.id}~{place}"
        seen.add(unique)
        yield dataclasses.replace(item, id=unique)


def read_concepts(vlm: VLM, directory: Path) -> list[Item]:
    """Returns the concepts in a directory, without those that nothing activates.

    Args:
        vlm: the model to steer.
        directory: as `xlvlm decompose` writes it.

    Raises:
        FileNotFoundError: the directory has no concepts.
        ValueError: they are damaged, do not name their site, or belong to another model.
    """
    concepts = Concepts.load(directory)
    learnt = f"{directory}: the concepts were learnt on the states of"
    require_model(concepts.source, vlm, learnt, other_adapter="warn")  # they steer, as vectors do
    site = concept_site(vlm, None, concepts)
    _require_width(vlm, directory, site, concepts.components.shape[1])
    scales, dead = typical_activations(concepts), concepts.dead
    words, images = concepts.words or [], concepts.images or []
    return [
        Item(
            id=f"{directory.name}/{k}",
            name=f"concept {k}",
            group=directory.name,
            path=directory,
            site=site,
            words=tuple(words[k]) if words else (),
            pictures=tuple(images[k]) if images else (),
            number=k,
            concepts=concepts,
            scale=float(scales[k]),
        )
        for k in range(len(concepts.components))
        if not dead[k]
    ]


def read_vector(vlm: VLM, path: Path, name: str | None = None) -> Item:
    """Returns a vector, map or network.

    Args:
        vlm: the model to steer.
        path: a file that `xlvlm steer fit` wrote.
        name: what the page calls it; None for the file's name.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is damaged, belongs to another model, or holds vectors of single samples.
    """
    fitted = steering.load(path)
    if isinstance(fitted, SampleVectors):
        raise ValueError(
            f"{path} holds vectors of single samples, which steer only these; expected a vector, "
            "map or network for all prompts"
        )
    return _item_of(vlm, path, fitted, name)


def _item_of(vlm: VLM, path: Path, fitted: Steering, name: str | None = None) -> Item:
    files.require_fitted_model(fitted.source, vlm)
    site = fitted.site
    if isinstance(fitted, SteeringVector):
        site = vlm.find_site(site, generated=True)
        _require_width(vlm, path, site, len(fitted.vector))
    if isinstance(fitted, SiteVectors):  # of the vision tower too
        for called, found in vlm.find_sites(list(fitted.vectors)).items():
            _require_width(vlm, path, found, len(fitted.vectors[called]))
    name = path.stem if name is None else Path(name).stem
    return Item(f"{VECTORS}/{name}", name, VECTORS, path, site, fitted.where, steering=fitted)


def _require_width(vlm: VLM, path: Path, site: str, width: int) -> None:
    expected = vlm.site_shapes[site][-1]
    if width != expected:
        raise ValueError(
            f"{path} has width {width}; the states of this model at {site!r} have width "
            f"{expected}, use the model that it was made with"
        )


def typical_activations(concepts: Concepts) -> Float[np.ndarray, " K"]:
    """Returns how active each concept is in the rows that it is active in, on average.

    A concept's direction times this is what such rows owe to it.

    Args:
        concepts: the concepts.

    Returns:
        float32[K] over the first 4,096 rows; 1 where the activations are unknown, zero, or
        similarities to centroids, which say nothing of lengths.
    """
    ones = np.ones(len(concepts.components), np.float32)
    stored = concepts.activations
    if stored is None or method_named(concepts.method).is_centroids:
        return ones
    is_on_disk = isinstance(stored, StoredRows)
    rows = stored.read(0, min(_ROWS, len(stored))) if is_on_disk else stored[:_ROWS]
    sizes = np.abs(np.asarray(rows, np.float32))
    active = (sizes > 0).sum(axis=0)
    return np.where(active > 0, sizes.sum(axis=0) / np.maximum(active, 1), ones)
