"""Pads rows of tokens to one of a few lengths, so that a run compiles only a handful of programs.

B batch, T positions.
"""

from collections.abc import Collection, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

# Arrays of every port with one row per sample and one column per position, and their fill values;
# input_ids is filled with the pad token. A port adds its own (`Port.per_position`).
FILL = {"input_ids": 0, "attention_mask": 0, "position_ids": 0, "columns": -1}

_NONE: Mapping[str, int] = MappingProxyType({})


def bucket_length(length: int, multiple: int = 1) -> int:
    """Rounds a length up to 16, 32, 48, 64, 72, 80 ... 128, 144, 160 ... 256, 288 ...

    Eight lengths per octave: a run over prompts of any length compiles only a handful of programs,
    and at most one eighth of the positions is padding. Up to 64, where the number of positions
    hardly matters for the cost, lengths are multiples of 16.

    Args:
        length: number of positions.
        multiple: round up to a multiple of this first, so that short prompts compile fewer programs
            still.

    Returns:
        The padded number of positions.
    """
    length = -(-length // multiple) * multiple
    step = 16 if length <= 64 else 1 << ((length - 1).bit_length() - 4)
    return -(-length // step) * step


def bucket_count(count: int) -> int:
    """Rounds a number of images, crops or tiles up to 1 to 8, 10, 12, 14, 16, 20, 24 ...

    Four numbers per octave: pictures of all sizes, cut into more or fewer pieces, compile only a
    few programs. A piece costs as much as a picture, so that up to eight none is added.
    """
    step = 1 << max(0, (count - 1).bit_length() - 3)
    return -(-count // step) * step


def count_pieces(count: int, rows: int, multiple: int = 1) -> int:
    """Rounds a number of images, crops, tiles or frames up to the number that is compiled.

    Args:
        count: their number.
        rows: number of prompts, B. One piece per prompt is left alone, as are no pieces.
        multiple: number of devices that share them; a number that it does not divide would be
            computed as a whole on each of them. Where it divides the rows, as many pieces for each
            row are left alone: each device has those of its own rows (see `place_images`).

    Returns:
        The padded number.
    """
    is_even = multiple > 1 and rows % multiple == 0 and count % rows == 0
    if count in (0, rows) or is_even:
        return count
    return -(-bucket_count(count) // multiple) * multiple


def pad_pieces(
    arrays: Mapping[str, np.ndarray], names: Collection[str], rows: int, multiple: int = 1
) -> dict[str, np.ndarray]:
    """Appends zeros to the arrays with an entry per image, crop, tile or frame.

    Args:
        arrays: arrays of a batch.
        names: those to pad (`Port.pieces`).
        rows: as for `count_pieces`.
        multiple: as for `count_pieces`.

    Returns:
        The arrays; others are unchanged.
    """

    def padded(value: np.ndarray) -> np.ndarray:
        missing = count_pieces(len(value), rows, multiple) - len(value)
        return np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1)) if missing else value

    return {name: padded(value) if name in names else value for name, value in arrays.items()}


# A batch's canvas of patches is padded to multiples of 1 / _CANVAS_STEPS of the tower's own grid.
_CANVAS_STEPS = 14


def canvas_side(grid: int, patches: int) -> int:
    """Rounds a number of patches in a line up, so that images of all sizes compile few programs.

    Args:
        grid: patches along a side of the tower's own images.
        patches: patches along a side of the largest image of a batch.

    Returns:
        The padded number of patches.
    """
    step = max(1, grid // _CANVAS_STEPS)
    return -(-patches // step) * step


def fit_canvas(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cuts the last two axes to height and width, or pads them with zeros."""
    x = x[..., :height, :width]
    missing = (height - x.shape[-2], width - x.shape[-1])
    return np.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, side) for side in missing])


def pad_to_bucket(
    arrays: Mapping[str, np.ndarray],
    pad_token: int,
    own: Mapping[str, int] = _NONE,
    multiple: int = 1,
) -> dict[str, np.ndarray]:
    """Pads all per-position arrays on the left, up to the bucket length.

    Args:
        arrays: the processor's arrays.
        pad_token: fills input_ids.
        own: the port's own per-position arrays and their fill values.
        multiple: as for `bucket_length`.

    Returns:
        The arrays; those without positions are unchanged.
    """
    length = arrays["input_ids"].shape[1]
    missing = bucket_length(length, multiple) - length
    fill = FILL | {"input_ids": pad_token, **own}
    return {
        name: np.pad(value, ((0, 0), (missing, 0)), constant_values=fill[name])
        if name in fill
        else value
        for name, value in arrays.items()
    }


def with_columns(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds `columns`, which keeps track of the caller's columns when padding moves them."""
    ids = arrays["input_ids"]
    columns = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return {**arrays, "columns": columns}


def right_order(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns int[B, T], the columns of each row with the padding first."""
    return np.argsort(arrays["attention_mask"] != 0, axis=1, kind="stable")


def align_right(
    arrays: Mapping[str, np.ndarray], own: Mapping[str, int] = _NONE
) -> dict[str, np.ndarray]:
    """Moves the tokens of each row to its end, where generation continues.

    Args:
        arrays: the processor's arrays.
        own: the port's own per-position arrays.

    Returns:
        The arrays; those without positions are unchanged.
    """
    order = right_order(arrays)
    return {
        name: np.take_along_axis(value, order, axis=1) if name in FILL or name in own else value
        for name, value in arrays.items()
    }


def realign(arrays: Mapping[str, np.ndarray], states: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Moves states back to the caller's columns; the inverse of `align_right`.

    Args:
        arrays: the processor's arrays before `align_right`.
        states: site -> [B, T, D] or [B, T, H, C], or [B, 1, D] for the last position only, which
            is not moved.

    Returns:
        Site -> states in the columns of `arrays`.
    """
    order = right_order(arrays)
    if (order == np.arange(order.shape[1])).all():
        return states
    back = np.argsort(order, axis=1)

    def moved(value: jax.Array) -> jax.Array:
        index = back.reshape(*back.shape, *[1] * (value.ndim - 2))
        return jnp.take_along_axis(value, index, axis=1)

    return {site: x if x.shape[1] == 1 else moved(x) for site, x in states.items()}
