"""Parameters as an Orbax checkpoint, of which each host writes and reads only its own shards.

In addition to config.json and the processor's files, the model's directory then holds

    params/      the tree of parameters, arrays in chunks of a few megabytes
    params.json  {"format", "version", "dtype", "fingerprint"}; the fingerprint is that of the
                 checkpoint that was converted
"""

import functools
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from ports.messages import few
from ports.names import by_tensor

FORMAT, VERSION = "ports parameters", 1
PARAMS, RECORD = "params", "params.json"
# Small enough that a host which needs 1/8 of an array reads little more; large enough to keep the
# number of files low.
_CHUNK_BYTES = 4 << 20
# How much Orbax copies at a time; it must not hold a second copy of the model in memory.
_CONCURRENT_GB = 1


def is_saved(directory: Path) -> bool:
    """Returns whether a directory holds parameters in this format, damaged or not.

    A file params.json alone may be of another format: Mistral's repositories have one.
    """
    if (directory / PARAMS).is_dir():
        return True
    try:
        record = json.loads((directory / RECORD).read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and record.get("format") == FORMAT


def read_record(directory: Path) -> dict[str, Any]:
    """Reads params.json.

    Args:
        directory: the model's directory.

    Returns:
        Its values.

    Raises:
        ValueError: the file is missing, damaged or has another version.
    """
    file = directory / RECORD
    again = f"convert the checkpoint again (expected {FORMAT!r}, version {VERSION})"
    try:
        record = json.loads(file.read_text())
        said = record["format"], record["version"]
        jnp.dtype(record["dtype"])
        complete = isinstance(record["fingerprint"], str)
    except FileNotFoundError:
        raise ValueError(f"{directory} has {PARAMS} without {RECORD}; {again}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{file} is damaged; {again}") from None
    # In Python, 1.0 and True equal 1.
    if said != (FORMAT, VERSION) or type(said[1]) is not int or not complete:
        raise ValueError(f"{file} has format {said[0]!r}, version {said[1]!r}; {again}")
    return record


def save(params: dict, directory: Path, fingerprint: str) -> None:
    """Writes parameters in their dtype, then the record params.json.

    Must be called by all processes that share the parameters.

    Args:
        params: the tree of parameters.
        directory: the model's directory.
        fingerprint: the fingerprint of the checkpoint that the parameters come from.
    """
    import orbax.checkpoint as ocp

    directory = directory.absolute()
    options = jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params)
    with _quiet(), ocp.Checkpointer(_handler()) as checkpointer:
        arguments = ocp.args.PyTreeSave(params, save_args=options)
        checkpointer.save(directory / PARAMS, args=arguments)
    if jax.process_index() == 0:
        dtype = jax.tree.leaves(params)[0].dtype.name
        record = {"format": FORMAT, "version": VERSION, "dtype": dtype, "fingerprint": fingerprint}
        (directory / RECORD).write_text(json.dumps(record) + "\n")


def restore(directory: Path, abstract: dict, dtype: jnp.dtype, shardings: dict | None) -> dict:
    """Reads parameters onto their devices; each host reads only its own shards.

    Args:
        directory: a directory written by `save`.
        abstract: the tree of shapes that the model needs.
        dtype: dtype that the parameters are converted to.
        shardings: a tree like `abstract`; None puts everything on the first device.

    Returns:
        The tree of parameters.

    Raises:
        ValueError: the parameters are damaged, missing, of another version or of another model.
    """
    import orbax.checkpoint as ocp

    read_record(directory)
    where = directory.absolute() / PARAMS
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda leaf: first, abstract) if shardings is None else shardings
    placed = _flat(shardings)
    wanted = {path: _Wanted(tuple(x.shape), placed[path]) for path, x in _flat(abstract).items()}
    found = shapes(directory)
    # Version 0.1.0 wrote fused layers whole.
    groups = {path: parts for path, parts in by_tensor(wanted).items() if len(parts) > 1}
    split = {path: parts for path, parts in groups.items() if path in found}
    for path, parts in split.items():
        wanted = {name: each for name, each in wanted.items() if name not in parts}
        wanted[path] = _whole(list(parts.values()))
    expected = {path: each.shape for path, each in wanted.items()}
    if found != expected:
        wrong = sorted({path for path, _ in set(found.items()) ^ set(expected.items())})
        raise ValueError(
            f"{where} does not hold this model's parameters; missing, unexpected or wrong shape: "
            f"{few('.'.join(path) for path in wrong)}; convert the checkpoint again"
        )
    tree = {path: jax.ShapeDtypeStruct(each.shape, dtype) for path, each in wanted.items()}
    arguments = {
        path: ocp.ArrayRestoreArgs(dtype=dtype, sharding=each.sharding, global_shape=each.shape)
        for path, each in wanted.items()
    }
    with _quiet(), ocp.Checkpointer(_handler()) as checkpointer, _one_line(where):
        restored = checkpointer.restore(
            where,
            args=ocp.args.PyTreeRestore(
                traverse_util.unflatten_dict(tree),
                restore_args=traverse_util.unflatten_dict(arguments),
            ),
        )
    flat = _flat(restored)
    del restored  # the tree would keep every fused array until all are split
    for path, parts in split.items():
        flat |= zip(parts, _split(flat.pop(path), list(parts.values())), strict=True)
    return traverse_util.unflatten_dict(flat)


class _Wanted(NamedTuple):
    """Shape and place of a parameter."""

    shape: tuple[int, ...]
    sharding: jax.sharding.Sharding


def _whole(parts: list[_Wanted]) -> _Wanted:
    """Returns shape and place of a fused layer's kernel or bias, from its parts."""
    *before, _ = parts[0].shape
    shape = (*before, sum(part.shape[-1] for part in parts))
    # By columns if the devices divide those of all parts.
    where = next((x for _, x in parts if x.is_fully_replicated), parts[0].sharding)
    return _Wanted(shape, where)


def _split(array: jax.Array, parts: list[_Wanted]) -> list[jax.Array]:
    """Splits a fused layer's kernel or bias by columns, each part to its place."""
    ends = tuple(itertools.accumulate(part.shape[-1] for part in parts))[:-1]
    return _splitter(ends, tuple(part.sharding for part in parts))(array)


# One function for all layers, so that jit compiles it once for each shape.
@functools.lru_cache
def _splitter(
    ends: tuple[int, ...], places: tuple[jax.sharding.Sharding, ...]
) -> Callable[[jax.Array], list[jax.Array]]:
    def split(array: jax.Array) -> list[jax.Array]:
        return jnp.split(array, ends, axis=-1)

    return jax.jit(split, out_shardings=list(places))


def shapes(directory: Path) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns {path in the tree: shape} of the parameters that `save` wrote.

    Raises:
        ValueError: the files are damaged.
    """
    import orbax.checkpoint as ocp

    where = directory.absolute() / PARAMS
    with _quiet(), ocp.Checkpointer(_handler()) as checkpointer, _one_line(where):
        stored = checkpointer.metadata(where).item_metadata.tree
        return {path: tuple(leaf.shape) for path, leaf in _flat(stored).items()}


def _flat(tree: Any) -> dict[tuple[str, ...], Any]:
    return traverse_util.flatten_dict(tree)


def _handler() -> Any:
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=_CONCURRENT_GB, restore_concurrent_gb=_CONCURRENT_GB
    )


@contextmanager
def _one_line(where: Path) -> Iterator[None]:
    """Turns any error while the arrays are read into a one-line ValueError."""
    try:
        yield
    except Exception as error:  # Orbax and tensorstore raise many kinds of errors
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{where} is damaged or incomplete ({first[:200]}); convert the checkpoint again"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Orbax's log, which reports every step."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
