"""Where in a picture the states of image tokens come from: cells, their positions and their boxes.

T positions of a prompt, h x w cells of a picture.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 as fractions of a picture
Layouts = list[list["PatchLayout"]]  # for each row, its pictures in the order of the prompt
ALL: Box = (0.0, 0.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class PatchLayout:
    """The cells of one picture.

    Boxes may overlap, as crops do. A cell that lies in padding has a box without area.

    Attributes:
        positions: int[h, w], the position in T whose state covers each cell; -1 where none does.
        boxes: float[h, w, 4], x0, y0, x1 and y1 of each cell as fractions of the original picture.
        whole: the cells of the shrunk picture that is shown beside its tiles, for models that do
            that; then `positions` and `boxes` are those of the tiles.
        latents: whether the states belong to latents of a resampler. They have no place of their
            own: each may see all of its crop, which is its box, and w counts the latents.
    """

    positions: np.ndarray
    boxes: np.ndarray
    whole: "PatchLayout | None" = None
    latents: bool = False

    def __repr__(self) -> str:
        height, width = self.positions.shape
        cells = f"{height} x {width} {'latents' if self.latents else 'cells'}"
        return (
            f"PatchLayout({cells}{', and those of the whole picture' * (self.whole is not None)})"
        )


def grid_boxes(height: int, width: int, inside: Box = ALL) -> np.ndarray:
    """Returns float[h, w, 4], the boxes of equal cells that fill a canvas.

    Args:
        height: number of rows.
        width: number of columns.
        inside: the picture's rectangle on the canvas, as fractions of the canvas; the boxes are
            fractions of the picture, cut at its edges.
    """
    x0, y0, x1, y1 = inside
    columns = ((np.arange(width + 1) / width - x0) / (x1 - x0)).clip(0, 1)
    rows = ((np.arange(height + 1) / height - y0) / (y1 - y0)).clip(0, 1)
    left, top = np.meshgrid(columns[:-1], rows[:-1])
    right, bottom = np.meshgrid(columns[1:], rows[1:])
    return np.stack([left, top, right, bottom], axis=-1)


def grid(positions: np.ndarray, height: int, width: int, inside: Box = ALL) -> PatchLayout:
    """Returns the layout of h x w equal cells whose positions int[h w] run row by row."""
    return PatchLayout(
        np.asarray(positions, np.int64).reshape(height, width), grid_boxes(height, width, inside)
    )


def latents(positions: np.ndarray, boxes: Sequence[Box]) -> PatchLayout:
    """Returns the layout of a resampler's latents.

    Args:
        positions: int[crops, latents].
        boxes: the box of each crop.
    """
    wide = np.repeat(np.array(boxes, np.float64)[:, None], positions.shape[1], axis=1)
    return PatchLayout(np.asarray(positions, np.int64), wide, latents=True)


def runs(row: np.ndarray, token: int, sizes: Iterator[int]) -> list[np.ndarray]:
    """Splits the positions of a row's image tokens into pictures.

    Args:
        row: int[T], token ids.
        token: id of the image token.
        sizes: number of tokens of each picture of the batch; as many are taken as the row holds.

    Returns:
        The positions of each picture's tokens.

    Raises:
        ValueError: the row's tokens are not those of whole pictures.
    """
    places, found = np.flatnonzero(row == token), []
    while len(places):
        size = next(sizes, None)
        if size is None or size > len(places):
            raise ValueError(
                f"a prompt has {len(places)} image tokens (id {token}) where the next picture has "
                f"{'none' if size is None else size}; pass the arrays of one call of the processor"
            )
        found.append(places[:size])
        places = places[size:]
    return found


def equal_runs(row: np.ndarray, token: int, size: int) -> list[np.ndarray]:
    """Splits a row's image tokens into pictures of `size` tokens; errors as for `runs`."""
    return runs(row, token, iter(lambda: size, None))


def of_grids(input_ids: np.ndarray, kinds: Mapping[int, np.ndarray | None], merge: int) -> Layouts:
    """Lays out pictures and videos that come with a grid of patches each.

    Args:
        input_ids: int[B, T].
        kinds: token id -> int[I, 3], frames, rows and columns of patches of each picture or video
            of the batch with this token; None if there are none.
        merge: merge x merge patches become one token.

    Returns:
        For each row its pictures, and its videos frame by frame, in the order of the prompt.

    Raises:
        ValueError: tokens and grids do not match.
    """
    grids = {
        token: np.zeros((0, 3), int) if given is None else np.asarray(given, int)
        for token, given in kinds.items()
    }
    shapes = {token: given // (1, merge, merge) for token, given in grids.items()}
    sizes = {token: iter(shape.prod(axis=1).tolist()) for token, shape in shapes.items()}
    seen = dict.fromkeys(kinds, 0)
    rows = []
    for ids in input_ids:
        found = []
        for token, shape in shapes.items():
            for places in runs(ids, token, sizes[token]):
                frames, height, width = shape[seen[token]]
                seen[token] += 1
                for frame in np.split(places, frames):
                    found.append(grid(frame, int(height), int(width)))
        rows.append(sorted(found, key=lambda layout: layout.positions[0, 0]))
    return rows


def in_original(
    layouts: Layouts, sizes: Sequence[Sequence[tuple[int, int]]], processor: Any
) -> Layouts:
    """Changes boxes from fractions of what a model saw to fractions of the original pictures.

    Args:
        layouts: the layouts.
        sizes: for each row the (height, width) of its pictures.
        processor: transformers' processor of images; None if the model sees whole pictures.

    Raises:
        ValueError: `sizes` has other rows or pictures than the layouts.
    """
    counts = [len(row) for row in layouts], [len(row) for row in sizes]
    if counts[0] != counts[1]:
        raise ValueError(
            f"sizes has {counts[1]} pictures per row, but the prompts have {counts[0]}; give the "
            "(height, width) of every picture, row by row"
        )
    moved = []
    for row, pictures in zip(layouts, sizes, strict=True):
        moved.append([])
        for layout, (height, width) in zip(row, pictures, strict=True):
            x0, y0, x1, y1 = seen_part(processor, height, width)
            boxes = layout.boxes * (x1 - x0, y1 - y0, x1 - x0, y1 - y0) + (x0, y0, x0, y0)
            moved[-1].append(dataclasses.replace(layout, boxes=boxes.clip(0, 1)))
    return moved


def seen_part(processor: Any, height: int, width: int) -> Box:
    """Returns the part of a picture that a processor of single images shows to the model.

    Args:
        processor: transformers' processor of images: its `do_pad` (LLaVA's, to a square), `size`,
            `crop_size` and `do_center_crop`.
        height: pixels of the picture.
        width: pixels of the picture.

    Returns:
        The box that is left after padding, resizing and cropping, as fractions of the picture; it
        reaches beyond the picture where the model sees padding.
    """
    # The picture lies in the middle of the square.
    sides, starts = (height, width), (0, 0)
    if getattr(processor, "do_pad", False) and hasattr(processor, "pad_to_square"):
        sides = (max(height, width),) * 2
        starts = tuple((max(sides) - side) // 2 for side in (height, width))
    kept = [(0.0, 1.0)] * 2
    if getattr(processor, "do_center_crop", False):
        kept = _centre_crop(processor, *sides)
    (y0, y1), (x0, x1) = (
        ((first * side - start) / own, (end * side - start) / own)
        for (first, end), side, start, own in zip(kept, sides, starts, (height, width), strict=True)
    )
    return x0, y0, x1, y1


def _centre_crop(processor: Any, height: int, width: int) -> list[tuple[float, float]]:
    """Returns where the crop begins and ends along height and width, as fractions of them."""
    size, crop = processor.size, processor.crop_size
    short = size.get("shortest_edge")
    if short is not None:
        resized = [int(short * side / min(height, width)) for side in (height, width)]
    else:
        resized = [size["height"], size["width"]]
    edges = []
    for side, kept in zip(resized, (crop["height"], crop["width"]), strict=True):
        # Smaller pictures are padded on both sides: then the box reaches beyond the picture.
        start = (side - kept) // 2
        edges.append((start / side, (start + kept) / side))
    return edges
