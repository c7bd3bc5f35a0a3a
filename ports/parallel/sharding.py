"""Where parameters and activations lie on a mesh: logical axes, bound to mesh axes once.

The mesh has an axis "data" for the batch and may have an axis "model" for heads, feed-forward
width and vocabulary. A dimension that its mesh axis does not divide is replicated, but for two:
a table of embeddings or a head whose vocabulary does not divide is divided along its width, and a
projection to query heads is divided by columns although the heads themselves are not.
"""

import contextlib
import contextvars
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

Path = tuple[str, ...]
# Module path -> number of key-value heads of the attention below it.
KVHeads = Mapping[Path, int]
AnyMesh = Mesh | AbstractMesh

# Logical axis -> mesh axis. "batch" counts rows of prompts, and in a tower its images.
RULES = {
    "batch": "data",
    "positions": None,
    "embed": None,
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "vocab": "model",
}

# Module -> logical axes of its kernel or embedding, () for what every device holds whole; a bias
# has the last of them. Where a name stands for two things, that of the module above goes in front
# ("merger.mlp_0"). A parameter outside of such a module has a rule by its own name.
Axes = Mapping[str, tuple[str, ...]]


def make_mesh(
    data: int,
    model: int = 1,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:  # JAX has the class in a variable, which the checker does not follow
    """A mesh of data x model devices that lets the compiler place what is not constrained.

    devices: default, all of all processes; `jax.local_devices()` for a mesh of this one alone.
    Raises ValueError if there are fewer devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if data < 1 or model < 1:
        raise ValueError(f"a mesh of {data} x {model} devices; expected at least 1 x 1")
    if data * model > len(devices):
        raise ValueError(
            f"a mesh of {data} x {model} takes {data * model} devices; there are {len(devices)}"
        )
    return jax.make_mesh(
        (data, model),
        ("data", "model"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=devices[: data * model],
    )


def parse_mesh(text: str) -> tuple[int, int]:
    """ "2x4" -> (2, 4), the sizes of the mesh axes "data" and "model"; else ValueError."""
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text.strip().lower(), re.ASCII)
    if found is None:
        raise ValueError(f"expected DATAxMODEL such as 2x4, got {text!r}")
    return int(found[1]), int(found[2])


def abstract_mesh(data: int, model: int) -> AbstractMesh:
    """As `make_mesh`, without devices: for what needs shapes alone."""
    return AbstractMesh((data, model), ("data", "model"))


def _fits(mesh: AnyMesh, axis: str | None, size: int) -> str | None:
    return axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None


def _kv_heads_of(path: Path, kv_heads: KVHeads) -> int | None:
    return next((n for above, n in kv_heads.items() if path[: len(above)] == above), None)


def logical_axes(path: Path, ndim: int, axes: Axes) -> tuple[str, ...]:
    """The logical axes of the parameter at a Flax path; none for one that is replicated.

    Raises ValueError for a parameter without a rule, or with one of another number of axes.
    """
    module, leaf = ("", *path)[-2:]
    names = (".".join(path[-3:-1]), module, leaf)
    rule = next((axes[name] for name in names if name in axes), None)
    if rule is None:
        raise ValueError(
            f"no rule says where {'.'.join(path)} lies on a mesh; name {module or leaf!r} in the "
            "`axes` of its model, with () if every device is to hold it"
        )
    if leaf == "bias":
        rule = rule[-1:]
    if len(rule) not in (0, ndim):
        raise ValueError(
            f"{'.'.join(path)} has {ndim} dimensions; its rule in the `axes` of its model is for "
            f"{len(rule)}: {', '.join(rule)}"
        )
    return rule


def param_sharding(
    mesh: AnyMesh,
    path: Path,
    shape: tuple[int, ...],
    axes: Axes,
    kv_heads: KVHeads | None = None,
) -> NamedSharding:
    """The sharding of the parameter at a Flax path.

    axes: the rules of the model (`VisionLanguageModel.axes`).
    kv_heads: how many key-value heads the modules have that are divided by whole heads
    (`VisionLanguageModel.kv_heads`); of other modules the width counts.

    Raises ValueError for a parameter without a rule.
    """
    named = logical_axes(path, len(shape), axes)
    count = _kv_heads_of(path, kv_heads or {})
    spec = [
        _fits(mesh, RULES[axis], count if axis == "kv_heads" and count else size)
        for axis, size in zip(named, shape, strict=False)
    ]
    if "vocab" in named and not any(spec):
        spec = [
            _fits(mesh, RULES["vocab"], size) if axis == "embed" else None
            for axis, size in zip(named, shape, strict=True)
        ]
    return NamedSharding(mesh, PartitionSpec(*spec))


def param_shardings(
    mesh: AnyMesh, params: dict, axes: Axes, kv_heads: KVHeads | None = None
) -> dict:
    """`param_sharding` of every leaf of a tree of (abstract) parameters, as such a tree."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(
        {
            path: param_sharding(mesh, path, leaf.shape, axes, kv_heads)
            for path, leaf in flat.items()
        }
    )


def device_bytes(params: dict, shardings: dict) -> int:
    """Bytes of the (abstract) parameters that one device holds."""

    def size(leaf: Any, sharding: NamedSharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, params, shardings)))


def batch_sharding(mesh: AnyMesh, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of an input whose first axis is the batch."""
    first = _fits(mesh, RULES["batch"], shape[0]) if math.prod(shape) else None
    return NamedSharding(mesh, PartitionSpec(first))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def from_slices(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    read: Callable[[Any], np.ndarray],
) -> jax.Array:
    """An array of which every process puts its own part on its own devices.

    read: an index in a whole array of that shape -> the values there; called for the parts of this
    process's devices only.
    """
    return jax.make_array_from_callback(shape, sharding, read)


def put(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has, on the devices of all of them."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    value = np.asarray(value)
    value = value.astype(jax.dtypes.canonicalize_dtype(value.dtype), copy=False)
    return from_slices(value.shape, sharding, lambda index: value[index])


_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def on(mesh: Mesh | None) -> Iterator[None]:
    """While this is open, `constrain` places activations on the mesh.

    It belongs inside of a jitted function, whose static argument the mesh is: what is traced for
    one mesh is then not taken for another.
    """
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """The activations x, laid out by their logical axes, one a dimension; None: as it comes.

    Nothing without a mesh (see `on`). Where the mesh axis does not divide a dimension it is
    replicated: left open, the compiler divides heads by their width, and every product of
    attention then ends in a sum over devices.
    """
    mesh = _mesh.get()
    if mesh is None:
        return x
    spec = [
        PartitionSpec.UNCONSTRAINED if axis is None else _fits(mesh, RULES[axis], size)
        for axis, size in zip(axes, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def heads(x: jax.Array, axis: str = "heads") -> jax.Array:
    """x[B, T, H, C] divided by whole heads; axis: "heads" or "kv_heads"."""
    return constrain(x, "batch", "positions", axis, "embed")


def residual(x: jax.Array) -> jax.Array:
    """x[B, T, D] of the residual stream, divided by rows alone."""
    return constrain(x, "batch", "positions", "embed")


def logits(x: jax.Array) -> jax.Array:
    """x[..., V] divided by the vocabulary, and by rows if the first axis is that of the batch."""
    first = () if x.ndim == 1 else ("batch", *(None,) * (x.ndim - 2))
    return constrain(x, *first, "vocab")
