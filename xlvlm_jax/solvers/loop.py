"""What every solver shares: the loop, its result, and the one way to multiply matrices.

Axes: N samples, D width, K concepts, I iterations, S starts.

A method brings `update(state) -> state`. Its state is a NamedTuple with at least

    objective   float32[]   the value that the method minimises, at this state
    error       float32[]   what `tol` is compared to; inf before the first update

and the loop runs until `error <= tol` or until `max_iter` updates are done.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Up to FEW rows of a thin matrix, and from WIDE columns of Z on, a CPU multiplies faster with each
# sample's numbers together: [N, K] instead of [K, N]. Measured for XLA's own products at K = 8 to
# 276 and D = 64 to 4096; of narrow Z, turning the thin matrix costs more than the product.
FEW, WIDE = 64, 2048


class Progress(NamedTuple):
    """Where a run stands; `run` takes one and returns one, so that a run can be continued."""

    state: Any  # the method's own NamedTuple
    history: Float[Array, " I+1"]  # objective at the start and after every update, then NaN
    iteration: Int[Array, ""]  # updates done


class Result(NamedTuple):
    """What every solver returns."""

    components: Float[Array, "K D"]
    activations: Float[Array, "N K"]
    objective: Float[Array, ""]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]  # whether the stopping rule, not max_iter, ended the run
    history: Float[Array, " I+1"]
    mean: Float[Array, " D"] | None = None  # what was subtracted from Z; only pca centres
    starts: Float[Array, "S K R"] | None = None  # where each start came to, the kept one first


def begin(state: Any, max_iter: int) -> Progress:
    """A run that has done nothing yet, with room for `max_iter` updates."""
    history = jnp.full(max_iter + 1, jnp.nan, state.objective.dtype).at[0].set(state.objective)
    return Progress(state, history, jnp.int32(0))


def run(
    update: Callable[[Any], Any],
    progress: Progress,
    *,
    tol: Float[Array, ""] | float,
    max_iter: Int[Array, ""] | int,
) -> Progress:
    """Repeat `update` until `state.error <= tol` or `max_iter` updates are done in all.

    Traceable: use it inside jit. `max_iter` may be less than the room in the history.
    """

    def unfinished(progress: Progress) -> Array:
        return (progress.state.error > tol) & (progress.iteration < max_iter)

    def step(progress: Progress) -> Progress:
        state = update(progress.state)
        iteration = progress.iteration + 1
        return Progress(state, progress.history.at[iteration].set(state.objective), iteration)

    return jax.lax.while_loop(unfinished, step, progress)


def real_dtype(*arrays: Array) -> Any:
    """What is computed with: float32, or float64 where that is switched on and given."""
    return jnp.result_type(jnp.float32, *(array.dtype for array in arrays))


def matmul(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """`a @ b` in full float32 or wider, whatever the backend's default precision."""
    return jnp.matmul(a, b, precision="highest", preferred_element_type=real_dtype(a, b))


def inner_products(atoms: Float[Array, "K D"], Z: Float[Array, "N D"]) -> Float[Array, "K N"]:
    """`atoms Z^T`."""
    if len(atoms) > FEW or Z.shape[1] < WIDE:
        return matmul(atoms, Z.T)
    # The barrier keeps the compiler from turning it back into that product, for a layout's sake.
    return jax.lax.optimization_barrier(matmul(Z, atoms.T)).T


def weighted_sums(codes: Float[Array, "K N"], Z: Float[Array, "N D"]) -> Float[Array, "K D"]:
    """`codes Z`: the rows of Z added up with weights."""
    if len(codes) <= FEW and Z.shape[1] >= WIDE:
        codes = jax.lax.optimization_barrier(codes.T).T
    # As above: `Z^T codes^T` would take several times as long.
    return jax.lax.optimization_barrier(matmul(codes, Z))


def each(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.vmap`; one element alone without batching, so that a branch not taken costs nothing."""

    def mapped(*arguments: Any) -> Any:
        if len(jax.tree.leaves(arguments)[0]) > 1:
            return jax.vmap(function)(*arguments)
        single = function(*jax.tree.map(lambda leaf: leaf[0], arguments))
        return jax.tree.map(lambda leaf: leaf[None], single)

    return mapped
