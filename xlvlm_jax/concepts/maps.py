"""Where in a picture a concept is: activations on the picture's own grid of cells.

B rows, T positions, D width, K concepts, h x w cells of a picture.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ports.inputs.patch_layout import PatchLayout
from xlvlm_jax.concepts.decomposition import project
from xlvlm_jax.concepts.record import Concepts


def concept_maps(
    states: Float[np.ndarray, "B T D"],
    concepts: Concepts,
    layouts: Sequence[Sequence[PatchLayout]],
) -> list[list[Float[np.ndarray, "K h w"]]]:
    """Returns the activations of concepts in each cell of each picture.

    All cells are projected together, so that rows of any number of pictures cost one call. Runs on
    the host and cannot be traced.

    Args:
        states: float[B, T, D], the states of the concepts' site at every position of a prompt.
        concepts: K concepts of width D, learnt at that site.
        layouts: for each row its pictures, as `VLM.patch_layout` returns them for the same inputs.

    Returns:
        For each row and picture float32[K, h, w], on the grid of `positions`; NaN in cells that no
        position covers. `paint` draws a map in the pixels of its picture.

    Raises:
        ValueError: the layouts have another number of rows or positions beyond T, no row has a
            picture, or the states have another width than the concepts or are not finite.

    Examples:
        >>> import numpy as np, xlvlm_jax
        >>> from ports.inputs.patch_layout import grid
        >>> concepts = xlvlm_jax.Concepts.from_components(np.eye(2), alpha=1.0)
        >>> states = np.float32([[[9, 9], [3, 0], [0, 5]]])  # the picture's cells are 1 and 2
        >>> maps = xlvlm_jax.concept_maps(states, concepts, [[grid([1, 2], 1, 2)]])
        >>> maps[0][0].tolist()
        [[[2.0, 0.0]], [[0.0, 4.0]]]
    """
    states = np.asarray(states)
    if states.ndim != 3 or len(states) != len(layouts):
        raise ValueError(
            f"states have shape {states.shape} for layouts of {len(layouts)} rows; expected "
            "[rows, positions, width] of the same inputs"
        )
    cells = [(row, layout.positions) for row, pictures in enumerate(layouts) for layout in pictures]
    if not cells:
        raise ValueError("no prompt has a picture; concept maps need image tokens")
    highest = max(int(positions.max()) for _, positions in cells)
    if highest >= states.shape[1]:
        raise ValueError(
            f"a layout has position {highest}, but the states have {states.shape[1]} positions; "
            "pass the layout of the same inputs"
        )
    chosen = [states[row, positions[positions >= 0]] for row, positions in cells]
    activations = np.asarray(project(np.concatenate(chosen), concepts), np.float32)
    parts = np.split(activations, np.cumsum([len(part) for part in chosen])[:-1])
    maps: list[list[np.ndarray]] = [[] for _ in layouts]
    for (row, positions), part in zip(cells, parts, strict=True):
        drawn = np.full((activations.shape[1], *positions.shape), np.nan, np.float32)
        drawn[:, positions >= 0] = part.T
        maps[row].append(drawn)
    return maps


def paint(
    values: Float[np.ndarray, "K h w"],
    boxes: Float[np.ndarray, "h w 4"],
    height: int,
    width: int,
) -> Float[np.ndarray, "K height width"]:
    """Draws maps in the pixels of their picture.

    A pixel has the value of the cell that its middle lies in; where boxes overlap, the mean of
    theirs. Runs on the host and cannot be traced.

    Args:
        values: float[K, h, w], maps; NaN cells are left out.
        boxes: float[h, w, 4], the cells' boxes, of `PatchLayout`.
        height: pixels of the picture.
        width: pixels of the picture.

    Returns:
        float32[K, height, width]; NaN where no cell lies.

    Raises:
        ValueError: the maps are not on the grid of the boxes, or a side is below one pixel.

    Examples:
        >>> import numpy as np
        >>> from ports.inputs.patch_layout import grid_boxes
        >>> from xlvlm_jax.concepts.maps import paint
        >>> paint(np.float32([[[1, 2]]]), grid_boxes(1, 2), 1, 4).tolist()
        [[[1.0, 1.0, 2.0, 2.0]]]
    """
    values, boxes = np.asarray(values, np.float32), np.asarray(boxes)
    if values.ndim != 3 or boxes.shape != (*values.shape[1:], 4):
        raise ValueError(
            f"maps have shape {values.shape} and boxes {boxes.shape}; expected [K, h, w] and "
            "[h, w, 4]"
        )
    if min(height, width) < 1:
        raise ValueError(f"the picture is {width} x {height} pixels; expected at least one")
    total = np.zeros((len(values), height, width))
    count = np.zeros((height, width))
    # The first pixel whose middle lies in a box, and the first after it.
    edges = np.ceil(boxes * (width, height, width, height) - 0.5).astype(int).clip(0)
    for (x0, y0, x1, y1), cell in zip(
        edges.reshape(-1, 4), values.reshape(len(values), -1).T, strict=True
    ):
        if np.isfinite(cell).all():
            total[:, y0:y1, x0:x1] += cell[:, None, None]
            count[y0:y1, x0:x1] += 1
    with np.errstate(invalid="ignore"):
        return (total / count).astype(np.float32)
