"""The solvers' programs: whole solves, one update, and one update of a tile of rows from disk.

N rows in all, M per device, D width, K concepts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.tpu.cases import Built, Case
from benchmarks.tpu.chips import Place
from benchmarks.tpu.hlo import Array
from xlvlm_jax.solvers import kmeans, pca, phases, semi_nmf, semi_nmf_atoms
from xlvlm_jax.solvers.streamed import kmeans as streamed_kmeans
from xlvlm_jax.solvers.streamed import pca as streamed_pca
from xlvlm_jax.solvers.streamed import semi_nmf as streamed_semi_nmf
from xlvlm_jax.solvers.streamed.tiles import TILE_BYTES
from xlvlm_jax.solvers.sums import Wide
from xlvlm_jax.solvers.tpu import clusters, codes

M, D, K = 100_352, 4096, 20
MANY, ROWS_OF_MANY = 16_384, 262_144
METHODS: dict[str, Any] = {"semi-nmf": semi_nmf, "kmeans": kmeans, "pca": pca}
# How often an update reads Z: once for the assignment or codes, once for the sums; or a kernel does
# both.
READS, READS_OF_KERNEL = 2.0, 1.0
KERNELS: dict[str, Any] = {"semi-nmf": codes, "kmeans": clusters}


def _row_bytes(method: str, num_concepts: int, rows: int) -> float:
    """Returns the bytes per row that an update may allocate."""
    if method == "pca":
        # Coordinates along the axes, before and after, and along the blocks; those of one block.
        blocks = pca.blocks_for(num_concepts, rows, D)
        return 4.0 * (2 * blocks.kept + (blocks.more + 1) * blocks.width)
    if method == "semi-nmf":
        # The codes, three times, and what loops carry of them, which is counted twice; a TPU's rows
        # of an array are filled up to a multiple of eight.
        return 4.0 * 5 * (-(-num_concepts // 8) * 8)
    return 0.0


def _matrix(place: Place, rows: int) -> jax.ShapeDtypeStruct:
    return place.abstract((rows * place.data, D), jnp.float32, "data")


def _reads(method: str, rows: int, num_concepts: int) -> float:
    local = jax.ShapeDtypeStruct((rows, D), jnp.float32)
    if method == "pca":
        return READS * pca.blocks_for(num_concepts, rows, D).more  # for each block
    takes = method in KERNELS and KERNELS[method].takes(local, num_concepts)
    return READS_OF_KERNEL if takes else READS


def _planned(method: str, place: Place, N: int, num_concepts: int) -> tuple[Any, Any]:
    key = jax.random.key(0)
    plan, given = METHODS[method].plan(
        key, width=D, num_samples=N, num_concepts=(num_concepts,), max_iter=100
    )
    return plan, place.like(given)


def solve(method: str, num_concepts: int, rows: int, place: Place, times: int) -> Built:
    """A whole solve, as `decompose` runs it."""
    Z = _matrix(place, rows * times)
    plan, given = _planned(method, place, len(Z.shape) and Z.shape[0], num_concepts)

    def run(Z: jax.Array, given: Any) -> Any:
        return phases.at_once(plan, given, Z, place.mesh)

    shape = Array("f32", (rows * times, D))
    return Built(run, (Z, given), matrix=shape)


def update(method: str, num_concepts: int, rows: int, place: Place, times: int) -> Built:
    """The updates on all of Z: a loop, so that figures are those of one."""
    Z = _matrix(place, rows * times)
    plan, carry = _planned(method, place, Z.shape[0], num_concepts)
    limit = place.abstract((), jnp.int32)
    repeated = max(index for index, phase in enumerate(plan.phases) if phase.repeats)
    for index in range(repeated):
        run = partial(phases.run_phase, plan, index, place.mesh)
        # On a mesh each device has its own.
        carry = place.like(jax.eval_shape(run, Z, carry, limit), "data")

    def improve(Z: jax.Array, carry: Any, limit: jax.Array) -> Any:
        return phases.run_phase(plan, repeated, place.mesh, Z, carry, limit).progress

    reads = _reads(method, rows * times, num_concepts)
    shape, row_bytes = Array("f32", (rows * times, D)), _row_bytes(method, num_concepts, rows)
    return Built(improve, (Z, carry, limit), matrix=shape, reads=reads, row_bytes=row_bytes)


def tile_update(method: str, place: Place, times: int) -> Built:
    """What an update computes from one tile of a stored Z; one device."""
    del times
    B, f32 = TILE_BYTES // (4 * D), jnp.float32

    def array(*shape: int) -> Any:
        return place.abstract(shape, f32)

    Z, real, mean = array(B, D), array(B), array(D)
    arguments: tuple[Any, ...]
    if method == "semi-nmf":
        state = place.like(jax.eval_shape(semi_nmf_atoms.begin, array(K, D), array()))
        arguments = (Z, array(B), array(B, K), state, array())
        run: Callable[..., Any] = partial(streamed_semi_nmf.collect, nonnegative=True)
    elif method == "kmeans":
        arguments, run = (Z, real, mean, array(K, D)), streamed_kmeans.collect
    else:
        arguments = (Z, real, Wide(mean, mean), array(D, pca.num_axes(K)))
        run = streamed_pca.collect
    # K-means' tiles are centred before, and their energy is needed too.
    reads = _reads(method, B, K) if method == "semi-nmf" else READS
    return Built(run, arguments, matrix=Array("f32", (B, D)), reads=reads)


SOLVER_CASES = [
    *(Case(f"{method} solve", partial(solve, method, K, M)) for method in METHODS),
    Case("semi-nmf update", partial(update, "semi-nmf", K, M)),
    Case("kmeans update", partial(update, "kmeans", K, M)),
    # With four times the rows, overlaps are added up in a loop over blocks of coordinates.
    Case("pca update", partial(update, "pca", K, M), times=(2, 4)),
    *(Case(f"{method} tile", partial(tile_update, method)) for method in METHODS),
    Case("kmeans 16384 update", partial(update, "kmeans", MANY, ROWS_OF_MANY)),
    Case("semi-nmf 1024 update", partial(update, "semi-nmf", 1024, M)),
    Case("pca 50 update", partial(update, "pca", 50, M)),
]
