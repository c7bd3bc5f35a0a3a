"""What the page shows besides text: thumbnails as data URIs, and histograms as counts."""

import base64
import io
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from xlvlm_jax.data.images import read_image

NUM_BINS = 24
CROWDED = 0.9  # of the rows in one bin of equal width: bins are then of equal ratio
# The longest side of a thumbnail in pixels: the first with which all of them fit into the budget.
# Below the last they would be blurred where the page shows them: some are then left out.
SIDES = (224, 160, 128, 96)
BUDGET = 1_400_000  # bytes of all thumbnails of a page, in base64


class Histogram(NamedTuple):
    """Activations of one concept, zeros left out; B bins over [low, high]."""

    low: float
    high: float
    counts: list[int]  # [B], rows whose activation lies in the bin
    own: list[int]  # [B], those of them of which this is the most activated concept
    logarithmic: bool = False  # bins of equal ratio, not of equal width


def histogram(
    activations: Float[np.ndarray, " N"],
    own: Bool[np.ndarray, " N"],
    num_bins: int = NUM_BINS,
) -> Histogram:
    """Counts the activations of one concept from its lowest to its highest, zeros left out.

    Its own range: over that of all concepts those of a weak one would fall into one bin. The last
    bin holds the highest too. Bins are of equal width, or of equal ratio where nearly all of the
    activations, all positive, would fall into one: some are then many times as large as most.
    """
    active = activations[activations != 0]
    low, high = (float(active.min()), float(active.max())) if len(active) else (0.0, 0.0)
    edges = np.histogram_bin_edges(active, num_bins, (low, high))
    crowded = np.histogram(active, edges)[0].max() > CROWDED * len(active)
    logarithmic = bool(crowded and 0 < low < high)
    if logarithmic:
        edges = np.geomspace(low, high, num_bins + 1)
        edges[0], edges[-1] = low, high  # which rounding may have moved inwards
    counts, own_counts = (
        np.histogram(chosen, edges)[0].tolist()
        for chosen in (active, activations[own & (activations != 0)])
    )
    return Histogram(low, high, counts, own_counts, logarithmic)


class Thumbnail(NamedTuple):
    """A small picture of the page, or why there is none."""

    name: str  # its CSS class
    uri: str | None  # data:image/jpeg;base64,...
    problem: str | None


def thumbnails(
    images: Iterable[str], roots: Iterable[Path] = (), *, budget: int = BUDGET
) -> dict[str, Thumbnail]:
    """A thumbnail of each image, {image as given: Thumbnail}; each image is read once.

    Args:
        images: paths, the most important first; a relative one is looked for here and then below
            each of `roots`.
        budget: bytes that all data URIs may take together. Smaller thumbnails keep it; where the
            smallest would not, the last images are left out of the result.
    """
    small: dict[str, Image.Image | str] = {}
    for name in dict.fromkeys(images):
        try:
            picture = read_image(_find(name, roots))
        except (OSError, ValueError) as error:
            small[name] = str(error)
        else:
            picture.thumbnail((SIDES[0], SIDES[0]), Image.Resampling.LANCZOS)
            small[name] = picture
    uris: dict[str, str | None] = {}
    for side in SIDES:
        uris = {
            name: None if isinstance(picture, str) else _data_uri(picture, side)
            for name, picture in small.items()
        }
        if sum(len(uri) for uri in uris.values() if uri) <= budget:
            break
    spent = itertools.accumulate(len(uri or "") for uri in uris.values())
    return {
        name: Thumbnail(f"p{number}", uris[name], picture if isinstance(picture, str) else None)
        for number, ((name, picture), total) in enumerate(zip(small.items(), spent, strict=True))
        if total <= budget
    }


def not_shown(small: Mapping[str, Thumbnail]) -> str | None:
    """How many pictures there are no thumbnails of, with the first's name; None if there are all.

    Names alone: a page that is passed on does not say where files lie on this machine.
    """
    bad = [name for name, thumbnail in small.items() if thumbnail.uri is None]
    if not bad:
        return None
    return f"{len(bad)} of {len(small)} pictures can't be shown, such as {Path(bad[0]).name}"


def _find(name: str, roots: Iterable[Path]) -> Path:
    places = [Path(name), *(root / name for root in roots)]
    return next((place for place in places if place.is_file()), places[0])


def _data_uri(picture: Image.Image, side: int) -> str:
    if max(picture.size) > side:
        picture = picture.copy()
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
