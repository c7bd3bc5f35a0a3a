"""Draws values on the cells of a picture as colours: overlays for a page, and a figure.

The colour map is matplotlib's viridis, whose steps look equally large.
"""

import base64
import io
import os
from collections.abc import Iterable
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from PIL import Image

from xlvlm_jax.concepts.maps import paint
from xlvlm_jax.concepts.picture_maps import PictureMaps
from xlvlm_jax.data.images import read_image
from xlvlm_jax.report.figure import figure

COLOUR_MAP = "viridis"
LEVELS = 48  # colours of an overlay
SIDE = 96  # pixels of its longer side
MOST_COLUMNS = 40  # pictures of a figure


class Scale(NamedTuple):
    """The values at the two ends of the colour map."""

    low: float
    high: float


def shared_scale(maps: Iterable[np.ndarray]) -> Scale:
    """Returns the range of all values of several maps, without NaN; [0, 1] if there are none.

    Args:
        maps: arrays of any shape.
    """
    finite = [one[np.isfinite(one)] for one in maps]
    finite = [one for one in finite if one.size]
    if not finite:
        return Scale(0.0, 1.0)
    return Scale(min(float(one.min()) for one in finite), max(float(one.max()) for one in finite))


def levels(values: np.ndarray, scale: Scale) -> np.ndarray:
    """Returns uint8, the colour of each value from 0 to LEVELS - 1; LEVELS for NaN.

    Args:
        values: float, any shape; values beyond the scale have the colour of its end.
        scale: the values of the first and the last colour. If they are equal, every value has the
            first colour.
    """
    span = scale.high - scale.low
    share = (values - scale.low) / span if span > 0 else np.zeros_like(values) * values
    with np.errstate(invalid="ignore"):
        found = np.floor(np.clip(share, 0, 1) * LEVELS).clip(max=LEVELS - 1)
    return np.where(np.isnan(values), LEVELS, found).astype(np.uint8)


def palette() -> np.ndarray:
    """Returns uint8[LEVELS, 3], the colours from the lowest to the highest value."""
    colours = matplotlib.colormaps[COLOUR_MAP](np.linspace(0, 1, LEVELS))
    return np.round(255 * colours[:, :3]).astype(np.uint8)


def overlay(
    values: np.ndarray, boxes: np.ndarray, size: tuple[int, int], scale: Scale, side: int = SIDE
) -> str:
    """Returns a map as a PNG in a data URI, to lay over its picture.

    Args:
        values: float[h, w]; cells with NaN are transparent.
        boxes: float[h, w, 4], the cells as fractions of the picture.
        size: (width, height) of the picture; only their ratio matters.
        scale: the values of the first and the last colour.
        side: pixels of the longer side of the PNG.
    """
    width, height = (max(1, round(side * edge / max(size))) for edge in size)
    painted = paint(values[None], boxes, height, width)[0]
    image = Image.fromarray(levels(painted, scale)).convert("P")
    image.putpalette([*palette().ravel().tolist(), 0, 0, 0])
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True, transparency=LEVELS)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def gradient_css() -> str:
    """Returns the colour map as the stops of a CSS gradient."""
    shown = palette()[np.linspace(0, LEVELS - 1, 9).round().astype(int)]
    return ", ".join(f"#{r:02x}{g:02x}{b:02x}" for r, g, b in shown.tolist())


def plot_maps(found: PictureMaps, path: str | os.PathLike[str]) -> None:
    """Draws a row of pictures for each thing that is mapped, with one scale per row.

    Args:
        found: from `map_pictures`.
        path: the file to write (.png, .svg or .pdf).
    """
    rows, columns = len(found.rows), len(found.samples)
    pictures = [read_image(sample.image) for sample in found.samples]
    with figure(path, rows + 1, columns, width=1.7 * columns + 1.2, height=1.8 * (rows + 1)) as (
        drawn,
        grid,
    ):
        for axis in grid.flat:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        for axis, sample, picture in zip(grid[0], found.samples, pictures, strict=True):
            axis.imshow(picture)
            axis.set_title(sample.image.name[-24:], fontsize=7)
        for line, row in zip(grid[1:], found.rows, strict=True):
            colours = Normalize(*shared_scale(row.maps))
            for axis, picture, boxes, one in zip(
                line, pictures, found.boxes, row.maps, strict=True
            ):
                axis.imshow(picture.convert("L"), cmap="gray")
                painted = paint(one[None], boxes, picture.height, picture.width)[0]
                axis.imshow(painted, COLOUR_MAP, colours, alpha=0.65, interpolation="none")
            line[0].set_title(row.name[:60], fontsize=8)
            bar = ScalarMappable(colours, COLOUR_MAP)
            drawn.colorbar(bar, ax=line.tolist(), label=row.unit, fraction=0.03, pad=0.01)
