"""Writes pictures with their maps as one self-contained HTML page."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xlvlm_jax.concepts.picture_maps import MapRow, PictureMaps
from xlvlm_jax.data.images import read_image
from xlvlm_jax.report.environment import BLANK, environment, part, store
from xlvlm_jax.report.heat_maps import Scale, gradient_css, overlay, shared_scale
from xlvlm_jax.report.thumbnails import BUDGET, thumbnails

SIDES = (336, 224, 160, 128, 96)  # longest sides of pictures on the page, in pixels


class Mapped(NamedTuple):
    """A row of the page: one thing on all pictures, with one scale."""

    name: str
    unit: str
    scale: Scale
    overlays: list[str]  # data URIs


def write_map_page(
    found: PictureMaps, output: str | os.PathLike[str], facts: Sequence[tuple[str, str]] = ()
) -> Path:
    """Writes maps as a page, which needs no other file and no network.

    Pictures are hidden below their maps as far as the maps are opaque; pointing at a picture, or
    reaching it with the Tab key, shows it without.

    Args:
        found: from `map_pictures`.
        output: the file to write.
        facts: (name, value) pairs to show at the head of the page.

    Returns:
        The path of the page.

    Raises:
        OSError: the page can't be written.
    """
    paths = [str(sample.image) for sample in found.samples]
    sizes = [read_image(path).size for path in paths]
    text = (
        environment()
        .get_template("maps.html.jinja")
        .render(
            title="Where in the picture",
            facts=facts,
            names=[Path(path).name for path in paths],
            pictures=paths,
            rows=[mapped(row, found.boxes, sizes) for row in found.rows],
            **page_parts(paths),
        )
    )
    return store(Path(output), text)


def page_parts(paths: Sequence[str]) -> dict[str, Any]:
    """Returns what the templates of pages with maps share.

    Args:
        paths: files of the pictures on the page.
    """
    return {
        "thumbnails": thumbnails(paths, budget=BUDGET, sides=SIDES),
        "css": part("page.css"),
        "blank": BLANK,
        "stops": gradient_css(),
    }


def mapped(
    row: MapRow,
    boxes: Sequence[np.ndarray],
    sizes: Sequence[tuple[int, int]],
    among: Sequence[np.ndarray] | None = None,
) -> Mapped:
    """Draws one row of maps.

    Args:
        row: the maps.
        boxes: for each picture float[h, w, 4], its cells.
        sizes: (width, height) of each picture.
        among: arrays whose range the scale spans; None for the maps.
    """
    scale = shared_scale(row.maps if among is None else among)
    drawn = [overlay(*each, scale) for each in zip(row.maps, boxes, sizes, strict=True)]
    return Mapped(row.name, row.unit, scale, drawn)
