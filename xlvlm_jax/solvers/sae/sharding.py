"""Where arrays lie on a mesh: rows along "data", features along "model".

The partitioner of XLA derives everything else, so a step is written as for one device.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Axis of each array of the training state by its name; others are on every device.
_FEATURES = {
    "W_enc": (None, "model"),
    "W_dec": ("model", None),
    "b_enc": ("model",),
    "log_threshold": ("model",),
    "weights": ("model", None),
    "idle": ("model",),
}


def sharding_of(
    shape: tuple[int, ...], mesh: Mesh | None, *axes: str | None
) -> NamedSharding | None:
    """Returns the sharding of an array along named axes of a mesh; None without a mesh.

    An axis that the mesh does not have, or that does not divide the array, is left whole.
    """
    if mesh is None:
        return None
    fit = (
        axis if axis in mesh.axis_names and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, shape, strict=False)
    )
    return NamedSharding(mesh, PartitionSpec(*fit))


def spread(value: jax.Array, mesh: Mesh | None, *axes: str | None) -> jax.Array:
    """Returns an array along named axes of a mesh, inside a program."""
    where = sharding_of(value.shape, mesh, *axes)
    return value if where is None else jax.lax.with_sharding_constraint(value, where)


def spread_state(state: Any, mesh: Mesh | None) -> Any:
    """Returns the training state with every array where its name says, inside a program."""
    if mesh is None:
        return state

    def place(path: tuple, leaf: jax.Array) -> jax.Array:
        last = path[-1]
        return spread(
            leaf, mesh, *_FEATURES.get(getattr(last, "key", getattr(last, "name", "")), ())
        )

    return jax.tree_util.tree_map_with_path(place, state)
