"""Where rows of tokens are padded: few lengths, so that a run compiles a handful of programs.

B batch, T positions.
"""

from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

# The arrays of every port that have one row a sample and one column a position, and what fills
# them; of input_ids the pad token does. A port names its own (`Port.per_position`).
_FILL = {"input_ids": 0, "attention_mask": 0, "position_ids": 0, "columns": -1}

_NONE: Mapping[str, int] = MappingProxyType({})


def bucket_length(length: int) -> int:
    """The least of 16, 32, 48, 64, 72, 80 ... 128, 144, 160 ... 256, 288 ... that holds it.

    Eight lengths an octave: a run over prompts of all lengths compiles a handful of programs and
    computes at most an eighth of its positions in vain. The shortest, whose cost is not that of
    their positions, are sixteens.
    """
    step = 16 if length <= 64 else 1 << ((length - 1).bit_length() - 4)
    return -(-length // step) * step


def pad_to_bucket(
    arrays: Mapping[str, np.ndarray], pad_token: int, own: Mapping[str, int] = _NONE
) -> dict[str, np.ndarray]:
    """Pads what has a column a position on the left, up to the bucket's length.

    own: the port's own arrays of that kind, and what fills them.
    """
    length = arrays["input_ids"].shape[1]
    missing = bucket_length(length) - length
    fill = _FILL | {"input_ids": pad_token, **own}
    return {
        name: np.pad(value, ((0, 0), (missing, 0)), constant_values=fill[name])
        if name in fill
        else value
        for name, value in arrays.items()
    }


def right_order(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """int[B, T]: the columns of each row, those of padding first."""
    return np.argsort(arrays["attention_mask"] != 0, axis=1, kind="stable")


def align_right(
    arrays: Mapping[str, np.ndarray], own: Mapping[str, int] = _NONE
) -> dict[str, np.ndarray]:
    """Moves the tokens of each row to its end, where generation goes on; own: as above."""
    order = right_order(arrays)
    return {
        name: np.take_along_axis(value, order, axis=1) if name in _FILL or name in own else value
        for name, value in arrays.items()
    }


def realign(arrays: Mapping[str, np.ndarray], states: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Moves states [B, T, D] of rows that `align_right` moved back to the columns of `arrays`.

    States of one position are those of the last, and stay.
    """
    order = right_order(arrays)
    if (order == np.arange(order.shape[1])).all():
        return states
    back = np.argsort(order, axis=1)[..., None]
    return {
        site: value if value.shape[1] == 1 else jnp.take_along_axis(value, back, axis=1)
        for site, value in states.items()
    }
