"""What every solver shares: the loop, its result, and the one way to multiply matrices.

Axes: N samples, D width, K concepts, I iterations.

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


def begin(state: Any, max_iter: int) -> Progress:
    """A run that has done nothing yet, with room for `max_iter` updates."""
    history = jnp.full(max_iter + 1, jnp.nan, jnp.float32).at[0].set(state.objective)
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


def matmul(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """`a @ b` in full float32, whatever the inputs' width and the backend's default precision."""
    return jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)


def image(Z: Float[Array, "N D"], scores: Float[Array, "N R"]) -> Float[Array, "D R"]:
    """`Z^T scores`, read along the rows of Z: half the time of the transposed product on a CPU."""
    # The barrier keeps the compiler from turning it back into that one for the sake of a layout.
    return jax.lax.optimization_barrier(matmul(scores.T, Z)).T


def real_rows(Z: Float[Array, "N D"], num_samples: int) -> Float[Array, " N"]:
    """1 for each of the first `num_samples` rows, 0 for the zero rows that pad Z on a mesh."""
    return (jnp.arange(Z.shape[0]) < num_samples).astype(jnp.float32)
