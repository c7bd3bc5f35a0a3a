"""A solve in phases: in one program, or in a program per phase if the caller wants progress.

A method's plan is a NamedTuple of what is fixed at compile time, with a tuple `phases` of

    work(Z, carry, limit, rows) -> carry

The first carry is the tuple that the caller passes, the last is the Result, the others are a
`Carry`. A phase that repeats changes only the progress: it updates until its stopping rule ends it
or until iteration `limit`, and can be continued from there. So `watched` does the same updates as
`at_once`, a few at a time.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from xlvlm_jax.solvers.collectives import ONE_DEVICE, RESULT, Rows, solve_on
from xlvlm_jax.solvers.compiling import jit
from xlvlm_jax.solvers.loop import Progress, Result

# Updates between two calls: about this many multiplications, at most MOST updates. Counted rather
# than timed, so that all hosts do the same.
MULTIPLICATIONS, MOST = 2**34, 64


class Standing(NamedTuple):
    """Current state of a run."""

    num_concepts: int
    iteration: int  # number of updates done
    max_iter: int
    objective: float  # after the last update; for kmeans, after the one before it
    error: float  # what `tol` is compared to
    figures: Mapping[str, float] = MappingProxyType({})  # what else a method tells, by name


Tell = Callable[[Standing], None]


class Phase(NamedTuple):
    """A part of a solve."""

    work: Callable[..., Any]
    repeats: bool = False


class Carry(NamedTuple):
    """What one phase passes on to the next."""

    tol: Float[Array, ""]
    fixed: Any
    progress: Progress  # with a leading axis Q, one run per number of concepts


class Counts(NamedTuple):
    """Numbers that a program takes as arguments, so that one program serves all of them."""

    num_samples: Int[Array, ""]  # leading rows of Z that count; the others pad it
    num_concepts: Int[Array, " Q"]  # one per run; runs are solved side by side
    max_iter: Int[Array, ""]  # maximum number of updates per run

    @classmethod
    def of(cls, num_samples: int, num_concepts: tuple[int, ...], max_iter: int) -> "Counts":
        """Returns the numbers as arrays on the host."""
        numbers = np.array(num_concepts, np.int32)
        return cls(np.int32(num_samples), numbers, np.int32(max_iter))  # type: ignore[arg-type]


def one_run_each(counts: Counts) -> tuple[int, ...]:
    """Returns the number of concepts of each run, if there is one per number."""
    return tuple(int(number) for number in np.asarray(counts.num_concepts))


def scalar(value: Any) -> Any:
    """Returns a number in JAX's default float; one from the host stays there."""
    if isinstance(value, jax.Array):
        return value.astype(float)
    return np.asarray(value, jax.dtypes.canonicalize_dtype(float))


@runtime_checkable
class Plan(Protocol):
    """Settings of a method that are fixed at compile time."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Phases in the order they run."""
        ...

    def runs(self, counts: Counts) -> tuple[int, ...]:
        """Returns the number of concepts of each run."""
        ...


def run_compiled(plan: Plan, given: Any, Z: Float[Array, "N D"], mesh: Mesh | None) -> Result:
    """Runs all phases in one program; works on traced arrays too."""
    return _solve(Z, given, plan=plan, mesh=mesh)


def at_once(plan: Plan, given: Any, Z: Float[Array, "N D"], mesh: Mesh | None) -> Result:
    """Runs all phases; traceable."""
    limit = given.counts.max_iter

    def work(Z: Array, given: Any, *, rows: Rows) -> Result:
        carry = given
        for index, phase in enumerate(plan.phases):
            # Compiled separately from the phase before, as in `watched`, so that rounding is the
            # same.
            carry = jax.lax.optimization_barrier(carry) if index else carry
            carry = phase.work(Z, carry, limit, rows)
        return carry

    return solve_on(mesh, work, Z, (given,))


@partial(jit, static_argnames=("plan", "mesh"))
def _solve(Z: Array, given: Any, *, plan: Plan, mesh: Mesh | None) -> Result:
    return at_once(plan, given, Z, mesh)


def solve(
    method: ModuleType,
    Z: Float[Array, "N D"],
    key: PRNGKeyArray,
    tell: Tell | None = None,
    every: int | None = None,
    *,
    mesh: Mesh | None = None,
    **options: Any,
) -> Result:
    """Calls the method's own `solve`, or `watched` if there is a `tell`.

    Args:
        method: a solver module.
        Z: float[N, D].
        key: random key.
        tell: called with the state of each run after some updates; None for no calls.
        every: number of updates between calls; None to choose it by the size of Z.
        mesh: devices that hold the rows along "data"; None for one device.
        **options: as for the method's `plan`.
    """
    # A method without updates has no plan.
    if tell is None or not hasattr(method, "plan"):
        return method.solve(Z, key, mesh=mesh, **options)
    plan, given = method.plan(key, width=Z.shape[1], **options)
    return watched(plan, given, Z, mesh, tell, every)


def watched(
    plan: Plan,
    given: Any,
    Z: Float[Array, "N D"],
    mesh: Mesh | None,
    tell: Tell,
    every: int | None = None,
) -> Result:
    """Runs all phases, and calls `tell` after every few updates and at the end of a phase.

    Args:
        plan: what to run.
        given: inputs of the run other than Z.
        Z: float[N, D].
        mesh: devices that hold the rows along "data"; None for one device.
        tell: called with the state of each run.
        every: calls come at multiples of this iteration number; None to choose it by the size of Z.
    """
    N, D = Z.shape
    numbers, max_iter = plan.runs(given.counts), int(given.counts.max_iter)
    every = every or min(max(MULTIPLICATIONS // (N * D * max(numbers)), 1), MOST)
    carry: Any = given
    for phase in plan.phases:
        # A phase that comes twice is one program.
        on = {"plan": plan, "index": plan.phases.index(phase), "mesh": mesh}
        if not phase.repeats:
            carry = _solve_phase(Z, carry, np.int32(max_iter), **on)
            continue
        tol = float(_here(carry.tol, mesh))

        def unfinished(standings: list[Standing], tol: float = tol) -> list[int]:
            runs = enumerate(standings)
            return [q for q, at in runs if at.error > tol and at.iteration < max_iter]

        now = _standings(carry, numbers, max_iter, mesh)
        while running := unfinished(now):
            done = min(now[q].iteration for q in running)
            limit = min(done - done % every + every, max_iter)
            # Not kept under another name: rows' codes would stay in memory for the next phase.
            carry = carry._replace(
                progress=_solve_updates(
                    Z, carry.tol, carry.fixed, carry.progress, np.int32(limit), **on
                )
            )
            now = _standings(carry, numbers, max_iter, mesh)
            for q in running:
                tell(now[q])
    return carry


def compiled(plan: Plan, given: Any, Z: jax.ShapeDtypeStruct) -> list[jax.stages.Compiled]:
    """Compiles the programs of `watched` on one device without running them.

    Compiling takes a few hundred megabytes, which can be given back before the rows take theirs.

    Args:
        plan: what to run.
        given: inputs of the run other than Z.
        Z: shape [N, D] and dtype of the rows.
    """
    carry, limit, programs = given, np.int32(0), []
    for phase in plan.phases:
        on = {"plan": plan, "index": plan.phases.index(phase), "mesh": None}
        if phase.repeats:
            progress, program = _solve_updates.compiled(Z, *carry, limit, **on)
            carry = carry._replace(progress=progress)
        else:
            carry, program = _solve_phase.compiled(Z, carry, limit, **on)
        programs.append(program)
    return programs


def _standings(
    carry: Carry, numbers: tuple[int, ...], max_iter: int, mesh: Mesh | None
) -> list[Standing]:
    state = carry.progress.state
    values = (carry.progress.iteration, state.objective, state.error)
    iterations, objectives, errors = (_here(value, mesh) for value in values)
    return [
        Standing(K, int(iterations[q]), max_iter, float(objectives[q]), float(errors[q]))
        for q, K in enumerate(numbers)
    ]


def _here(value: Array, mesh: Mesh | None) -> np.ndarray:
    """Returns the value of a carry that is on a device of this host."""
    return np.asarray(value if mesh is None else value.addressable_data(0)[0])


@partial(jit, static_argnames=("plan", "index", "mesh"))
def _solve_phase(
    Z: Array, carry: Any, limit: Int[Array, ""], *, plan: Plan, index: int, mesh: Mesh | None
) -> Any:
    return run_phase(plan, index, mesh, Z, carry, limit)


# The progress is donated: one copy in memory, not two.
@partial(jit, static_argnames=("plan", "index", "mesh"), donate_argnames="progress")
def _solve_updates(
    Z: Array,
    tol: Array,
    fixed: Any,
    progress: Progress,
    limit: Int[Array, ""],
    *,
    plan: Plan,
    index: int,
    mesh: Mesh | None,
) -> Progress:
    carry = Carry(tol, fixed, progress)
    return run_phase(plan, index, mesh, Z, carry, limit).progress


def run_phase(plan: Plan, index: int, mesh: Mesh | None, Z: Array, carry: Any, limit: Array) -> Any:
    """Runs one phase; traceable. On a mesh each device keeps its own carry, on a leading axis."""
    work = plan.phases[index].work
    if mesh is None:
        return work(Z, carry, limit, ONE_DEVICE)
    is_first, is_last = index == 0, index == len(plan.phases) - 1

    def local(Z: Array, carry: Any, limit: Array) -> Any:
        if not is_first:
            carry = jax.tree.map(lambda leaf: leaf[0], carry)
        carry = work(Z, carry, limit, Rows("data"))
        return carry if is_last else jax.tree.map(lambda leaf: leaf[None], carry)

    spread, whole = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(spread, whole if is_first else spread, whole),
        out_specs=RESULT if is_last else spread,
        check_vma=False,
    )(Z, carry, jnp.asarray(limit, jnp.int32))
