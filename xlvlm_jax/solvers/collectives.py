"""Access to the rows of Z, whether they are in one place or spread over a mesh axis.

A solver sees its own rows and asks for what it needs from all of them: a total, the largest few, or
some by number. On one device that is a local operation; on a mesh each request is one collective,
whose size does not depend on N. N rows in all, M on this device.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from xlvlm_jax.solvers.linalg import matmul, real_dtype
from xlvlm_jax.solvers.loop import Result

T = TypeVar("T")


def top_k(values: Float[Array, " N"], count: int) -> tuple[Float[Array, " R"], Int[Array, " R"]]:
    """Returns the `count` largest values, largest first, and their numbers.

    As one row of a matrix: of a vector, a TPU's compiler sorts all.
    """
    largest, numbers = jax.lax.top_k(values[None], count)
    return largest[0], numbers[0]


class Rows(NamedTuple):
    """How to reach all rows; `axis` is the mesh axis they are spread over, None for one device."""

    axis: str | None = None

    def total(self, value: Any) -> Any:
        """Returns the sum over devices of every array in a pytree."""
        return value if self.axis is None else jax.lax.psum(value, self.axis)

    def numbers(self, M: int) -> Int[Array, " M"]:
        """Returns the global number of each row on this device."""
        first = 0 if self.axis is None else jax.lax.axis_index(self.axis) * M
        return first + jnp.arange(M)

    def count(self, M: int) -> int:
        """Returns the number of rows on all devices, those that pad Z included."""
        return M if self.axis is None else M * jax.lax.axis_size(self.axis)

    def take(
        self, values: Float[Array, "M ..."], numbers: Int[Array, " R"]
    ) -> Float[Array, "R ..."]:
        """Returns the rows with these global numbers, in float32 or wider."""
        values = jnp.asarray(values)
        dtype = real_dtype(values)
        if self.axis is None:
            return values[numbers].astype(dtype)
        M = values.shape[0]
        local = numbers - jax.lax.axis_index(self.axis) * M
        here = ((local >= 0) & (local < M)).reshape(-1, *(1,) * (values.ndim - 1))
        mine = values[jnp.clip(local, 0, M - 1)].astype(dtype)
        return jax.lax.psum(jnp.where(here, mine, 0), self.axis)

    def take_columns(
        self, values: Float[Array, "K M"], numbers: Int[Array, " R"]
    ) -> Float[Array, "R K"]:
        """Returns the finite values of the rows with these numbers, of an array with rows last."""
        if jax.default_backend() != "tpu":
            return self.take(values.T, numbers)
        # v5p and v6e read single rows of an array from a copy of all, with K padded to 128. A
        # product with zeros and ones is exact at precision "highest", and reads it as it lies.
        chosen = numbers[:, None] == self.numbers(values.shape[1])
        return self.total(matmul(chosen.astype(real_dtype(values)), values.T))

    def largest(self, scores: Float[Array, " M"], count: int) -> Int[Array, " R"]:
        """Returns the numbers of the `count` rows of largest score, or of all rows if fewer."""
        M = scores.shape[0]
        top, local = top_k(scores, min(count, M))
        if self.axis is None:
            return local
        numbers = self.numbers(M)[local]
        top = jax.lax.all_gather(top, self.axis, tiled=True)
        numbers = jax.lax.all_gather(numbers, self.axis, tiled=True)
        return numbers[top_k(top, min(count, len(top)))[1]]

    def draw(self, weights: Float[Array, " M"], uniform: Float[Array, " T"]) -> Int[Array, " T"]:
        """Returns the numbers of T rows drawn in proportion to weights; `uniform` is in [0, 1)."""
        M = weights.shape[0]
        below = jnp.cumsum(weights)
        if self.axis is None:
            # Keeps the target below the sum even after rounding: the last row may have zero weight.
            wanted = jnp.minimum(uniform * below[-1], jnp.nextafter(below[-1], 0))
            found = jnp.searchsorted(below, wanted, side="right")
            return jnp.minimum(found, M - 1)
        totals = jax.lax.all_gather(below[-1], self.axis)
        ends = jnp.cumsum(totals)
        wanted = uniform * ends[-1]
        device = jnp.minimum(jnp.searchsorted(ends, wanted, side="right"), len(ends) - 1)
        index = jax.lax.axis_index(self.axis)
        found = jnp.searchsorted(below, wanted - (ends[index] - totals[index]), side="right")
        mine = index * M + jnp.clip(found, 0, M - 1)
        return jax.lax.psum(jnp.where(device == index, mine, 0), self.axis)


ONE_DEVICE = Rows()
# Sharding of a result: replicated, except for its activations.
RESULT: Any = Result._make(PartitionSpec() for _ in Result._fields)._replace(
    activations=PartitionSpec(None, "data")
)


def solve_on(
    mesh: Mesh | None, solve: Callable[..., Result], Z: Float[Array, "N D"], arguments: tuple
) -> Result:
    """Calls solve(Z, *arguments, rows=...) on one device, or on each device's rows along "data".

    The arguments are replicated, and so is the result except for its activations.
    """
    if mesh is None:
        return solve(Z, *arguments, rows=ONE_DEVICE)
    whole = PartitionSpec()
    return jax.shard_map(
        partial(solve, rows=Rows("data")),
        mesh=mesh,
        in_specs=(PartitionSpec("data"), *(whole for _ in arguments)),
        out_specs=RESULT,
        check_vma=False,  # a while loop hides that a total is the same on every device
    )(Z, *arguments)


def keep_pace(value: T) -> T:
    """Returns a value, after waiting for it where several devices of a CPU compute it.

    For loops that start one program after the other without looking at a result. XLA's CPU client
    has a thread per device for all programs, and lets 32 of them be in flight; what comes next
    waits on these threads. So if a device runs ahead, the others may have no thread left to meet
    it in a collective, and wait for ever. Other backends queue programs in order, and are left
    alone; so is one device.
    """
    leaves = [leaf for leaf in jax.tree.leaves(value) if isinstance(leaf, jax.Array)]
    devices = leaves[0].devices() if leaves else set()
    if len(devices) > 1 and next(iter(devices)).platform == "cpu":
        jax.block_until_ready(value)
    return value
