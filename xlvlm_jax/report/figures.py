"""What the page shows besides text: thumbnails as data URIs, and histograms as counts."""

import base64
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from xlvlm_jax.data.images import read_image

NUM_BINS = 24
# The longest side of a thumbnail in pixels: the first with which all of them fit into the budget.
SIDES = (224, 160, 128, 96, 64, 48)
BUDGET = 1_400_000  # bytes of all thumbnails of a page, in base64


class Histogram(NamedTuple):
    """Activations of one concept, zeros left out; B bins of equal width over [low, high]."""

    low: float
    high: float
    counts: list[int]  # [B], rows whose activation lies in the bin
    own: list[int]  # [B], those of them of which this is the most activated concept


def histogram(
    activations: Float[np.ndarray, " N"],
    own: Bool[np.ndarray, " N"],
    num_bins: int = NUM_BINS,
) -> Histogram:
    """Counts the activations of one concept from its lowest to its highest, zeros left out.

    Its own range: over that of all concepts those of a weak one would fall into one bin. The last
    bin holds the highest too.
    """
    active = activations[activations != 0]
    low, high = (float(active.min()), float(active.max())) if len(active) else (0.0, 0.0)
    counts, own_counts = (
        np.histogram(chosen, num_bins, (low, high))[0].tolist()
        for chosen in (active, activations[own & (activations != 0)])
    )
    return Histogram(low, high, counts, own_counts)


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
        images: paths; a relative one is looked for here and then below each of `roots`.
        budget: bytes that all data URIs may take together; smaller thumbnails keep it.
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
    for side in SIDES:
        uris = {
            name: None if isinstance(picture, str) else _data_uri(picture, side)
            for name, picture in small.items()
        }
        if sum(len(uri) for uri in uris.values() if uri) <= budget:
            break
    return {
        name: Thumbnail(f"p{number}", uris[name], picture if isinstance(picture, str) else None)
        for number, (name, picture) in enumerate(small.items())
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
