"""Checks of what a caller gives a solver, and where it is placed.

Every complaint is one line: what was expected, what came, what to do.
"""

import os
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped
from typing_extensions import TypeIs

from xlvlm_jax.solvers import (
    sums,
)
from xlvlm_jax.solvers.linalg import real_dtype

BLOCK_ROWS = 2**14  # of a matrix in float64 that are converted together
# Where |Z|^2 is in between, products of two sums of squares have a place in float32.
LEAST, MOST = 2.0**-20, 2.0**60


@runtime_checkable
class StoredMatrix(Protocol):
    """Rows that are read when they are wanted, of bfloat16, float16 or float32."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        ...

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


def check_num_concepts(num_concepts: Any, N: int) -> None:
    """Raises ValueError unless there can be that many concepts of N rows."""
    check_whole("num_concepts", num_concepts, 1)
    if num_concepts > N:
        raise ValueError(
            f"num_concepts={num_concepts} is larger than the {N} rows of Z; "
            "ask for fewer concepts or give more samples"
        )


def check_weights(weights: Any, N: int) -> tuple[Float[Array | np.ndarray, " N"], float]:
    """Weights of N rows in units of a power of two near the largest, and that unit.

    Raises:
        ValueError: they are not N finite numbers of at least zero, or all are zero.
    """
    if isinstance(weights, Tracer):
        return weights, 1.0
    weights = np.asarray(weights, np.float64)
    if weights.shape != (N,):
        raise ValueError(
            f"sample_weight must have shape ({N},), a number for each row; got {weights.shape}"
        )
    bad = np.flatnonzero(~((weights >= 0) & np.isfinite(weights)))
    if bad.size:
        raise ValueError(
            "sample_weight must hold finite numbers of at least zero; "
            f"got {weights[bad[0]]} for row {bad[0]}"
        )
    if not weights.any():
        raise ValueError("sample_weight is zero for all rows; give at least one row some weight")
    unit = 2.0 ** np.floor(np.log2(weights.max()))
    return weights / unit, float(unit)


def is_stored(Z: Any) -> TypeIs[StoredMatrix]:
    """Whether Z reads rows when they are wanted. A TensorStore, which also reads, is an array."""
    return isinstance(Z, StoredMatrix) and _module(Z) != "tensorstore"


def as_matrix(Z: Any, name: str, row: str) -> Array | np.ndarray:
    """What the caller gave as a matrix of real numbers, of JAX or numpy.

    numpy.float64 is what float32 may not hold, for `centred` or `short`; all else is JAX's, of
    bfloat16, float16, float32, or float64 where that is switched on.

    Raises:
        TypeError: it is not an array of numbers; the type is named.
        ValueError: it has another shape, or numbers that are not real.
    """
    Z = _as_array(Z, name, row)
    if Z.ndim != 2:
        raise ValueError(f"{name} must be a matrix with one row a {row}; got shape {Z.shape}")
    if Z.shape[1] == 0:
        raise ValueError(f"{name} has no columns; got shape {Z.shape}")
    floating = jnp.issubdtype(Z.dtype, jnp.floating)
    if not (floating or jnp.issubdtype(Z.dtype, jnp.integer)):
        raise ValueError(
            f"{name} must hold real numbers; got {Z.dtype}, convert it to float32 first"
        )
    if isinstance(Z, Tracer):
        return Z.astype(real_dtype(Z)) if not floating or Z.dtype.itemsize < 2 else Z
    if floating and Z.dtype.itemsize in (2, 4):
        return jnp.asarray(Z)
    if floating and Z.dtype.itemsize < 2:
        return jnp.asarray(Z.astype(np.float32))
    wide = np.asarray(Z).astype(np.float64, copy=False)
    return jnp.asarray(wide) if jax.config.values["jax_enable_x64"] else wide


def _as_array(Z: Any, name: str, row: str) -> Array | np.ndarray:
    """An array of JAX's or numpy's, in this machine's byte order."""
    if isinstance(Z, jax.Array):
        return Z
    module, hint, given = _module(Z), "", Z
    if Z is None or isinstance(Z, str | bytes | os.PathLike):
        hint = "load it first"
    elif hasattr(Z, "toarray"):
        hint = "call its toarray()"
    elif isinstance(Z, np.ma.MaskedArray):
        hint = "fill what is masked, or drop these rows"
    if not hint:
        try:
            if module == "torch":
                tensor = given.detach().cpu().contiguous()
                # numpy has no bfloat16 of its own to give.
                is_short = "bfloat16" in str(tensor.dtype)
                return jax.dlpack.from_dlpack(tensor) if is_short else tensor.numpy()
            array = np.asarray(given)
            if array.dtype == object and hasattr(given, "to_numpy"):
                # pandas' own number types
                array = given.to_numpy(dtype=np.float64, na_value=np.nan)
            if array.dtype != object:
                return array.astype(array.dtype.newbyteorder("="), copy=False)
            hint = "convert it with numpy.asarray"
        except Exception as error:
            hint = f"numpy.asarray says: {(str(error).splitlines() or ['nothing'])[0]}"
    kind = type(Z).__name__ if module == "builtins" else f"{module}.{type(Z).__name__}"
    raise TypeError(f"{name} must be an array of numbers with one row a {row}; got {kind}: {hint}")


def _module(value: Any) -> str:
    return type(value).__module__.split(".")[0]


def short(Z: Shaped[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """A float64 matrix as float32."""
    # A float64 beyond float32's range becomes Inf here, which the check of the rows then names.
    with np.errstate(over="ignore"):
        return Z.astype(np.float32)


def centred(Z: Float[np.ndarray, "N D"], origin: Float[np.ndarray, " D"]) -> np.ndarray:
    """Z - 1 origin, subtracted in float64 and then float32; the rows a block at a time."""
    found = np.empty(Z.shape, np.float32)
    for start in range(0, len(Z), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        found[block] = short(Z[block] - origin)
        # What float32 cannot hold is not made good by the subtraction: its check is to name it.
        found[block][~(np.abs(Z[block]) <= np.finfo(np.float32).max)] = np.inf
    return found


def check_finite(Z: Shaped[Array, "N D"], name: str, first_row: int = 0) -> float | None:
    """Raises ValueError that names the first row with NaN or Inf, if there is one.

    Returns the largest absolute value; None while Z is traced, when nothing is checked.
    """
    if isinstance(Z, Tracer):
        return None
    # All numbers are on every host.
    found = _bad_rows(Z)
    count, first = int(found[0]), int(found[1])
    if count:
        others = f" (and {count - 1} more rows)" if count > 1 else ""
        raise ValueError(
            f"{name} has NaN or Inf in row {first_row + first}{others}, or values beyond float32; "
            "drop such rows or mend what wrote them"
        )
    return float(found[2])


def unit_of(Z: Shaped[Array, "N D"], largest: float | None) -> float:
    """A power of two to divide Z by, so that squares of its sums of squares fit into float32.

    1 where they do, which leaves Z alone, and while Z is traced.
    """
    if largest is None or largest == 0 or real_dtype(Z) == jnp.float64:
        return 1.0
    if largest >= LEAST and largest**2 * Z.size < MOST:
        return 1.0
    # Few large columns are no reason: only then is it worth another pass.
    if largest >= LEAST and float(_energy(Z, 1 / largest)) * largest**2 < MOST:
        return 1.0
    return 2.0 ** np.floor(np.log2(largest))


@jax.jit
def _energy(Z: Shaped[Array, "N D"], factor: float) -> Float[Array, ""]:
    return jnp.sum(jnp.sum((Z * factor) ** 2, axis=1, dtype=real_dtype(Z)))


@jax.jit
def root_mean_square(Z: Shaped[Array, "N D"]) -> Float[Array, ""]:
    """The root mean square norm of the rows."""
    squares = jnp.sum(Z.astype(real_dtype(Z)) ** 2, axis=1)
    return jnp.sqrt(sums.total(squares).value / len(Z))


@jax.jit
def _bad_rows(
    Z: Shaped[Array, "N D"],
) -> tuple[Int[Array, ""], Int[Array, ""], Float[Array, ""]]:
    """How many rows are not finite, the first of them, and the largest absolute value."""
    # The largest value of a row is what a CPU finds in one pass; NaN is larger than any.
    # Fused with all that uses it, that pass takes nine times as long on a CPU: hence the barrier.
    largest = jax.lax.optimization_barrier(jnp.max(jnp.abs(Z), axis=1))
    bad = ~jnp.isfinite(largest)
    first = jnp.min(jnp.arange(len(Z)), where=bad, initial=len(Z))
    return jnp.sum(bad), first, jnp.max(largest, initial=0).astype(real_dtype(Z))


def read_block(source: StoredMatrix, start: int, stop: int) -> Shaped[np.ndarray, "B D"]:
    """Some rows of a source. Raises ValueError when it gives others than its shape says."""
    return check_block(source.read(start, stop), (stop - start, source.shape[1]), start)


def check_block(values: Any, shape: tuple[int, int], start: int) -> Shaped[np.ndarray, "B D"]:
    """Rows that a source gave. Raises ValueError unless they are what its shape says."""
    values = np.asarray(values)
    if values.shape != shape:
        raise ValueError(
            f"the source of Z gave {values.shape} for the {shape[0]} rows from {start} on; "
            f"expected {shape}, as its own shape says: mend its shape or what reads it"
        )
    if values.dtype.itemsize > 4 or not jnp.issubdtype(values.dtype, jnp.floating):
        values = short(values)
    return values


def read_rows(source: StoredMatrix, mesh: Mesh | None) -> Shaped[Array, "M D"]:
    """The rows of a source on the device, or on the mesh's "data" axis with zero rows at the end.

    Each device's rows are read by the host that it belongs to, and by no other.
    """
    N, D = source.shape
    if mesh is None:
        return jnp.asarray(read_block(source, 0, N))
    rows = N + -N % _data_axis(mesh)

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(rows)
        values = read_block(source, min(start, N), min(stop, N))
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


def narrow(Z: Array | np.ndarray) -> Array:
    """What numpy holds, in float32 or less, as a JAX array."""
    return jnp.asarray(short(Z)) if isinstance(Z, np.ndarray) else Z
