"""The kernels of `xlvlm_jax.solvers.tpu`: do they fit, and how many cycles do they take.

The cycles are those of the bundles that libtpu writes, with every branch, see `bundles`; and those
of reading Z once at the chip's bandwidth, which no program can stay under.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.table import Table

from benchmarks.tpu import bundles
from benchmarks.tpu.chips import Place
from benchmarks.tpu.solver_cases import D, M
from xlvlm_jax.solvers.linalg import matmul
from xlvlm_jax.solvers.tpu import clusters, codes

SWEEPS = 2


class Kernel(NamedTuple):
    """A kernel for K concepts."""

    name: str  # as libtpu writes it
    build: Callable[[Callable[..., Any], int], tuple[Callable[..., Any], tuple[Any, ...]]]
    concepts: tuple[int, ...]


def _assign(weighted: bool) -> Callable[..., Any]:
    def build(array: Callable[..., Any], K: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        def run(*arguments: Any) -> Any:
            return clusters.assign(*arguments, are_ones=not weighted)

        return run, (array(M, D), array(K, D), array(D), array(K), array(M))

    return build


def _improve(array: Callable[..., Any], K: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def run(Z: Any, energy: Any, start: Any, atoms: Any, alpha: Any) -> Any:
        return codes.improve(Z, energy, start, atoms, matmul(atoms, atoms.T), alpha, SWEEPS)

    return run, (array(M, D), array(M), array(K, M), array(K, D), array())


KERNELS = {
    "k-means": Kernel("nearest_centroids", _assign(False), (20, 128, 512)),
    "k-means with weights": Kernel("nearest_centroids", _assign(True), (20,)),
    "semi-NMF": Kernel("codes_and_sums", _improve, (20, 64)),
}


def measure(places: list[Place], folder: Path) -> Iterator[dict[str, Any]]:
    """Compiles all kernels for all chips.

    Args:
        places: single devices.
        folder: where libtpu writes what it compiles, see `bundles.dump_to`.

    Raises:
        ValueError: a place has more than one device.
    """
    for place in places:
        if place.mesh is not None:
            raise ValueError(
                f"a kernel runs on each device alone, {place.name} has {len(place.devices)}; "
                f"choose {place.name.partition(':')[0]}:1"
            )
    for place in places:
        for name, kernel in KERNELS.items():
            for K in kernel.concepts:
                row = {"program": name, "devices": place.name, "K": K}
                yield row | _measured(kernel, K, place, folder)


def _measured(kernel: Kernel, K: int, place: Place, folder: Path) -> dict[str, Any]:
    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return place.abstract(shape, jnp.float32)

    function, arguments = kernel.build(array, K)
    bundles.clear(folder)  # of what was compiled before, even if that failed
    try:
        jax.jit(function).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        return {"broken": [str(error).strip().splitlines()[0]]}
    outer = bundles.of_kernel(folder, kernel.name)
    return {
        "cycles of a block": outer.of_step,
        "cycles": outer.cycles,
        "cycles of one read": round(M * D * 4 / place.chip.bandwidth * place.chip.hertz),
        "broken": [],
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Returns what is printed of the results."""
    shown = Table("kernel", "K", "chip", "M cycles", "M cycles of a read", "ratio")
    for row in rows:
        first = (row["program"], str(row["K"]), row["devices"])
        if row["broken"]:
            shown.add_row(*first, row["broken"][0])
            continue
        cycles, least = row["cycles"], row["cycles of one read"]
        shown.add_row(
            *first, f"{cycles / 1e6:.2f}", f"{least / 1e6:.2f}", f"{max(cycles / least, 1):.2f}"
        )
    return shown
