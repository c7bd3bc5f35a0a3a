"""Where the states of Molmo's image tokens come from: a tiling of crops, and the whole picture.

Crops overlap, but every cell of the tiling has one token: where crops overlap, the processor drops
the features of one of them. Tiling and whole picture are centred on a black canvas each.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ports.inputs.patch_layout import ALL, Box, Layouts, PatchLayout, grid_boxes
from ports.models.molmo.crops import POOL


def patch_layout(
    config: Any, arrays: Mapping[str, np.ndarray], read_processor: Callable[[], Any]
) -> Layouts:
    """Lays out the tiling of each picture, with the whole as its `whole`.

    Raises:
        ValueError: the tokens are not those of whole pictures, or the arrays of crops are missing.
    """
    if not np.isin(arrays["input_ids"], config.image_tokens[0]).any():
        return [[] for _ in arrays["input_ids"]]
    if "image_masks" not in arrays or "image_input_idx" not in arrays:
        raise ValueError(
            "inputs have no image_masks and image_input_idx; pass what the processor returns"
        )
    return [
        _of_row(config, *each)
        for each in zip(
            arrays["input_ids"], arrays["image_masks"], arrays["image_input_idx"], strict=True
        )
    ]


def _of_row(
    config: Any, ids: np.ndarray, masks: np.ndarray, index: np.ndarray
) -> list[PatchLayout]:
    patch, column, start, end = config.image_tokens
    begins, ends = np.flatnonzero(ids == start), np.flatnonzero(ids == end)
    if len(begins) != len(ends) or len(begins) % 2:
        raise ValueError(
            f"a prompt has {len(begins)} starts and {len(ends)} ends of grids; expected two grids "
            "per picture, as the processor writes them"
        )
    grids = []
    for begin, stop in zip(begins, ends, strict=True):
        rows = max((ids[begin:stop] == column).sum(), 1)
        grids.append(np.flatnonzero(ids[begin:stop] == patch).reshape(rows, -1) + begin)
    # The first token of each crop; crops without one are padding.
    first = np.where(index < 0, len(ids), index).min(axis=1)
    layouts = []
    for whole, tiles in zip(grids[::2], grids[1::2], strict=True):
        crops = np.flatnonzero((first >= tiles[0, 0]) & (first <= tiles[-1, -1]))
        # A mask stands one crop before the crop that it describes.
        inside = _picture(masks[crops - 1], POOL * tiles.shape[0], POOL * tiles.shape[1])
        x0, y0, x1, y1 = inside
        width, height = (x1 - x0) * tiles.shape[1], (y1 - y0) * tiles.shape[0]
        x, y = (0.5 - 0.5 * side / max(width, height) for side in (width, height))
        layouts.append(
            PatchLayout(
                tiles,
                grid_boxes(tiles.shape[0], tiles.shape[1], inside),
                whole=PatchLayout(
                    whole,
                    grid_boxes(whole.shape[0], whole.shape[1], (x, y, 1 - x, 1 - y)),
                ),
            )
        )
    return layouts


def _picture(masks: np.ndarray, height: int, width: int) -> Box:
    """Returns the rectangle of the picture on the canvas of a tiling, as fractions.

    Args:
        masks: float[crops, P], the fraction of each patch that is in the picture.
        height: patches along the canvas.
        width: patches along the canvas.
    """
    side = math.isqrt(len(masks[0]))
    tiling = _tiling(len(masks), side, height, width)
    if tiling is None:
        return ALL
    columns, step = tiling
    canvas = np.zeros((height, width))
    for number, mask in enumerate(masks):
        y, x = (number // columns) * step, (number % columns) * step
        canvas[y : y + side, x : x + side] = mask.reshape(side, side)
    edges = []
    for axis in (0, 1):
        # Of a patch at the edge, as much is in the picture as its largest fraction along the edge.
        share = canvas.max(axis=axis) / canvas.max()
        used = np.flatnonzero(share)
        first, last = int(used[0]), int(used[-1])
        edges.append((first + 1 - float(share[first]), last + float(share[last])))
    (x0, x1), (y0, y1) = edges
    return x0 / width, y0 / height, x1 / width, y1 / height


def _tiling(count: int, side: int, height: int, width: int) -> tuple[int, int] | None:
    """Returns the columns of a tiling and the patches from one crop to the next, or None."""
    for columns in range(1, count + 1):
        rows = count // columns
        if rows * columns != count or (rows == 1) != (height == side):
            continue
        if (columns == 1) != (width == side):
            continue
        sides = ((height, rows), (width, columns))
        steps = {(length - side) // (n - 1) for length, n in sides if n > 1}
        if len(steps) <= 1:
            return columns, next(iter(steps), 0)
    return None
