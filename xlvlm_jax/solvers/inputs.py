"""Checks of what a caller gives a solver, and where it is placed.

Every complaint is one line: what was expected, what came, what to do.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped


@runtime_checkable
class StoredMatrix(Protocol):
    """Rows that are read when they are wanted, of bfloat16, float16 or float32."""

    shape: tuple[int, int]

    def read(self, start: int, stop: int) -> Shaped[np.ndarray, "B D"]:
        """The rows from `start` up to `stop`."""
        ...


def check_number(name: str, value: Any, lowest: int) -> None:
    """Raise ValueError unless value is a finite number of at least `lowest`."""
    if not isinstance(value, int | float | np.number) or not lowest <= value < np.inf:
        raise ValueError(f"{name} must be a finite number of at least {lowest}; got {value!r}")


def check_whole(name: str, value: Any, lowest: int) -> None:
    """Raise ValueError unless value is a whole number of at least `lowest`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < lowest:
        raise ValueError(f"{name} must be a whole number of at least {lowest}; got {value!r}")


def check_num_concepts(num_concepts: Any, N: int, D: int, method: str) -> None:
    """Raise ValueError unless the method finds that many concepts in Z[N, D]."""
    check_whole("num_concepts", num_concepts, 1)
    if num_concepts > N:
        raise ValueError(
            f"num_concepts={num_concepts} is larger than the {N} rows of Z; "
            "ask for fewer concepts or give more samples"
        )
    if method == "pca" and num_concepts > D:
        raise ValueError(
            f"num_concepts={num_concepts} is larger than min(N, D) = {D}, the number of principal "
            "components that Z has; ask for fewer or use 'snmf'"
        )


def as_matrix(Z: Any, name: str, row: str) -> Array:
    """What the caller gave as a JAX matrix of bfloat16, float16 or float32."""
    if not isinstance(Z, jax.Array):
        Z = np.asarray(Z)
    if Z.ndim != 2:
        raise ValueError(f"{name} must be a matrix with one row a {row}; got shape {Z.shape}")
    if Z.shape[1] == 0:
        raise ValueError(f"{name} has no columns; got shape {Z.shape}")
    floating = jnp.issubdtype(Z.dtype, jnp.floating)
    if not (floating or jnp.issubdtype(Z.dtype, jnp.integer)):
        raise ValueError(
            f"{name} must hold real numbers; got {Z.dtype}, convert it to float32 first"
        )
    if not floating or Z.dtype.itemsize > 4:
        # A float64 beyond float32's range becomes Inf here, which the check of the rows then names.
        with np.errstate(over="ignore"):
            Z = Z.astype(np.float32)
    return jnp.asarray(Z)


def check_finite(Z: Shaped[Array, "N D"], name: str) -> None:
    """Raise ValueError that names the first row with NaN or Inf, if there is one."""
    # Both numbers are on every host.
    count, first = map(int, _bad_rows(Z))
    if count:
        others = f" (and {count - 1} more rows)" if count > 1 else ""
        raise ValueError(
            f"{name} has NaN or Inf in row {first}{others}, or values beyond float32; "
            "drop such rows or mend what wrote them"
        )


@jax.jit
def _bad_rows(Z: Shaped[Array, "N D"]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """How many rows are not finite, and the first of them."""
    # The largest value of a row is what a CPU finds in one pass; NaN is larger than any.
    bad = ~jnp.isfinite(jnp.max(jnp.abs(Z), axis=1))
    return jnp.sum(bad), jnp.min(jnp.arange(len(Z)), where=bad, initial=len(Z))


def read_rows(source: StoredMatrix, mesh: Mesh | None) -> Shaped[Array, "M D"]:
    """The rows of a source on the device, or on the mesh's "data" axis with zero rows at the end.

    Each device's rows are read by the host that it belongs to, and by no other.
    """
    N, D = source.shape
    if mesh is None:
        return jnp.asarray(source.read(0, N))
    rows = N + -N % _data_axis(mesh)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(rows)
        values = source.read(min(start, N), min(stop, N))
        return np.pad(values, ((0, stop - start - len(values)), (0, 0)))

    sharding = NamedSharding(mesh, PartitionSpec("data", None))
    return jax.make_array_from_callback((rows, D), sharding, part)


def shard_rows(Z: Shaped[Array, "N D"], mesh: Mesh) -> Shaped[Array, "M D"]:
    """Z on the mesh's "data" axis, with as many zero rows at the end as the axis needs."""
    missing = -Z.shape[0] % _data_axis(mesh)
    if missing:
        if not Z.is_fully_addressable:
            raise ValueError(
                f"the {Z.shape[0]} rows of Z are on several hosts and do not divide over "
                f"{mesh.shape['data']} devices; drop or repeat some"
            )
        Z = jnp.pad(Z, ((0, missing), (0, 0)))
    sharding = NamedSharding(mesh, PartitionSpec("data", None))
    return Z if Z.sharding == sharding else jax.device_put(Z, sharding)


def _data_axis(mesh: Mesh) -> int:
    """How many devices the mesh's "data" axis has."""
    if "data" not in mesh.axis_names:
        raise ValueError(
            f"mesh has no axis 'data' to shard rows on, only {', '.join(mesh.axis_names)}; "
            "make it with jax.make_mesh((n,), ('data',))"
        )
    return mesh.shape["data"]
