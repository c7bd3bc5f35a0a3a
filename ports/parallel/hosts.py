"""Several hosts as one run: joins JAX's processes (`jax.distributed`) and broadcasts values.

Every host runs the same command. Hosts are numbered from 0; host 0 reports for all.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from ports.parallel import sharding


def join(address: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Makes this process one of several hosts; must be called before any other use of JAX.

    Args:
        address: address of host 0, "HOST:PORT"; None if the cluster provides it (TPU pods, Slurm,
            MPI).
        count: number of hosts; None if the cluster provides it.
        index: number of this host; None if the cluster provides it.

    Raises:
        ValueError: the arguments do not fit together, or the hosts can't connect.
    """
    given = (address, count, index)
    if any(value is None for value in given) and any(value is not None for value in given):
        raise ValueError(
            f"got address {address}, {count} hosts, index {index}; expected all three, or none if "
            "the cluster provides them"
        )
    if count is not None and index is not None and not 0 <= index < count:
        raise ValueError(f"host index is {index}; expected 0 to {count - 1} for {count} hosts")
    try:
        jax.distributed.initialize(address, count, index)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        if address is None:
            raise ValueError(
                f"the cluster does not provide the hosts ({first}); start on a TPU pod slice, with "
                "Slurm or with MPI, or give ADDRESS:PORT,COUNT,INDEX"
            ) from error
        raise ValueError(
            f"the hosts can't connect ({first}); give each one the address of host 0, the number "
            "of hosts and its own index"
        ) from error


def is_first() -> bool:
    """Returns whether this is host 0, or the only host."""
    return jax.process_index() == 0


def span(mesh: Mesh | None) -> bool:
    """Returns whether the mesh has devices of several hosts, which then compute in step."""
    return mesh is not None and not sharding.replicated(mesh).is_fully_addressable


def readable(tree: Any, mesh: Mesh | None) -> Any:
    """Makes what was computed on a mesh of several hosts readable on each of them.

    All hosts must call it. It does not wait for the arrays to be computed.

    Args:
        tree: arrays; those of the mesh are copied to each of its devices, those of this host alone
            become numpy arrays, which a program on the mesh takes too.
        mesh: the mesh; if it is within one host, nothing changes.

    Returns:
        A tree like `tree`.
    """
    if mesh is None or not span(mesh):
        return tree
    copy = _copier(sharding.replicated(mesh))

    def one(leaf: Any) -> Any:
        is_global = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        return copy(leaf) if is_global else np.asarray(leaf)

    return jax.tree.map(one, tree)


@functools.cache  # so that a shape is compiled once, and not in every batch
def _copier(whole: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=whole)


def tell(value: Any) -> Any:
    """Broadcasts host 0's value to every host; all hosts must call it, and wait for the slowest.

    Args:
        value: a JSON value; ignored except on host 0.

    Returns:
        Host 0's value.
    """
    if jax.process_count() == 1:
        return value
    content = np.frombuffer(json.dumps(value).encode() if is_first() else b"", np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(length, np.uint8)
    padded[: len(content)] = content
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
