"""Described TPUs, for which programs are compiled without one."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from ports.parallel import sharding

# libtpu asks the machine which TPU it is, unless this says so, and lets one process alone use it.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
GIB = 2**30


class Chip(NamedTuple):
    """A kind of TPU, by its data sheet."""

    memory: float  # bytes that a program may use
    bandwidth: float  # bytes a second
    hertz: float


# v5e's 16 GiB less what the runtime keeps, as its compiler says; the others in proportion.
CHIPS = {
    "v5e": Chip(15.75 * GIB, 819e9, 1.5e9),
    "v5p": Chip(94.75 * GIB, 2765e9, 1.75e9),
    "v6e": Chip(31.25 * GIB, 1640e9, 1.75e9),
}


class Place(NamedTuple):
    """Devices that a program is compiled for: a mesh, or one device without."""

    name: str  # such as "v5e:2x2"
    chip: Chip
    devices: tuple[Any, ...]
    mesh: Mesh | None

    def abstract(self, shape: Sequence[int], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        """Returns an argument of this shape, with a mesh axis or None per leading dimension."""
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=self.sharding(*axes))

    def sharding(self, *axes: str | None) -> jax.sharding.Sharding:
        """Returns the sharding with these mesh axes."""
        if self.mesh is None:
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def like(self, tree: Any, *axes: str | None) -> Any:
        """Returns abstract arguments for a tree of arrays or shapes."""

        def one(leaf: Any) -> jax.ShapeDtypeStruct:
            leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
            return self.abstract(leaf.shape, leaf.dtype, *axes)

        return jax.tree.map(one, tree)

    @property
    def data(self) -> int:
        """Number of groups that rows are divided among."""
        return 1 if self.mesh is None else self.mesh.shape["data"]


def is_installed() -> bool:
    """Returns whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def place(topology: str, data: int | None = None, model: int = 1) -> Place:
    """Describes the devices of a topology.

    Args:
        topology: chip and shape, such as "v5e:2x2"; "v5e:1" is one device.
        data: devices along the mesh axis "data"; None for all.
        model: devices along "model".

    Raises:
        ValueError: libtpu does not know the topology, or the mesh has another number of devices.
    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS:
        raise ValueError(f"topology {topology!r} is of no chip in {', '.join(CHIPS)}; try v5e:2x2")
    smallest = "2x2x1" if kind == "v5p" else "2x2"
    devices = _devices(topology if shape not in ("", "1") else f"{kind}:{smallest}", topology)
    if shape in ("", "1"):
        devices = devices[:1]
    data = len(devices) // model if data is None else data
    if data * model != len(devices):
        raise ValueError(
            f"mesh {data}x{model} has {data * model} devices, {topology} has {len(devices)}; "
            "choose sizes whose product is that"
        )
    mesh = None if len(devices) == 1 else sharding.make_mesh(data, model, devices)
    return Place(topology, CHIPS[kind], tuple(devices), mesh)


def _devices(topology: str, asked: str) -> list[Any]:
    from jax.experimental import topologies

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"libtpu does not know topology {asked!r}: {why}") from None


@contextlib.contextmanager
def as_on_tpu() -> Iterator[None]:
    """Makes code that asks for the default backend choose what it would on a TPU."""
    jax.clear_caches()  # of functions traced for this machine
    with mock.patch("jax.default_backend", return_value="tpu"):
        yield
    jax.clear_caches()
