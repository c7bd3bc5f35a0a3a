"""Checks a solver's inputs and places them on devices.

Every message is one line: what was expected, what was given, what to do.
"""

import math
import os
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped
from typing_extensions import TypeIs

from xlvlm_jax.solvers import sums
from xlvlm_jax.solvers.buckets import SMALL, bucket_of_concepts, bucket_of_rows
from xlvlm_jax.solvers.linalg import real_dtype

BLOCK = 2**18  # numbers of a float64 matrix that are converted together
ALIGNED = 64  # bytes: a CPU device uses memory at multiples of it as it is
# With |Z|^2 between these, products of two sums of squares fit into float32.
LEAST, MOST = 2.0**-20, 2.0**60


@runtime_checkable
class StoredMatrix(Protocol):
    """A matrix whose rows are read on demand, in bfloat16, float16 or float32."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        ...

    def read(self, start: int, stop: int) -> Shaped[np.ndarray, "B D"]:
        """Returns the rows from `start` up to `stop`."""
        ...


def check_number(name: str, value: Any, lowest: int) -> None:
    """Checks that a value is a finite number of at least `lowest`.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int | float | np.number) or not lowest <= value < np.inf:
        raise ValueError(f"{name} must be a finite number of at least {lowest}; got {value!r}")


def check_whole(name: str, value: Any, lowest: int) -> None:
    """Checks that a value is a whole number of at least `lowest`.

    Raises:
        ValueError: it is not.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < lowest:
        raise ValueError(f"{name} must be a whole number of at least {lowest}; got {value!r}")


def check_num_concepts(num_concepts: Any, N: int) -> None:
    """Checks that N rows allow this number of concepts.

    Raises:
        ValueError: `num_concepts` is not a whole number from 1 to N.
    """
    check_whole("num_concepts", num_concepts, 1)
    if num_concepts > N:
        raise ValueError(
            f"num_concepts={num_concepts} is larger than the {N} rows of Z; use fewer concepts or "
            "more samples"
        )


def check_weights(weights: Any, N: int) -> tuple[Float[Array | np.ndarray, " N"], float]:
    """Scales the weights of N rows by a power of two near the largest.

    Args:
        weights: float[N].
        N: number of rows.

    Returns:
        the scaled weights, and the power of two.

    Raises:
        ValueError: they are not N finite numbers of at least zero, or all are zero.
    """
    if isinstance(weights, Tracer):
        return weights, 1.0
    weights = as_weights(weights, N)
    if weights.shape != (N,):
        raise ValueError(
            f"sample_weight must have shape ({N},), one number per row; got {weights.shape}"
        )
    bad = np.flatnonzero(~((weights >= 0) & np.isfinite(weights)))
    if bad.size:
        raise ValueError(
            f"sample_weight must hold finite numbers of at least zero; got {weights[bad[0]]} for "
            f"row {bad[0]}"
        )
    if not weights.any():
        raise ValueError(
            "sample_weight is zero for all rows; give at least one row a positive weight"
        )
    unit = 2.0 ** np.floor(np.log2(weights.max()))
    return weights / unit, float(unit)


def as_weights(weights: Any, N: int) -> np.ndarray:
    """Returns the weights of N rows as float64, of any shape.

    Raises:
        ValueError: they are not numbers.
    """
    try:
        return np.asarray(as_array(weights, "sample_weight", row="weight"), np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"sample_weight must have shape ({N},), one number per row; got {weights!r:.80}"
        ) from None


def is_stored(Z: Any) -> TypeIs[StoredMatrix]:
    """Returns whether Z reads rows on demand. A TensorStore also has `read`, but is an array."""
    # The check of a protocol takes a tenth of a millisecond.
    if isinstance(Z, np.ndarray | jax.Array):
        return False
    return isinstance(Z, StoredMatrix) and _module(Z) != "tensorstore"


def as_matrix(
    Z: Any, name: str, row: str, share: bool = False, pad: bool = False
) -> Array | np.ndarray:
    """Returns the given matrix of real numbers as a JAX or numpy array.

    Args:
        Z: [N, D], any array of real numbers.
        name: name of the matrix in error messages.
        row: what a row is, in error messages.
        share: see `on_device`.
        pad: whether a numpy matrix that is copied anyway may get rows of zeros, see `padded`.

    Returns:
        a JAX array of bfloat16, float16, float32, or float64 if that is enabled. Otherwise a numpy
        array of float64 or integers, which float32 may not hold: see `centred` and `short`.

    Raises:
        TypeError: it is not an array of numbers.
        ValueError: it is not a matrix, has no columns, or holds complex or other numbers.
    """
    Z = as_array(Z, name, row)
    if Z.ndim != 2:
        raise ValueError(f"{name} must be a matrix with one row per {row}; got shape {Z.shape}")
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
        return on_device(Z, share, pad) if isinstance(Z, np.ndarray) else Z
    if floating and Z.dtype.itemsize < 2:
        return jnp.asarray(Z.astype(np.float32))
    wide = np.asarray(Z)
    if jax.config.values["jax_enable_x64"]:
        return jnp.asarray(wide, np.float64)
    # Integers are converted block by block, not copied as float64.
    return wide.astype(np.float64, copy=False) if floating else wide


def on_device(values: Shaped[np.ndarray, "..."], share: bool = False, pad: bool = False) -> Array:
    """Returns a numpy array as a JAX array, with at most one copy on a CPU.

    Args:
        values: the array.
        share: whether the result may use the memory of `values` if aligned. The caller must have
            finished computing with it before anyone can write to `values`.
        pad: whether rows of zeros pad a matrix, see `padded`.
    """
    if jax.default_backend() == "cpu":
        shape = (bucket_of_rows(*values.shape), values.shape[1]) if pad else values.shape
        aligned = values.flags.c_contiguous and values.ctypes.data % ALIGNED == 0
        if not (share and aligned and shape == values.shape):
            # The memory is numpy's, in large pages: JAX's own copy takes twice as long, and
            # `jnp.asarray` copies twice.
            copied = _aligned(shape, values.dtype)
            if pad:
                copied[len(values) :] = 0
            np.copyto(copied[: len(values)] if pad else copied, values)
            values = copied
    return jax.device_put(values)


def _aligned(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Returns new memory that a CPU device uses as it is."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNED, np.uint8)
    first = -memory.ctypes.data % ALIGNED
    return memory[first : first + size].view(dtype).reshape(shape)


def as_array(Z: Any, name: str, row: str) -> Array | np.ndarray:
    """Returns any array as a JAX or numpy array, in this machine's byte order.

    A JAX array on a mesh with axes of type `Explicit` is returned on the same devices with axes of
    type `Auto`, uncopied.

    Args:
        Z: the array, such as a torch tensor or a frame of pandas.
        name: its name in error messages.
        row: what a row is, in error messages.

    Raises:
        TypeError: it is not an array of numbers.
    """
    if isinstance(Z, jax.Array):
        return _with_auto_axes(Z)
    module, hint, given = _module(Z), "", Z
    if Z is None or isinstance(Z, str | bytes | os.PathLike):
        hint = "load it first"
    elif hasattr(Z, "toarray"):
        hint = "call its toarray()"
    elif callable(getattr(Z, "matrix", None)):  # features
        hint = "pass its matrix(site) or stored(site)"
    elif isinstance(Z, np.ma.MaskedArray):
        hint = "fill the masked values, or drop their rows"
    if not hint:
        try:
            if module == "torch":
                tensor = given.detach().cpu().contiguous()
                # numpy has no bfloat16 of its own.
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
    raise TypeError(
        f"{name} must be an array of numbers with one row per {row}; got {kind}: {hint}"
    )


def _with_auto_axes(array: Array) -> Array:
    """Returns an array whose sharding is the compiler's to follow; see `as_array`."""
    where = None if isinstance(array, Tracer) else array.sharding
    if not isinstance(where, NamedSharding) or where.mesh.are_all_axes_auto:
        return array
    mesh = where.mesh.update(axis_types=(AxisType.Auto,) * len(where.mesh.axis_names))
    where = NamedSharding(mesh, where.spec, memory_kind=where.memory_kind)
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, where, shards)


def _module(value: Any) -> str:
    return type(value).__module__.split(".")[0]


def short(Z: Shaped[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Returns a matrix of float64 or integers as float32."""
    found = _aligned(Z.shape)
    # A value beyond float32's range becomes Inf, which the check of the rows then reports.
    with np.errstate(over="ignore"):
        np.copyto(found, Z, casting="same_kind")
    return found


def centred(Z: Shaped[np.ndarray, "N D"], origin: Float[np.ndarray, " D"]) -> np.ndarray:
    """Returns Z - 1 origin, subtracted in float64 and rounded to float32."""
    found, size = _aligned(Z.shape), max(BLOCK // Z.shape[1], 1)
    with np.errstate(over="ignore"):
        for start in range(0, len(Z), size):
            rows, near = Z[start : start + size], found[start : start + size]
            np.subtract(rows, origin, out=near, dtype=np.float64, casting="same_kind")
            # A value that float32 cannot hold is marked even if the difference fits, so that the
            # check reports it.
            near[~(np.abs(rows) <= np.finfo(np.float32).max)] = np.inf
    return found


def deviations(Z: Shaped[np.ndarray, "N D"], mean: Float[np.ndarray, " D"]) -> np.ndarray:
    """Returns the standard deviations of the columns in float64, from their means."""
    size = max(BLOCK // Z.shape[1], 1)
    blocks = (Z[start : start + size] for start in range(0, len(Z), size))
    return np.sqrt(sum(np.sum((block - mean) ** 2, axis=0) for block in blocks) / len(Z))


def check_finite(Z: Shaped[Array, "N D"], name: str, first_row: int = 0) -> float | None:
    """Checks that all rows are finite.

    Args:
        Z: [N, D].
        name: name of the matrix in error messages.
        first_row: number of the first row, for error messages.

    Returns:
        the largest absolute value; None while Z is traced, which skips the check.

    Raises:
        ValueError: a row has NaN or Inf; the first such row is named.
    """
    if isinstance(Z, Tracer):
        return None
    # All hosts have these numbers. For a small matrix numpy needs less time than the program to
    # compile.
    small = Z.size <= SMALL and _is_cheap_on_host(Z)
    found = _bad_rows_on_host(np.asarray(Z)) if small else _bad_rows(Z)
    count, first = int(found[0]), int(found[1])
    if count:
        others = f" (and {count - 1} more rows)" if count > 1 else ""
        raise ValueError(
            f"{name} has NaN or Inf in row {first_row + first}{others}, or values beyond float32; "
            "drop these rows or fix their source"
        )
    return float(found[2])


def unit_of(Z: Shaped[Array, "N D"], largest: float | None) -> float:
    """Returns a power of two to divide Z by, so that products of its sums of squares fit float32.

    Returns 1 if they fit already, which leaves Z unchanged, and while Z is traced.
    """
    if largest is None or real_dtype(Z) == jnp.float64:
        return 1.0
    most = largest**2 * Z.size
    if largest >= LEAST and most >= MOST:
        # A few large columns alone need no scaling; only this case is worth another pass.
        most = float(_energy(Z, 1 / largest)) * largest**2
    return unit_for(largest, most)


def unit_for(largest: float, energy: float) -> float:
    """Returns the unit of a matrix by its largest absolute value and its sum of squares."""
    if largest == 0 or (largest >= LEAST and energy < MOST):
        return 1.0
    return float(2.0 ** np.floor(np.log2(largest)))


@jax.jit
def _energy(Z: Shaped[Array, "N D"], factor: float | Float[Array, ""]) -> Float[Array, ""]:
    return jnp.sum(jnp.sum((Z * factor) ** 2, axis=1, dtype=real_dtype(Z)))


@jax.jit
def root_mean_square(Z: Shaped[Array, "N D"]) -> Float[Array, ""]:
    """Returns the root mean square norm of the rows."""
    squares = jnp.sum(Z.astype(real_dtype(Z)) ** 2, axis=1)
    return jnp.sqrt(sums.total(squares).value / len(Z))


@jax.jit
def _bad_rows(
    Z: Shaped[Array, "N D"],
) -> tuple[Int[Array, ""], Int[Array, ""], Float[Array, ""]]:
    """Returns how many rows are not finite, the first of them, and the largest absolute value."""
    # A CPU finds the largest value of a row in one pass; NaN is larger than any number. Fused with
    # its uses, that pass takes nine times as long on a CPU, hence the barrier.
    largest = jax.lax.optimization_barrier(jnp.max(jnp.abs(Z), axis=1))
    bad = ~jnp.isfinite(largest)
    first = jnp.min(jnp.arange(len(Z)), where=bad, initial=len(Z))
    return jnp.sum(bad), first, jnp.max(largest, initial=0).astype(real_dtype(Z))


def _bad_rows_on_host(Z: Shaped[np.ndarray, "N D"]) -> tuple[int, int, float]:
    # NaN passes through both: a matrix is looked at row by row only if one is bad.
    largest, least = float(Z.max(initial=0)), float(Z.min(initial=0))
    if math.isfinite(largest) and math.isfinite(least):
        return 0, 0, max(largest, -least)
    largest = np.abs(Z).max(axis=1)
    bad = ~np.isfinite(largest)
    return int(bad.sum()), int(bad.argmax()), float(largest.max(initial=0))


def read_block(source: StoredMatrix, start: int, stop: int) -> Shaped[np.ndarray, "B D"]:
    """Reads some rows of a source.

    Raises:
        ValueError: the source returns another shape than it promises.
    """
    return check_block(source.read(start, stop), (stop - start, source.shape[1]), start)


def check_block(values: Any, shape: tuple[int, int], start: int) -> Shaped[np.ndarray, "B D"]:
    """Checks rows that a source returned, and converts them to at most 32 bits.

    Raises:
        ValueError: the source returned another shape than it promises.
    """
    values = np.asarray(values)
    if values.shape != shape:
        raise ValueError(
            f"the source of Z gave {values.shape} for the {shape[0]} rows from {start} on; "
            f"expected {shape}, from its own shape; fix its shape or its reader"
        )
    if values.dtype.itemsize > 4 or not jnp.issubdtype(values.dtype, jnp.floating):
        values = short(values)
    return values


def read_rows(source: StoredMatrix, mesh: Mesh | None) -> Shaped[Array, "M D"]:
    """Reads a source to the device, or to the mesh's "data" axis, padded with zero rows.

    Each device's rows are read only by the host it belongs to.
    """
    N, D = source.shape
    if mesh is None:
        return on_device(read_block(source, 0, N), share=True)
    rows = N + -N % _data_axis(mesh)

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(rows)
        values = read_block(source, min(start, N), min(stop, N))
        return np.pad(values, ((0, stop - start - len(values)), (0, 0)))

    sharding = NamedSharding(mesh, PartitionSpec("data", None))
    return jax.make_array_from_callback((rows, D), sharding, part)


def shard_rows(Z: Shaped[Array, "N D"], mesh: Mesh) -> Shaped[Array, "M D"]:
    """Places Z on the mesh's "data" axis, padded with zero rows to a multiple of its size.

    Raises:
        ValueError: the mesh has no axis "data", or rows on several hosts would need padding.
    """
    missing = -Z.shape[0] % _data_axis(mesh)
    if missing:
        if not isinstance(Z, Tracer) and not Z.is_fully_addressable:
            raise ValueError(
                f"the {Z.shape[0]} rows of Z are on several hosts and do not divide evenly over "
                f"{mesh.shape['data']} devices; drop or repeat some rows"
            )
        Z = jnp.pad(Z, ((0, missing), (0, 0)))
    sharding = NamedSharding(mesh, PartitionSpec("data", None))
    if isinstance(Z, Tracer):
        return jax.lax.with_sharding_constraint(Z, sharding)
    return Z if Z.sharding == sharding else jax.device_put(Z, sharding)


def padded(Z: Shaped[Array, "N D"]) -> Shaped[Array, "M D"]:
    """Returns Z with rows of zeros up to a size that programs are compiled for (see `buckets`)."""
    N, D = Z.shape
    missing = 0 if isinstance(Z, Tracer) else bucket_of_rows(N, D) - N
    if not missing:
        return Z
    if not _is_cheap_on_host(Z):
        return jnp.pad(Z, ((0, missing), (0, 0)))
    # The host copies, and `device_put` places, without a program for this N (as `asarray` has one).
    rows = _aligned((N + missing, D), Z.dtype)
    rows[:N], rows[N:] = np.asarray(Z), 0
    return jax.device_put(rows)


def padded_concepts(
    components: Float[Array, "K D"], num_samples: int, repeat: bool, step: int | None = None
) -> Float[Array, "L D"]:
    """Returns components up to a number that programs are compiled for (see `buckets`).

    Args:
        components: float[K, D].
        num_samples: number of rows of Z.
        repeat: whether the last component is repeated; otherwise zeros are added.
        step: as for `bucket_of_concepts`.
    """
    if isinstance(components, Tracer) or not _is_cheap_on_host(components):
        return components
    K, D = components.shape
    missing = bucket_of_concepts(K, num_samples, D, step) - K
    if not missing:
        return components
    rows = np.asarray(components)
    last = rows[-1:] if repeat else np.zeros((1, D), rows.dtype)
    return jax.device_put(np.concatenate([rows, np.repeat(last, missing, axis=0)]))


def on_host(values: Any) -> Any:
    """Returns a pytree with arrays of the host, if they are there already or small.

    Slices of them are then taken without a program per shape. Others, and traced ones, are left
    unchanged.
    """
    whole = all(
        isinstance(leaf, np.ndarray) or _is_cheap_on_host(leaf) for leaf in jax.tree.leaves(values)
    )
    return jax.tree.map(np.asarray, values) if whole else values


def _is_cheap_on_host(values: Any) -> bool:
    """Returns whether an array is on a single device that is the host, or that is soon read."""
    if isinstance(values, Tracer) or len(values.devices()) > 1:
        return False
    (device,) = values.devices()
    return device.platform == "cpu" or values.size <= SMALL


def _data_axis(mesh: Mesh) -> int:
    """Returns how many devices the mesh's "data" axis has."""
    if "data" not in mesh.axis_names:
        raise ValueError(
            f"mesh has no axis 'data' to shard rows on, only {', '.join(mesh.axis_names)}; create "
            "it with jax.make_mesh((n,), ('data',))"
        )
    return mesh.shape["data"]


def narrow(Z: Array | np.ndarray) -> Array:
    """Returns a numpy matrix as a JAX array of at most 32 bits; leaves a JAX array unchanged."""
    return on_device(short(Z), share=True) if isinstance(Z, np.ndarray) else Z
