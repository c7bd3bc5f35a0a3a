"""Hugging Face checkpoints <-> Flax parameters: one rule, strict in both directions.

Modules are named as in the checkpoint, so a parameter's name follows from its Flax path:
    (..., "layers_3", "q_proj", "kernel") -> "...layers.3.q_proj.weight"
and its layout from the last part of the path:
    kernel of a linear layer       weight (out, in)                -> (in, out)
    kernel of a convolution        weight (out, in, height, width) -> (height, width, in, out)
    kernel over flattened patches  weight (out, in, time, height, width) -> the same with out last
    embedding, scale, bias, other  as stored
Layers that are fused in checkpoints are split and joined (see `ports.names`).
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from ports.checkpoint import fused, orbax_io, quantised, safetensors_io
from ports.messages import few
from ports.names import Rename, by_tensor, tensor_name
from ports.parallel import sharding

_CHECKED_AT_ONCE = 1 << 18  # numbers; small enough for the CPU's cache
_EXPONENTS = {np.dtype(jnp.bfloat16): np.uint16(0x7F80), np.dtype(np.float16): np.uint16(0x7C00)}


def _stored_axes(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    """Returns a parameter's axes in the order in which the checkpoint stores them."""
    if path[-1] != "kernel":
        return tuple(range(ndim))
    return {2: (1, 0), 4: (3, 2, 0, 1), 5: (4, 0, 1, 2, 3)}[ndim]


def to_kernel(weight: np.ndarray) -> np.ndarray:
    """Transposes the stored weight of a linear layer or convolution to a Flax kernel."""
    return weight.transpose(np.argsort(_stored_axes(("kernel",), weight.ndim)))


def abstract_params(module: nn.Module, inputs: Mapping[str, Any]) -> dict:
    """Returns the module's parameters as `jax.ShapeDtypeStruct`s, without allocating anything."""
    return jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]


def untie(module: Any, params: dict, mesh: jax.sharding.Mesh | None) -> dict:
    """Returns the parameters with a head that equals the embeddings; all others are shared.

    Args:
        module: a `VisionLanguageModel` whose head is tied.
        params: its parameters.
        mesh: where they lie.
    """
    flat: dict[Any, Any] = traverse_util.flatten_dict(params)
    table = flat[*module.decoder_path, "embed_tokens", "embedding"]
    path, kernel = (*module.head_path, "kernel"), table.T
    if mesh is not None:
        where = sharding.param_sharding(mesh, path, kernel.shape, module.axes, module.kv_heads)
        kernel = jax.device_put(kernel, where)
    return traverse_util.unflatten_dict(flat | {path: kernel})


def stored_shapes(abstract: dict) -> dict[str, tuple[int, ...]]:
    """Returns {checkpoint name: stored shape} for a tree of (abstract) parameters."""
    shapes = {}
    for path, parts in by_tensor(traverse_util.flatten_dict(abstract)).items():
        leaf, *others = parts.values()
        shape = tuple(leaf.shape[axis] for axis in _stored_axes(path, leaf.ndim))
        if others:  # of a fused layer, whose parts are rows of what is stored
            shape = (shape[0] + sum(part.shape[-1] for part in others), *shape[1:])
        shapes[tensor_name(path)] = shape
    return shapes


def stores_own_head(directory: Path, rename: Rename, tied: Mapping[str, str]) -> bool:
    """Returns whether a checkpoint stores a separate head although its configuration ties it.

    The stored head is then used, as in transformers 5.

    Args:
        directory: a directory with safetensors or Orbax parameters; missing files are ignored.
        rename: name in the file -> the port's name, or None.
        tied: name of the head -> name of the embeddings, if config.json ties them; else empty.

    Returns:
        Whether a head is stored and differs from the embeddings.
    """
    if not tied:
        return False
    if orbax_io.is_saved(directory):
        # A tied head is not written.
        return bool(tied.keys() & {tensor_name(path) for path in orbax_io.shapes(directory)})
    available = safetensors_io.open_available(directory)
    stored = {rename(name): tensor for name, tensor in available.items()}
    return any(
        head in stored and table in stored and not safetensors_io.equal(stored[head], stored[table])
        for head, table in tied.items()
    )


def _match(
    abstract: dict,
    stored: Mapping[str, Any],
    rename: Rename,
    tied: Mapping[str, str],
    where: str,
) -> dict[tuple[str, ...], str]:
    """Returns {Flax path: name in the file}; raises ValueError listing all mismatches."""
    expected = stored_shapes(abstract)
    names: dict[str, str] = {}
    heads: dict[str, str] = {}
    unexpected = []
    for name in stored:
        canonical = rename(name)
        if canonical is None:
            continue
        if canonical in tied:
            heads[tied[canonical]] = name
        elif canonical in expected and canonical not in names:
            names[canonical] = name
        else:
            unexpected.append(name)
    names = heads | names
    missing = sorted(set(expected) - set(names))
    misshapen = [
        f"{names[name]} {tuple(stored[names[name]].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in names and tuple(stored[names[name]].shape) != shape
    ]
    not_floats = [
        f"{name} ({stored[name].dtype.name})"
        for name in names.values()
        if not jnp.issubdtype(stored[name].dtype, jnp.floating)
    ]
    problems = [
        f"{len(found)} {what}: {few(sorted(found))}"
        for what, found in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("with the wrong shape", misshapen),
            ("not floating-point", not_floats),
        )
        if found
    ]
    if problems:
        raise ValueError(
            f"{where} does not hold this model's parameters: {'; '.join(problems)}; check that "
            "config.json belongs to these weights"
        )
    return {path: names[tensor_name(path)] for path in traverse_util.flatten_dict(abstract)}


def load_params(
    directory: Path,
    abstract: dict,
    rename: Rename,
    *,
    dtype: jnp.dtype,
    tied: Mapping[str, str] = MappingProxyType({}),
    shardings: dict | None = None,
    rearrange: Callable[[Mapping[str, Any]], dict[str, Any]] = dict,
) -> dict:
    """Reads a checkpoint into parameters, placing each tensor on its devices as it is read.

    Args:
        directory: a directory with model.safetensors, or an index and its shards.
        abstract: the tree of shapes that the model needs (`abstract_params`).
        rename: name in the file -> the port's name, or None to skip the tensor.
        dtype: dtype of the parameters; stored float16, bfloat16 and float32 are converted.
        tied: port names that may be in the file -> the parameter to fill with them if that is
            missing (a tied head -> the embeddings).
        shardings: a tree like `abstract`; every process reads only the rows of its own devices.
            None puts everything on the default device.
        rearrange: name in the file -> stored tensor, to the same with tensors that are stored in
            other pieces than the parameters (see `ports.checkpoint.fused`).

    Returns:
        A tree like `abstract`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated, names, shapes or kinds of numbers differ, the checkpoint is
            quantised, or a tensor holds NaN or Inf (as stored or in `dtype`).
    """
    stored = quantised.readable(safetensors_io.open_directory(directory), directory)
    stored = rearrange(stored)
    names = _match(abstract, stored, rename, tied, str(directory))
    placed = {} if shardings is None else traverse_util.flatten_dict(shardings)
    params = dict.fromkeys(names)  # in the module's order
    for group in by_tensor(traverse_util.flatten_dict(abstract)).values():
        name = names[next(iter(group))]
        widths = [leaf.shape[-1] for leaf in group.values()] if len(group) > 1 else []
        pieces = fused.split(stored[name], *widths[:-1]) if widths else [stored[name]]
        for path, piece in zip(group, pieces, strict=True):
            axes = _stored_axes(path, len(piece.shape))
            # Wait, so that only one host copy is alive at a time.
            value = _read(name, piece, axes, dtype, placed.get(path))
            params[path] = value.block_until_ready()
    return traverse_util.unflatten_dict(params)


def _read(
    name: str,
    tensor: Any,  # a quantised.Tensor, or a piece of some
    stored_axes: tuple[int, ...],
    dtype: jnp.dtype,
    where: jax.sharding.Sharding | None,
) -> jax.Array:
    """Reads a stored tensor onto its devices, with its axes in the parameter's order."""
    axes = np.argsort(stored_axes)

    def converted(values: np.ndarray) -> np.ndarray:
        # No unneeded copies: they would fragment the heap between the parameters.
        with np.errstate(over="ignore"):
            values = values.astype(dtype, copy=False)
        if not is_finite(values):
            raise ValueError(
                f"{tensor.file}: tensor {name!r} holds NaN or Inf as {np.dtype(dtype).name}; "
                "download the file again, or load it as bfloat16 or float32"
            )
        return values

    if where is None:
        return jax.device_put(converted(tensor.read()).transpose(axes))
    shape = tuple(tensor.shape[axis] for axis in axes)
    if not shape:
        return sharding.put(converted(tensor.read()), where)
    # Rows of the stored tensor are contiguous in the file: read only those of this process.
    rows = stored_axes[0]
    spans = [
        index[rows].indices(shape[rows])[:2]
        for index in where.addressable_devices_indices_map(shape).values()
        if index is not None
    ]
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    value = converted(tensor.read((first, last))).transpose(axes)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, end, _ = index[rows].indices(shape[rows])
        own = (*index[:rows], slice(start - first, end - first), *index[rows + 1 :])
        return value[own]

    return sharding.from_slices(shape, where, part)


def is_finite(values: np.ndarray) -> bool:
    """Returns whether a contiguous array of floats is free of NaN and Inf."""
    flat = values.reshape(-1)
    # numpy's test is slow for 16-bit floats: in Inf and NaN all bits of the exponent are set.
    bits = flat.view(np.uint16) if flat.dtype in _EXPONENTS else None
    for start in range(0, flat.size, _CHECKED_AT_ONCE):
        here = slice(start, start + _CHECKED_AT_ONCE)
        if bits is None:
            good = np.isfinite(flat[here]).all()
        else:
            exponent = _EXPONENTS[flat.dtype]
            good = not ((bits[here] & exponent) == exponent).any()
        if not good:
            return False
    return True


def fingerprint(directory: Path) -> str:
    """Returns a digest that identifies a checkpoint.

    It covers config.json and the size, start and end of every weight file that is loaded, since
    reading a large checkpoint in full would take as long as loading it. For parameters in Orbax's
    format (`orbax_io`) it is the fingerprint of the converted checkpoint.

    Args:
        directory: the checkpoint.

    Returns:
        16 hexadecimal digits.

    Raises:
        ValueError: the record of parameters in Orbax's format is missing or damaged.
    """
    if orbax_io.is_saved(directory):
        return orbax_io.read_record(directory)["fingerprint"]
    digest = hashlib.sha256()
    for file in sorted([directory / "config.json", *safetensors_io.available_files(directory)]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def stored_tensors(params: dict, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (checkpoint name, tensor in the stored layout) for each parameter."""
    for path, parts in by_tensor(traverse_util.flatten_dict(params)).items():
        arrays = [
            np.asarray(leaf).transpose(_stored_axes(path, leaf.ndim)).astype(dtype)
            for leaf in parts.values()
        ]
        yield tensor_name(path), arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def save_params(params: dict, directory: Path, *, dtype: Any = np.float32) -> None:
    """Writes parameters to `model.safetensors` in a directory, with the Hub's names."""
    directory.mkdir(parents=True, exist_ok=True)
    safetensors_io.write_file(
        directory / "model.safetensors", dict(stored_tensors(params, np.dtype(dtype)))
    )
