"""What every solver shares: the loop and its result.

Axes: N samples, D width, K concepts, I iterations, S starts.

A method provides `update(state) -> state`. Its state is a NamedTuple with at least

    objective   float32[]   the value that the method minimises, at this state
    error       float32[]   what `tol` is compared to; inf before the first update

and the loop runs until `error <= tol` or until `max_iter` updates are done.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


class Progress(NamedTuple):
    """Progress of a run. `run` takes one and returns one, so that a run can be continued."""

    state: Any  # the method's own NamedTuple
    history: Float[Array, " I+1"]  # objective at the start and after every update, then NaN
    iteration: Int[Array, ""]  # number of updates done


class Result(NamedTuple):
    """What every solver returns."""

    components: Float[Array, "K D"]
    activations: Float[Array, "N K"] | None  # None if they were written out
    objective: Float[Array, ""]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]  # whether the stopping rule, not max_iter, ended the run
    history: Float[Array, " I+1"]
    mean: Float[Array, " D"] | None = None  # what was subtracted from Z; only pca centres
    starts: Float[Array, "S K R"] | None = None  # where each start ended, the kept one first


def begin(state: Any, max_iter: int) -> Progress:
    """Returns the progress before the first update, with room for `max_iter` updates."""
    history = jnp.full(max_iter + 1, jnp.nan, state.objective.dtype).at[0].set(state.objective)
    return Progress(state, history, jnp.int32(0))


def run(
    update: Callable[[Any], Any],
    progress: Progress,
    *,
    tol: Float[Array, ""] | float,
    max_iter: Int[Array, ""] | int,
) -> Progress:
    """Repeats `update` until `state.error <= tol` or until `max_iter` updates are done in total.

    Traceable, so it can be used inside jit. `max_iter` may be less than the room in the history.
    """

    def unfinished(progress: Progress) -> Array:
        return (progress.state.error > tol) & (progress.iteration < max_iter)

    def step(progress: Progress) -> Progress:
        state = update(progress.state)
        iteration = progress.iteration + 1
        return Progress(state, progress.history.at[iteration].set(state.objective), iteration)

    return jax.lax.while_loop(unfinished, step, progress)


def each(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like `jax.vmap`, but maps a single element without batching, so that lax.cond stays lazy."""

    def mapped(*arguments: Any) -> Any:
        if len(jax.tree.leaves(arguments)[0]) > 1:
            return jax.vmap(function)(*arguments)
        single = function(*jax.tree.map(lambda leaf: leaf[0], arguments))
        return jax.tree.map(lambda leaf: leaf[None], single)

    return mapped


@jax.custom_batching.custom_vmap
def largest_of_runs(value: Shaped[Array, ""]) -> Shaped[Array, ""]:
    """Returns the largest value of the runs that `each` maps, or the value of a single run.

    It is the same for all runs, so that lax.cond on it stays lazy under vmap, and a loop of that
    length does not select between old and new values in each of its steps. Traceable.
    """
    return value


@largest_of_runs.def_vmap
def _of_mapped_runs(
    size: int, is_mapped: list[bool], value: Shaped[Array, "..."]
) -> tuple[Shaped[Array, "..."], bool]:
    largest = jnp.max(value, axis=0) if is_mapped[0] else value
    return largest_of_runs(largest), False
