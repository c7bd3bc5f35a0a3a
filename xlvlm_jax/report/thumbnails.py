"""Thumbnails as data URIs and histograms as counts, for the page."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from xlvlm_jax.data.images import data_uri, read_image

NUM_BINS = 24
CROWDED = 0.9  # with more than this share of rows in one equal-width bin, bins get equal ratios
# Longest side of a thumbnail in pixels: the largest at which all thumbnails fit into their room.
# Below the last, thumbnails would look blurred on the page, so some are left out instead.
SIDES = (224, 160, 128, 96)
BUDGET = 3_000_000  # bytes of all thumbnails on a page, in base64


class Histogram(NamedTuple):
    """Histogram of one concept's non-zero activations; B bins over [low, high]."""

    low: float
    high: float
    counts: list[int]  # [B], rows whose activation lies in the bin
    own: list[int]  # [B], rows among them whose most activated concept is this one
    logarithmic: bool = False  # bins have equal ratios instead of equal widths


def histogram(
    activations: Float[np.ndarray, " N"],
    own: Bool[np.ndarray, " N"],
    num_bins: int = NUM_BINS,
) -> Histogram:
    """Counts one concept's non-zero activations in bins from the lowest to the highest.

    The range is the concept's own: on a range shared by all concepts, a weak concept would fill
    a single bin. The last bin is closed. Bins have equal widths, or equal ratios if all
    activations are positive and nearly all of them would fall into one bin, as happens when a few
    are many times larger than the rest.

    Args:
        activations: float[N], the activation of each row.
        own: bool[N], whether the concept is the row's most activated one.
        num_bins: the number of bins.

    Returns:
        The counts; a range of [0, 0] if no activation is non-zero.
    """
    active = activations[activations != 0]
    low, high = (float(active.min()), float(active.max())) if len(active) else (0.0, 0.0)
    edges = np.histogram_bin_edges(active, num_bins, (low, high))
    crowded = np.histogram(active, edges)[0].max() > CROWDED * len(active)
    logarithmic = bool(crowded and 0 < low < high)
    if logarithmic:
        edges = np.geomspace(low, high, num_bins + 1)
        edges[0], edges[-1] = low, high  # rounding may have moved them inwards
    counts, own_counts = (
        np.histogram(chosen, edges)[0].tolist()
        for chosen in (active, activations[own & (activations != 0)])
    )
    return Histogram(low, high, counts, own_counts, logarithmic)


class Thumbnail(NamedTuple):
    """A thumbnail, or the reason why there is none."""

    name: str  # its CSS class
    uri: str | None  # data:image/jpeg;base64,...
    problem: str | None
    size: tuple[int, int] | None = None  # width and height of the picture, shrunk


def thumbnails(
    images: Iterable[str],
    roots: Iterable[Path] = (),
    *,
    budget: int = BUDGET,
    room: float = 1.0,
    sides: Sequence[int] = SIDES,
    first: int = 0,
) -> dict[str, Thumbnail]:
    """Returns a thumbnail of each image; each image is read once.

    Args:
        images: paths, the most important first; a relative path is looked up in the working
            directory, then in each of `roots`. Not asked for more than the budget holds.
        roots: directories.
        budget: maximum size of all data URIs together, in bytes. If the smallest size exceeds it,
            the last images are left out.
        room: share of the budget that thumbnails shrink to meet; the smallest may take all of it.
        sides: longest sides to try, in pixels, in descending order.
        first: number of the first thumbnail, which its CSS class holds.

    Returns:
        {image as given: Thumbnail}.
    """
    small: dict[str, Image.Image | str] = {}
    uris: dict[str, str | None] = {}
    spent = 0
    for name in images:
        if name in small:
            continue
        try:
            picture = read_image(_find(name, roots))
        except (OSError, ValueError) as error:
            small[name], uris[name] = str(error), None
            continue
        picture.thumbnail((sides[0], sides[0]), Image.Resampling.LANCZOS)
        uri = data_uri(picture, sides[-1])
        spent += len(uri)
        if spent > budget:
            break
        small[name], uris[name] = picture, uri
    else:
        for side in sides[:-1]:
            larger = {
                name: None if isinstance(picture, str) else data_uri(picture, side)
                for name, picture in small.items()
            }
            if sum(len(uri) for uri in larger.values() if uri) <= room * budget:
                uris = larger
                break
    return {
        name: Thumbnail(f"p{number}", uris[name], picture, None)
        if isinstance(picture, str)
        else Thumbnail(f"p{number}", uris[name], None, picture.size)
        for number, (name, picture) in enumerate(small.items(), first)
    }


def not_shown(small: Mapping[str, Thumbnail]) -> str | None:
    """Returns a message that counts the pictures that can't be shown; None if all can.

    It names the first by its file name alone: a page that is passed on must not reveal where files
    are on this machine.
    """
    bad = [name for name, thumbnail in small.items() if thumbnail.uri is None]
    if not bad:
        return None
    return f"{len(bad)} of {len(small)} pictures can't be shown, for example {Path(bad[0]).name}"


def _find(name: str, roots: Iterable[Path]) -> Path:
    places = [Path(name), *(root / name for root in roots)]
    return next((place for place in places if place.is_file()), places[0])
