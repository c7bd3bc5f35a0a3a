"""Where parameters and batches lie on a mesh: logical axes, bound to mesh axes once.

The mesh has an axis "data" for the batch and may have an axis "model" for heads, feed-forward
width and vocabulary. A dimension that its mesh axis does not divide is replicated.
"""

import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Logical axis -> mesh axis.
RULES = {"batch": "data", "heads": "model", "mlp": "model", "vocab": "model", "embed": None}

# Module -> logical axes of its kernel or embedding. What is not named here is replicated. Where a
# name stands for two things, that of the module above it goes in front.
_AXES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "att_proj"), ("embed", "heads")),
    **dict.fromkeys(("o_proj", "out_proj", "attn_out", "wo"), ("heads", "embed")),
    **dict.fromkeys(("gate_proj", "up_proj", "fc1", "ff_proj", "w1", "w3"), ("embed", "mlp")),
    **dict.fromkeys(("down_proj", "fc2", "ff_out", "w2"), ("mlp", "embed")),
    **dict.fromkeys(("wq", "wk", "wv"), ("embed", "heads")),
    **dict.fromkeys(("embed_tokens", "wte"), ("vocab", "embed")),
    **dict.fromkeys(("lm_head", "transformer.ff_out"), ("embed", "vocab")),
}


def make_mesh(data: int, model: int = 1) -> Mesh:
    """A mesh of data x model devices that lets the compiler place what is not constrained."""
    return jax.make_mesh(
        (data, model), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )


def _fits(mesh: Mesh, axis: str | None, size: int) -> str | None:
    return axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None


def param_sharding(mesh: Mesh, path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of the parameter at a Flax path."""
    module, leaf = path[-2:] if len(path) > 1 else ("", path[-1])
    axes = _AXES.get(".".join(path[-3:-1]), _AXES.get(module, ()))
    if leaf == "bias":
        axes = axes[-1:]
    axes = axes if len(axes) == len(shape) else ()
    spec = [_fits(mesh, RULES[axis], size) for axis, size in zip(axes, shape, strict=False)]
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of an input whose first axis is the batch."""
    first = _fits(mesh, RULES["batch"], shape[0]) if math.prod(shape) else None
    return NamedSharding(mesh, PartitionSpec(first))
