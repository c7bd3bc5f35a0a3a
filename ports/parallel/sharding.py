"""Sharding of parameters and activations over a mesh: logical axes, bound to mesh axes once.

The mesh has an axis "data" for the batch and may have an axis "model" for heads, feed-forward
width and vocabulary. A dimension that its mesh axis does not divide evenly is replicated, with two
exceptions: an embedding table or head is then sharded along its width instead of the vocabulary,
and a projection to query heads is sharded by columns even if the heads themselves are not.
"""

import contextlib
import contextvars
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ports.parallel.axis_types import AnyMesh, automatic, check_context

Path = tuple[str, ...]
# Module path -> number of key-value heads in the attention layers below it.
KVHeads = Mapping[Path, int]

# Logical axis -> mesh axis. "batch" counts prompts, in a vision tower images.
RULES = {
    "batch": "data",
    "positions": None,
    "embed": None,
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "vocab": "model",
}

# Module -> logical axes of its kernel or embedding, () to replicate it; a bias has the last axis.
# An ambiguous name is prefixed with the parent module's ("merger.mlp_0"). A parameter that is not
# in such a module has a rule under its own name.
Axes = Mapping[str, tuple[str, ...]]


def make_mesh(
    data: int,
    model: int = 1,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:  # JAX has the class in a variable, which the checker does not follow
    """Makes a mesh of data x model devices, with axes "data" and "model".

    The axes have type `Auto`: the compiler shards whatever is not constrained.

    Args:
        data: number of devices along the batch.
        model: number of devices along heads, feed-forward width and vocabulary.
        devices: the devices to use. Default: all devices of all processes; pass
            `jax.local_devices()` for a mesh within this process.

    Returns:
        The mesh.

    Raises:
        ValueError: a size is less than 1, or there are fewer devices.

    Examples:
        >>> import ports
        >>> dict(ports.make_mesh(1).shape)
        {'data': 1, 'model': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    if data < 1 or model < 1:
        raise ValueError(f"a mesh of {data} x {model} devices; expected at least 1 x 1")
    if data * model > len(devices):
        raise ValueError(
            f"a mesh of {data} x {model} needs {data * model} devices; there are {len(devices)}"
        )
    return jax.make_mesh(
        (data, model),
        ("data", "model"),
        axis_types=(AxisType.Auto,) * 2,
        devices=devices[: data * model],
    )


def parse_mesh(text: str) -> tuple[int, int]:
    """Parses the sizes of the mesh axes "data" and "model", such as "2x4".

    Args:
        text: DATAxMODEL.

    Returns:
        (data, model).

    Raises:
        ValueError: the text has another form.

    Examples:
        >>> import ports
        >>> ports.parse_mesh("2x4")
        (2, 4)
    """
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text.strip().lower(), re.ASCII)
    if found is None:
        raise ValueError(f"expected DATAxMODEL such as 2x4, got {text!r}")
    return int(found[1]), int(found[2])


def abstract_mesh(data: int, model: int) -> AbstractMesh:
    """Makes a mesh without devices, for computations with shapes only (see `make_mesh`)."""
    return AbstractMesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def _fits(mesh: AnyMesh, axis: str | None, size: int) -> str | None:
    return axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None


def _kv_heads_of(path: Path, kv_heads: KVHeads) -> int | None:
    return next((n for above, n in kv_heads.items() if path[: len(above)] == above), None)


def logical_axes(path: Path, ndim: int, axes: Axes) -> tuple[str, ...]:
    """Returns the logical axes of a parameter; none if it is replicated.

    Args:
        path: its Flax path.
        ndim: its number of dimensions.
        axes: the rules of the model (`VisionLanguageModel.axes`).

    Returns:
        One logical axis per dimension, or ().

    Raises:
        ValueError: no rule applies, or the rule has another number of axes.
    """
    module, leaf = ("", *path)[-2:]
    names = (".".join(path[-3:-1]), module, leaf)
    rule = next((axes[name] for name in names if name in axes), None)
    if rule is None:
        raise ValueError(
            f"no sharding rule for {'.'.join(path)}; add {module or leaf!r} to the `axes` of its "
            "model, with () to replicate it"
        )
    if leaf == "bias":
        rule = rule[-1:]
    if len(rule) not in (0, ndim):
        raise ValueError(
            f"{'.'.join(path)} has {ndim} dimensions, but its rule in the `axes` of its model has "
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
    """Returns the sharding of one parameter.

    Args:
        mesh: the mesh.
        path: the parameter's Flax path.
        shape: its shape.
        axes: the rules of the model (`VisionLanguageModel.axes`).
        kv_heads: number of key-value heads of the modules that are sharded by whole heads
            (`VisionLanguageModel.kv_heads`); other modules are sharded by width.

    Returns:
        The sharding.

    Raises:
        ValueError: no rule applies to the parameter.
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
    """Returns a tree with the `param_sharding` of every leaf of a tree of (abstract) parameters."""
    mesh = automatic(mesh)
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(
        {
            path: param_sharding(mesh, path, leaf.shape, axes, kv_heads)
            for path, leaf in flat.items()
        }
    )


def parameter_bytes(params: dict, shardings: dict) -> int:
    """Returns the bytes of (abstract) parameters on each device."""

    def size(leaf: Any, sharding: NamedSharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, params, shardings)))


def batch_sharding(mesh: AnyMesh, shape: tuple[int, ...]) -> NamedSharding:
    """Returns the sharding of an input whose first axis is the batch."""
    first = _fits(mesh, RULES["batch"], shape[0]) if math.prod(shape) else None
    return NamedSharding(mesh, PartitionSpec(first))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a replicated array."""
    return NamedSharding(mesh, PartitionSpec())


def as_returned(where: NamedSharding) -> NamedSharding:
    """Returns the same sharding, written as that of a compiled program's result.

    Results have shardings without mesh axes of one device and without whole dimensions at the end.
    Shardings that are written in two ways differ as static arguments, and JAX looks such arrays up
    as arguments of two programs. What a loop feeds back is therefore placed by this one at first.

    Args:
        where: a sharding whose dimensions have one mesh axis or none.

    Returns:
        The sharding.
    """
    sizes = where.mesh.shape
    spec = [axis if axis and sizes[axis] > 1 else None for axis in where.spec]
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(where.mesh, PartitionSpec(*spec))


def from_slices(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    read: Callable[[Any], np.ndarray],
) -> jax.Array:
    """Makes an array of which each process fills only the shards on its own devices.

    Args:
        shape: shape of the whole array.
        sharding: its sharding.
        read: index into the whole array -> the values there; only called for this process's shards.

    Returns:
        The global array.
    """
    return jax.make_array_from_callback(shape, sharding, read)


def put(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Shards an array that every process holds over the devices of all processes."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    value = np.asarray(value)
    value = value.astype(jax.dtypes.canonicalize_dtype(value.dtype), copy=False)
    return from_slices(value.shape, sharding, lambda index: value[index])


def put_batch(arrays: Mapping[str, np.ndarray], mesh: Mesh | None) -> dict[str, jax.Array]:
    """Returns the inputs of a batch on the devices: rows on the mesh axis "data"."""
    if mesh is None:
        return {name: jnp.asarray(value) for name, value in arrays.items()}
    check_context()
    return {name: put(value, batch_sharding(mesh, value.shape)) for name, value in arrays.items()}


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """Returns small arrays as every process of the mesh holds them; as they are where one is."""
    if mesh is None or replicated(mesh).is_fully_addressable:
        return tree
    return jax.tree.map(lambda leaf: put(np.asarray(leaf), replicated(mesh)), tree)


_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def on(mesh: Mesh | None) -> Iterator[None]:
    """Makes `constrain` shard activations over a mesh while the context is open.

    Use it inside a jitted function with the mesh as a static argument, so that a program traced for
    one mesh is not reused for another.
    """
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains activations to a sharding; does nothing without a mesh (see `on`).

    Dimensions that the mesh axis does not divide evenly are replicated. Left unconstrained, the
    compiler would split heads along their width, and every attention product would end in a sum
    over devices.

    Args:
        x: the activations.
        *axes: one logical axis per dimension; None leaves a dimension to the compiler.

    Returns:
        The same values.
    """
    mesh = _mesh.get()
    if mesh is None:
        return x
    spec = [
        PartitionSpec.UNCONSTRAINED if axis is None else _fits(mesh, RULES[axis], size)
        for axis, size in zip(axes, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def replicate(tree: Any) -> Any:
    """Constrains all arrays of a tree to be whole on each device; without a mesh does nothing."""
    mesh = _mesh.get()
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def is_on_mesh() -> bool:
    """Returns whether a mesh is set (see `on`)."""
    return _mesh.get() is not None


def by_head(
    attend: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *more: jax.Array,
) -> jax.Array:
    """Calls a kernel that the compiler can't divide for the rows and whole heads of each device.

    Args:
        attend: (query, key, value, *more) -> an array like query.
        query: [B, T, H, C].
        key: [B, S, N, C], with H a multiple of N.
        value: [B, S, N, C].
        *more: [B or 1, ...], what each row's queries see.

    Returns:
        The result, with the sharding of `heads`.
    """
    mesh = _mesh.get()
    if mesh is None:
        return attend(query, key, value, *more)
    rows = _fits(mesh, RULES["batch"], len(query))
    spec = PartitionSpec(rows, None, _fits(mesh, RULES["kv_heads"], key.shape[2]))
    own = (PartitionSpec(rows if len(x) == len(query) else None) for x in more)
    specs = (spec, spec, spec, *own)
    call = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return call(query, key, value, *more)


def heads(x: jax.Array, axis: str = "heads") -> jax.Array:
    """Constrains x[B, T, H, C] to be sharded by whole heads; axis: "heads" or "kv_heads"."""
    return constrain(x, "batch", "positions", axis, "embed")


def residual(x: jax.Array) -> jax.Array:
    """Constrains the residual stream x[B, T, D] to be sharded by rows only."""
    return constrain(x, "batch", "positions", "embed")


def whole_width(x: jax.Array) -> jax.Array:
    """Constrains x[..., D] to have all D on each device, as embeddings and as input of a head.

    A table or head whose vocabulary is not evenly divided is sharded along its width. Left
    unconstrained, so would be the states beside it and their gradients, and each consumer would
    gather them for itself.
    """
    return constrain(x, *(None,) * (x.ndim - 1), "embed")


def logits(x: jax.Array) -> jax.Array:
    """Constrains x[..., V] to be sharded by vocabulary, and by rows if it has a batch axis."""
    return _along(x, "vocab")


def whole_vocabulary(x: jax.Array) -> jax.Array:
    """Constrains logits x[..., V] to have all V on each device, for work along the vocabulary.

    A cumulative sum along an axis that devices share is a window as long as the axis, whose cost
    grows with its square.
    """
    return _along(x, "embed")


def _along(x: jax.Array, last: str) -> jax.Array:
    return constrain(x, *(() if x.ndim == 1 else ("batch", *(None,) * (x.ndim - 2))), last)
