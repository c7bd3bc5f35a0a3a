"""Pictures of any resolution as tiles, for LLaVA-NeXT and LLaVA-OneVision.

A picture is shown twice: whole, resized to one tile, and enlarged on a canvas of tiles, padded at
two sides. Of the canvas, rows and columns of patches that show only padding are dropped, and each
row ends in a learnt vector. All this is decided by the pictures' sizes, on the host: each feature
is a weighted sum of at most four rows of a table, which holds the patches of all tiles and that
vector, so that pictures of all sizes run in a few programs.

G patches along a side of a tile, F features of a batch, N rows of the table.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ports.inputs import padding
from ports.inputs.patch_layout import PatchLayout, grid
from ports.models import llava_like
from ports.tracing import is_traced

Array = jax.Array
Size = tuple[int, int]  # height, width


class Features(NamedTuple):
    """Features as weighted sums of rows of the table."""

    rows: np.ndarray  # int32[F, 4]
    weights: np.ndarray  # float32[F, 4]

    @classmethod
    def of_rows(cls, index: np.ndarray) -> "Features":
        """Returns the rows int[...] of the table themselves."""
        index = index.reshape(-1, 1)
        weight = np.zeros((len(index), 4), np.float32)
        weight[:, 0] = 1
        return cls(np.repeat(index, 4, axis=1).astype(np.int32), weight)

    @classmethod
    def joined(cls, parts: Iterable["Features"]) -> "Features":
        """Returns several in one."""
        parts = [*parts, cls(np.zeros((0, 4), np.int32), np.zeros((0, 4), np.float32))]
        return cls(*(np.concatenate(each) for each in zip(*parts, strict=True)))

    def padded(self) -> "Features":
        """Returns the features with further ones at the end, up to one of a few numbers."""
        missing = padding.bucket_length(max(len(self.rows), 1)) - len(self.rows)
        widths = ((0, missing), (0, 0))
        return Features(np.pad(self.rows, widths), np.pad(self.weights, widths))


def gather(table: Array, index: Array, weight: Array) -> Array:
    """Returns [F, D], the weighted sums of rows of table[N, D]."""
    return (table[index] * weight[..., None].astype(table.dtype)).sum(axis=1)


def prepared(
    inputs: Mapping[str, Any],
    config: Any,
    prepare: Callable[[Any, Mapping[str, np.ndarray]], dict[str, np.ndarray]],
) -> Mapping[str, Any]:
    """Returns inputs as `prepare` makes them, if they are still those of the processor.

    Raises:
        ValueError: the sizes of the images are traced.
    """
    if inputs.get("image_sizes") is None and inputs.get("pixel_values_videos") is None:
        return inputs
    if any(is_traced(value) for value in inputs.values()):
        raise ValueError(
            "the images' sizes are traced (by jax.jit, vmap or grad), but they decide the shapes; "
            "pass the arrays of vlm.place(inputs) or vlm.prepare(inputs)"
        )
    return prepare(config, {name: np.asarray(value) for name, value in inputs.items()})


def best_canvas(size: Size, canvases: Sequence[Size]) -> Size:
    """Returns the canvas that shows most of a picture, and of these the one with least padding."""

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / size[1], canvas[0] / size[0])
        shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return shown, shown - canvas[0] * canvas[1]

    return max(canvases, key=merit)  # the first of equal ones


def shown_part(size: Size, canvas: Size) -> tuple[slice, slice]:
    """Returns the rows and columns of a canvas that show the picture; padding has both sides' size.

    Args:
        size: of the picture, in any unit.
        canvas: rows and columns of patches.
    """
    height, width = canvas
    if size[1] / size[0] > width / height:
        kept = int(round(size[0] * (width / size[1]), 7))
        edge = (height - kept) // 2
        return slice(edge, height - edge), slice(0, width)
    kept = int(round(size[1] * (height / size[0]), 7))
    edge = (width - kept) // 2
    return slice(0, height), slice(edge, width - edge)


def tile_index(tiles: Size, side: int, first: int) -> np.ndarray:
    """Returns int[rows G, columns G], the rows of the table that hold the patches of a canvas.

    Args:
        tiles: rows and columns of tiles.
        side: G.
        first: row of the table of the first tile's first patch.
    """
    rows, columns = tiles
    index = first + np.arange(rows * columns * side * side).reshape(rows, columns, side, side)
    return index.transpose(0, 2, 1, 3).reshape(rows * side, columns * side)


def resampled(index: np.ndarray, height: int, width: int) -> Features:
    """Returns a grid of rows of the table, int[h, w], resized with bilinear interpolation.

    The middles of cells are aligned, as in PyTorch's `interpolate` without antialiasing.
    """

    def line(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        place = np.maximum((np.arange(new, dtype=np.float32) + 0.5) * (old / new) - 0.5, 0)
        low = np.minimum(place.astype(int), old - 1)
        return low, np.minimum(low + 1, old - 1), (place - low).astype(np.float32)

    top, bottom, down = line(index.shape[0], height)
    left, right, across = line(index.shape[1], width)
    corners = [index[np.ix_(y, x)] for y in (top, bottom) for x in (left, right)]
    weights = [np.outer(y, x) for y in (1 - down, down) for x in (1 - across, across)]
    return Features(
        np.stack(corners, axis=-1).reshape(-1, 4).astype(np.int32),
        np.stack(weights, axis=-1).reshape(-1, 4).astype(np.float32),
    )


def with_ends(features: Features, rows: int, end: int) -> Features:
    """Returns the features of a grid with row `end` of the table after each of its rows."""
    columns = len(features.rows) // max(rows, 1)  # of very long pictures, either may be 0
    index = features.rows.reshape(rows, columns, 4)
    weight = features.weights.reshape(rows, columns, 4)
    last = Features.of_rows(np.full(rows, end))
    return Features(
        np.concatenate([index, last.rows[:, None]], axis=1).reshape(-1, 4),
        np.concatenate([weight, last.weights[:, None]], axis=1).reshape(-1, 4),
    )


def tiles_of(pixels: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Returns the tiles [tiles, 3, height, width] of pictures.

    Args:
        pixels: [I, tiles, 3, height, width], filled up to the picture with most tiles.
        counts: number of tiles of each picture.
    """
    return np.concatenate([each[:count] for each, count in zip(pixels, counts, strict=True)])


def layout_of(size: Size, tiles: Size, vision: Any, shape: Size, places: np.ndarray) -> PatchLayout:
    """Returns the layout of one picture.

    The processor resizes the picture to as many whole pixels as fit on the canvas, and pads it on
    both sides, by one pixel less before it if their number is odd. A tile may be a few pixels
    larger than its cells.

    Args:
        size: height and width of the picture in pixels.
        tiles: rows and columns of tiles.
        vision: configuration of the tower, with its image_size, patch_size and `side`, G.
        shape: rows and columns of features that the tiles give, without the rows' ends.
        places: int[F], the positions of all of the picture's tokens.
    """
    side = vision.side
    whole = grid(places[: side * side], side, side, llava_like.on_cells(vision, side))
    kept = places[side * side :].reshape(shape[0], shape[1] + 1)[:, : shape[1]]
    shown = shown_part(size, (tiles[0] * side, tiles[1] * side))
    canvas = [count * vision.image_size for count in tiles]
    scale = min(full / length for full, length in zip(canvas, size, strict=True))
    edges = []
    for part, count, full, length, number in zip(shown, tiles, canvas, size, shape, strict=True):
        resized = min(math.ceil(length * scale), full)
        first = (full - resized) // 2
        edges.append(((cell_edges(count, vision, part, number) - first) / resized).clip(0, 1))
    rows, columns = edges
    boxes = np.empty((*shape, 4))
    boxes[..., [1, 3]], boxes[..., [0, 2]] = rows[:, None], columns[None]
    return PatchLayout(kept, boxes, whole=whole)


def cell_edges(tiles: int, vision: Any, part: slice, count: int) -> np.ndarray:
    """Returns float[count, 2], the first and last edge of cells along one side of a canvas.

    Args:
        tiles: tiles along the side.
        vision: as for `layout_of`.
        part: the cells of the canvas that show the picture.
        count: number of cells that these are resized to.

    Returns:
        Pixels of the canvas.
    """
    tile, cell = np.divmod(np.arange(tiles * vision.side)[part], vision.side)
    first = tile * vision.image_size + cell * vision.patch_size
    # In cells; integers divide without a rest where nothing is resized.
    begin = np.arange(count) * len(first) / count
    end = np.arange(1, count + 1) * len(first) / count
    low, high = np.floor(begin).astype(int), np.ceil(end).astype(int) - 1
    side = vision.patch_size
    return np.stack([first[low] + (begin - low) * side, first[high] + (end - high) * side], axis=-1)
