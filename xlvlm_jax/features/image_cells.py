"""Image tokens as rows: which of them are chosen, and where in its picture each one lies.

B batch, T prompt positions, N rows.
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ports import VLM
from ports.inputs.patch_layout import Layouts, PatchLayout


class Cells(NamedTuple):
    """Where the rows of image tokens come from.

    Attributes:
        grid: int32[N, 4]: picture of the sample, view, row and column.
        box: float32[N, 4]: x0, y0, x1 and y1 as fractions of the original picture.
    """

    grid: np.ndarray
    box: np.ndarray

    @classmethod
    def empty(cls) -> "Cells":
        """Returns no cells."""
        return cls(np.zeros((0, 4), np.int32), np.zeros((0, 4), np.float32))

    def take(self, rows: np.ndarray | slice) -> "Cells":
        """Returns the cells of some rows."""
        return Cells(self.grid[rows], self.box[rows])


class BatchCells(NamedTuple):
    """The chosen image tokens of a batch."""

    chosen: np.ndarray  # bool[B, T]
    grid: np.ndarray  # int32[B, T, 4], as in `Cells`; -1 where no cell lies
    box: np.ndarray  # float32[B, T, 4]

    def at(self, row: np.ndarray, position: np.ndarray, mask: np.ndarray) -> Cells:
        """Returns the cells of chosen tokens.

        Args:
            row: int[N], row of the batch.
            position: int[N], position in the prompt, not counting padding.
            mask: [B, T], 0 for padding.
        """
        # The n-th position that is not padding: stable, so in order.
        real = np.argsort(~np.asarray(mask, bool), axis=1, kind="stable")
        where = real[row, position]
        return Cells(self.grid[row, where], self.box[row, where])


def batch_cells(
    layouts: Layouts,
    length: int,
    names: Sequence[str],
    *,
    at_most: int | None = None,
    seed: int = 0,
) -> BatchCells:
    """Chooses image tokens of a batch, and tells where they lie.

    A token whose cell lies in padding, or that only separates rows of cells, is not chosen. Which
    tokens of a sample are chosen depends on its name, its number of cells and the seed, not on the
    batch that it is in.

    Args:
        layouts: for each row its pictures, as `VLM.patch_layout` returns them.
        length: T.
        names: the sample of each row.
        at_most: maximum number of tokens per sample; None for all.
        seed: seed of the choice among more.

    Returns:
        The chosen tokens. View 0 is the picture, or its tiles; view 1 the shrunk picture beside
        its tiles.
    """
    shape = len(layouts), length
    chosen = np.zeros(shape, bool)
    grid = np.full((*shape, 4), -1, np.int32)
    box = np.zeros((*shape, 4), np.float32)
    for b, (pictures, name) in enumerate(zip(layouts, names, strict=True)):
        for picture, layout in enumerate(pictures):
            for view, each in enumerate(views(layout)):
                x0, y0, x1, y1 = np.moveaxis(each.boxes, -1, 0)
                y, x = np.nonzero((each.positions >= 0) & (x1 > x0) & (y1 > y0))
                where = each.positions[y, x]
                chosen[b, where] = True
                alike = np.full_like(y, picture), np.full_like(y, view)
                grid[b, where] = np.stack([*alike, y, x], axis=-1)
                box[b, where] = each.boxes[y, x]
        candidates = np.flatnonzero(chosen[b])
        if at_most is not None and len(candidates) > at_most:
            number = zlib.crc32(_encoded(name))
            rng = np.random.default_rng([seed, number])
            chosen[b] = False
            chosen[b, rng.choice(candidates, at_most, replace=False)] = True
    return BatchCells(chosen, grid, box)


def _encoded(name: str) -> bytes:
    """Returns the bytes of a name, which may be that of a file and need not be UTF-8."""
    try:
        return name.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # other lone surrogates, such as an ID in JSON may have
        return name.encode(errors="surrogatepass")


def views(layout: PatchLayout) -> tuple[PatchLayout, ...]:
    """Returns the views of a picture: itself or its tiles, then the shrunk picture if there is."""
    return (layout,) if layout.whole is None else (layout, layout.whole)


def cells_of(
    vlm: VLM,
    inputs: dict[str, np.ndarray],
    sizes: Sequence[tuple[int, int]],
    names: Sequence[str],
    *,
    at_most: int | None,
    seed: int,
) -> BatchCells:
    """Chooses image tokens of a batch with one picture per row.

    Args:
        vlm: the model.
        inputs: the processor's arrays.
        sizes: (height, width) of the picture of each row.
        names: as for `batch_cells`.
        at_most: as for `batch_cells`.
        seed: as for `batch_cells`.

    Raises:
        ValueError: the model's port does not tell where image tokens lie, or a prompt has no image
            tokens.
    """
    layouts = vlm.patch_layout(inputs, sizes=[[size] for size in sizes])
    without = next((name for name, row in zip(names, layouts, strict=True) if not row), None)
    if without is not None:
        raise ValueError(f"the prompt of sample {without} has no picture; image tokens need one")
    return batch_cells(layouts, inputs["input_ids"].shape[1], names, at_most=at_most, seed=seed)
