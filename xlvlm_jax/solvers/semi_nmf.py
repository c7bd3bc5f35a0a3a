"""Sparse semi-nonnegative matrix factorisation, also called non-negative dictionary learning.

    minimise   f(U, V) = 1/2 |Z - U V|_F^2 + alpha |U|_1
    over       U[N, K] >= 0 and V[K, D] with |V_k|_2 <= 1

Z and the atoms V may have any sign; the codes U only with nonnegative=False. `tol` is compared to
the mean relative decrease of f over the last WINDOW updates.

Semi-NMF: Ding, Li and Jordan, "Convex and semi-nonnegative matrix factorizations", TPAMI 2010; the
penalty and the unit ball: Mairal et al., "Online dictionary learning for sparse coding", ICML 2009.
One update encodes all rows on extrapolated atoms (`collect`: the only part that sees Z), and moves
the atoms one after another, using only the sums U^T Z and U^T U (`semi_nmf_atoms.advance`). An
update that raises f is undone and the extrapolation restarts (O'Donoghue and Candes, "Adaptive
restart for accelerated gradient schemes", 2015), so f never rises.

f is not convex. `n_init` starts are tried on a sample of the rows, in the few columns of
`compression`; the best one continues there with all rows, and finishes on Z itself.

Rows may be spread over devices or come from disk tile by tile: the method only needs sums of them.
The codes are [K, N], see `semi_nmf_codes`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from xlvlm_jax.solvers import residual
from xlvlm_jax.solvers import semi_nmf_atoms as dictionary
from xlvlm_jax.solvers import semi_nmf_codes as coding
from xlvlm_jax.solvers import sums as sums_of_rows
from xlvlm_jax.solvers.buckets import bucket_of_concepts, bucket_of_rows, room_for
from xlvlm_jax.solvers.collectives import ONE_DEVICE, Rows, top_k
from xlvlm_jax.solvers.compiling import jit
from xlvlm_jax.solvers.compression import compress, turn_to_axes
from xlvlm_jax.solvers.linalg import inner_products, matmul, real_dtype, weighted_sums
from xlvlm_jax.solvers.loop import Progress, Result, begin, each, run
from xlvlm_jax.solvers.phases import Carry, Counts, Phase, one_run_each, run_compiled, scalar
from xlvlm_jax.solvers.restarts import best_first, sample
from xlvlm_jax.solvers.semi_nmf_atoms import Atoms, Sums
from xlvlm_jax.solvers.sums import Wide
from xlvlm_jax.solvers.tpu import codes as on_tpu

SWEEPS = 2  # improvements of the codes per update; they are exact only in the limit
OVERSAMPLE = 44  # columns of the compressed Z beyond K
CANCELS = 0.01  # of the energy: smaller costs have lost more than two digits
ATOMS = 8  # a program for a small Z has a multiple of them: each takes its time
SCREEN = 120  # updates before the starts are compared
TINY = 1e-30


class Problem(NamedTuple):
    """Constants of a run."""

    Z: Float[Array, "N D"]  # rows that pad Z on a mesh are zero, and so are their codes
    energy: Float[Array, " N"]  # 1/2 |z_n|^2 of the uncompressed rows
    alpha: Float[Array, ""]
    active: Bool[Array, " K"]  # an inactive atom has zero length and is never used


class State(NamedTuple):
    """A run in memory."""

    small: Atoms
    codes: Float[Array, "K N"]

    @property
    def objective(self) -> Float[Array, "*runs"]:
        """The objective f, of each run if several are stacked."""
        return self.small.objective

    @property
    def error(self) -> Float[Array, "*runs"]:
        """What `tol` is compared to, of each run if several are stacked."""
        return self.small.error


def init(
    problem: Problem,
    codes: Float[Array, "K N"],
    atoms: Float[Array, "K D"],
    rows: Rows = ONE_DEVICE,
) -> State:
    """Returns the state at the given codes and atoms; the atoms must be inside the unit ball."""
    products, gram = inner_products(atoms, problem.Z), matmul(atoms, atoms.T)
    cost = _cost(problem.Z, problem.energy, codes, atoms, products, gram, problem.alpha)
    return State(dictionary.begin(atoms, rows.total(sums_of_rows.total(cost).value)), codes)


def uncoded(problem: Problem, atoms: Float[Array, "K D"], rows: Rows = ONE_DEVICE) -> State:
    """Returns the state with codes of zero, at which f is the rows' energy."""
    codes = jnp.zeros((len(atoms), len(problem.Z)), problem.energy.dtype)
    objective = rows.total(sums_of_rows.total(problem.energy).value)
    return State(dictionary.begin(atoms, objective), codes)


def update(
    problem: Problem, state: State, rows: Rows = ONE_DEVICE, nonnegative: bool = True
) -> State:
    """Runs one pass over the codes and the atoms; never returns a state of higher objective."""
    small = state.small
    ahead, _ = dictionary.extrapolate(small)
    start = small.scale[:, None] * state.codes
    codes, sums, cost = collect(problem.Z, problem.energy, start, ahead, problem.alpha, nonnegative)
    sums = rows.total(sums)
    unused = problem.active & (sums.used <= 0)

    def residuals() -> Array:
        worst = rows.largest(cost - problem.alpha * jnp.sum(jnp.abs(codes), axis=0), len(ahead))
        kept = rows.take_columns(codes, worst)
        found = rows.take(problem.Z, worst) - matmul(kept, ahead)
        return jnp.pad(found, ((0, len(ahead) - len(found)), (0, 0)))

    spare = jax.lax.cond(jnp.any(unused), residuals, lambda: jnp.zeros_like(ahead))
    new, accepted = dictionary.advance(small, sums, spare, problem.alpha, unused)
    return State(new, jnp.where(accepted, codes, start))


def collect(
    Z: Float[Array, "N D"],
    energy: Float[Array, " N"],
    codes: Float[Array, "K N"],
    atoms: Float[Array, "K D"],
    alpha: Float[Array, ""],
    nonnegative: bool = True,
) -> tuple[Float[Array, "K N"], Sums, Float[Array, " N"]]:
    """Returns new codes of some rows on given atoms, their sums, and each row's share of f."""
    N, D = Z.shape
    gram = matmul(atoms, atoms.T)
    if on_tpu.takes(Z, len(atoms)):
        found = on_tpu.improve(Z, energy, codes, atoms, gram, alpha, SWEEPS, nonnegative)
        cost = _where_it_cancels(Z, energy, found.codes, atoms, alpha, found.cost)
        images, overlap, used = found.images.value, found.overlap.value, found.used.value
        sums = Sums(images, overlap, used, sums_of_rows.total(cost).value)
        return found.codes, sums, cost

    def improved(z: Array, energy: Array, codes: Array) -> tuple[Array, Array]:
        products = inner_products(atoms, z)
        codes = coding.improve(codes, products, gram, alpha, SWEEPS, nonnegative)
        return codes, _gained(energy, codes, products, gram, alpha)

    def summed(z: Array, codes: Array) -> tuple[Array, ...]:
        return weighted_sums(codes, z), matmul(codes, codes.T), jnp.sum(jnp.abs(codes), axis=1)

    if N > sums_of_rows.MOST_ROWS and jax.default_backend() == "cpu":
        codes, cost, totals = _by_blocks(improved, summed, Z, energy, codes)
    else:
        # Few rows, or a device without such a cache, which runs large steps faster.
        codes, cost = improved(Z, energy, codes)

        def part(first: Array | int, count: int) -> tuple[Array, ...]:
            some = jax.lax.dynamic_slice_in_dim(codes, first, count, axis=1)
            return summed(sums_of_rows.block_of(Z, first, count), some)

        size = N if N <= sums_of_rows.MOST_ROWS else sums_of_rows.rows_of_block(D)
        totals = sums_of_rows.add_up(part, N, size)
    cost = _where_it_cancels(Z, energy, codes, atoms, alpha, cost)
    images, overlap, used = (wide.value for wide in totals)
    return codes, Sums(images, overlap, used, sums_of_rows.total(cost).value), cost


def _by_blocks(
    improved: Callable[[Array, Array, Array], tuple[Array, Array]],
    summed: Callable[[Array, Array], tuple[Array, ...]],
    Z: Float[Array, "N D"],
    energy: Float[Array, " N"],
    codes: Float[Array, "K N"],
) -> tuple[Float[Array, "K N"], Float[Array, " N"], Any]:
    """Returns codes, costs and sums, computed for as many rows at a time as a cache holds.

    Each improvement of a code reads all of them, and the rows are read once for all products.
    """
    N, D = Z.shape
    size = min(max(sums_of_rows.BLOCK // D, sums_of_rows.LEAST_ROWS), sums_of_rows.MOST_ROWS)

    def block(first: Array | int, count: int, codes: Array, cost: Array) -> tuple:
        z, part = (sums_of_rows.block_of(values, first, count) for values in (Z, energy))
        some = jax.lax.dynamic_slice_in_dim(codes, first, count, axis=1)
        some, of_rows = improved(z, part, some)
        codes = jax.lax.dynamic_update_slice_in_dim(codes, some, first, 1)
        return codes, jax.lax.dynamic_update_slice_in_dim(cost, of_rows, first, 0), summed(z, some)

    def plus(totals: Any, parts: tuple[Array, ...]) -> Any:
        return tuple(total + part for total, part in zip(totals, parts, strict=True))

    def step(i: Array, carry: tuple) -> tuple:
        *rest, totals = carry
        *rest, parts = block(i * size, size, *rest)
        return *rest, plus(totals, parts)

    whole, rest = divmod(N, size)
    shaped = jax.eval_shape(lambda: block(0, size, codes, energy)[-1])
    zeros = tuple(Wide(*jnp.zeros((2, *each.shape), each.dtype)) for each in shaped)
    carry = (codes, jnp.zeros_like(energy), zeros)
    codes, cost, totals = jax.lax.fori_loop(0, whole, step, carry)
    if rest:
        codes, cost, parts = block(whole * size, rest, codes, cost)
        totals = plus(totals, parts)
    return codes, cost, totals


@partial(jit, static_argnames="nonnegative")
def activations(
    Z: Float[Array, "N D"],
    atoms: Float[Array, "K D"],
    alpha: Float[Array, ""] | float,
    nonnegative: bool = True,
) -> Float[Array, "N K"]:
    """Returns the codes of new rows on fixed atoms."""
    products, gram = inner_products(atoms, Z), matmul(atoms, atoms.T)
    return coding.encode(products, gram, alpha, nonnegative=nonnegative).T


def objective(
    Z: Float[Array, "N D"],
    codes: Float[Array, "K N"],
    atoms: Float[Array, "K D"],
    alpha: Float[Array, ""] | float,
) -> Float[Array, ""]:
    """Returns f from the residual itself, without the cancellation in the form that updates use."""
    return sums_of_rows.total(costs(Z, codes, atoms, alpha)).value


def costs(
    Z: Float[Array, "N D"],
    codes: Float[Array, "K N"],
    atoms: Float[Array, "K D"],
    alpha: Float[Array, ""] | float,
) -> Float[Array, " N"]:
    """Returns each row's share of f, like `objective`."""
    squares = residual.of_products(Z, codes.T, atoms)
    return 0.5 * squares + alpha * jnp.sum(jnp.abs(codes), axis=0)


def _cost(
    Z: Float[Array, "N D"],
    energy: Float[Array, " N"],
    codes: Float[Array, "K N"],
    atoms: Float[Array, "K D"],
    products: Float[Array, "K N"],
    gram: Float[Array, "K K"],
    alpha: Float[Array, ""],
) -> Float[Array, " N"]:
    cost = _gained(energy, codes, products, gram, alpha)
    return _where_it_cancels(Z, energy, codes, atoms, alpha, cost)


def _gained(
    energy: Float[Array, " N"],
    codes: Float[Array, "K N"],
    products: Float[Array, "K N"],
    gram: Float[Array, "K K"],
    alpha: Float[Array, ""],
) -> Float[Array, " N"]:
    # 1/2 |z - u V|^2 = 1/2 |z|^2 - u (V z - 1/2 V V^T u), without forming the residual [N, D].
    gain = products - 0.5 * matmul(gram, codes) - alpha * jnp.sign(codes)
    # Uses a product: a CPU adds along the first axis several times slower.
    ones = jnp.ones(len(codes), codes.dtype)
    return energy - matmul(ones, codes * gain)


def _where_it_cancels(
    Z: Float[Array, "N D"],
    energy: Float[Array, " N"],
    codes: Float[Array, "K N"],
    atoms: Float[Array, "K D"],
    alpha: Float[Array, ""],
    cost: Float[Array, " N"],
) -> Float[Array, " N"]:
    """Returns the cost, from the residual where differences have lost its digits."""
    N, D = Z.shape
    ones = jnp.ones(len(codes), codes.dtype)
    size = min(sums_of_rows.rows_of_block(D, least=1), sums_of_rows.MOST_ROWS)
    size = max(min(size, N), 1)

    def from_residual(i: Array, cost: Array) -> Array:
        first = jnp.minimum(i * size, N - size)  # the last block reaches back
        z, part = (sums_of_rows.block_of(values, first, size) for values in (Z, energy))
        some = jax.lax.dynamic_slice_in_dim(codes, first, size, axis=1)
        # Z may have fewer columns than the energy, which then lacks the same amount at any codes.
        outside = jnp.maximum(part - 0.5 * jnp.sum(z**2, axis=1), 0)
        squares = jnp.sum((z - matmul(some.T, atoms)) ** 2, axis=1)
        found = outside + 0.5 * squares + alpha * matmul(ones, jnp.abs(some))
        return jax.lax.dynamic_update_slice_in_dim(cost, found, first, 0)

    # A loop over all blocks or none: under vmap, lax.cond would execute both branches. Each step
    # depends on its number; XLA moves what does not out of the loop, and would always compute it.
    cancels = jnp.sum(cost) < CANCELS * jnp.sum(energy)

    def by_blocks() -> Array:
        return jax.lax.fori_loop(0, jnp.where(cancels, -(-N // size), 0), from_residual, cost)

    if jax.default_backend() == "cpu":
        return by_blocks()
    # Without vmap, a branch tells an accelerator's compiler that the loop is for rare cases.
    return jax.lax.cond(cancels, by_blocks, lambda: cost)


class Given(NamedTuple):
    """Inputs of a run other than Z."""

    key: PRNGKeyArray
    alpha: Float[Array, ""]
    tol: Float[Array, ""]
    atoms: Float[Array, "K D"] | None
    counts: Counts


class Fixed(NamedTuple):
    """What no update changes. Without compressed rows, basis and X are None."""

    alpha: Float[Array, ""]
    energy: Float[Array, " N"]
    basis: Float[Array, "D R"] | None
    X: Float[Array, "N R"] | None  # Z in the few columns of `compression`
    active: Bool[Array, "Q K"]  # which atoms are in use, for each number of concepts
    starts: Float[Array, "Q S K R"] | None  # None if atoms were given


class Plan(NamedTuple):
    """Settings that are fixed at compile time, and the phases of the solver."""

    most: int  # K, the number of atoms of all runs, of which some may not be in use
    columns: int  # of the compressed Z
    nonnegative: bool
    room: int  # number of updates that the history has room for
    n_init: int
    from_atoms: bool

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Phases in the order they run."""
        repeated = Phase(self.improve, repeats=True)
        if self.from_atoms:
            return Phase(self.take_atoms), repeated, Phase(self.finish)
        in_columns = Phase(self.explore), Phase(self.improve_in_columns, repeats=True)
        return *in_columns, Phase(self.lift), repeated, Phase(self.finish)

    def runs(self, counts: Counts) -> tuple[int, ...]:
        """Returns the number of concepts of each run."""
        return one_run_each(counts)

    def _active(self, counts: Counts) -> Bool[Array, "Q K"]:
        return jnp.arange(self.most) < counts.num_concepts[:, None]

    def take_atoms(self, Z: Array, given: tuple, limit: Any, rows: Rows) -> Carry:
        """Starts from the given atoms."""
        _, alpha, tol, atoms, counts = given
        alpha, energy, active = alpha.astype(real_dtype(Z)), energies(Z), self._active(counts)
        atoms = atoms / _length(atoms)
        problem = Problem(Z, energy, alpha, active[0])
        progress = begin(uncoded(problem, atoms, rows), self.room)
        progress = jax.tree.map(lambda leaf: leaf[None], progress)
        return Carry(tol, Fixed(alpha, energy, None, None, active, None), progress)

    def explore(self, Z: Array, given: tuple, limit: Any, rows: Rows) -> Carry:
        """Compresses the rows, and starts from the best of several starts on a sample of them."""
        energy = energies(Z)
        basis, X = turn_to_axes(compress(Z, given[0], self.columns, rows), rows)
        carry = self._begun(X, energy, given, rows)
        return carry._replace(fixed=carry.fixed._replace(basis=basis, X=X))

    def _begun(self, X: Array, energy: Array, given: tuple, rows: Rows) -> Carry:
        """Starts on rows X whose columns are principal axes."""
        key, alpha, tol, _, counts = given
        active, alpha = self._active(counts), alpha.astype(real_dtype(X))

        def best(active: Array) -> tuple[Progress, Array]:
            problem, screen = Problem(X, energy, alpha, active), counts.max_iter
            of_starts = counts.num_samples, self.n_init, tol, jnp.minimum(SCREEN, screen)
            atoms, starts = _best_start(problem, key, *of_starts, self.nonnegative, rows)
            return begin(uncoded(problem, atoms, rows), self.room), starts

        progress, starts = each(best)(active)
        return Carry(tol, Fixed(alpha, energy, None, None, active, starts), progress)

    def improve_in_columns(self, Z: Array, carry: Carry, limit: Any, rows: Rows) -> Carry:
        """Runs updates on the compressed rows."""
        return self._run(carry.fixed.X, carry, limit, rows)

    def lift(self, Z: Array, carry: Carry, limit: Any, rows: Rows) -> Carry:
        """Maps the atoms back to all columns."""
        fixed = carry.fixed

        def raise_one(progress: Progress, active: Array) -> Progress:
            small, codes = progress.state
            problem = Problem(Z, fixed.energy, fixed.alpha, active)
            atoms = matmul(small.atoms, fixed.basis.T)
            state = init(problem, small.scale[:, None] * codes, atoms, rows)
            return progress._replace(state=state)

        progress = each(raise_one)(carry.progress, fixed.active)
        return Carry(carry.tol, fixed._replace(basis=None, X=None), progress)

    def improve(self, Z: Array, carry: Carry, limit: Any, rows: Rows) -> Carry:
        """Runs updates on Z."""
        return self._run(Z, carry, limit, rows)

    def _run(self, Z: Array, carry: Carry, limit: Any, rows: Rows) -> Carry:
        tol, fixed, progress = carry

        def one(progress: Progress, active: Array) -> Progress:
            problem = Problem(Z, fixed.energy, fixed.alpha, active)
            step = partial(update, problem, rows=rows, nonnegative=self.nonnegative)
            return run(step, progress, tol=tol, max_iter=limit)

        return carry._replace(progress=each(one)(progress, fixed.active))

    def finish(self, Z: Array, carry: Carry, limit: Any, rows: Rows) -> Result:
        """Encodes the rows on the final atoms."""
        tol, fixed, progress = carry
        alpha = fixed.alpha

        def one(progress: Progress) -> Result:
            small, codes = progress.state
            codes = small.scale[:, None] * codes
            products, gram = inner_products(small.atoms, Z), matmul(small.atoms, small.atoms.T)
            codes = coding.encode(products, gram, alpha, codes, nonnegative=self.nonnegative)
            ended = rows.total(objective(Z, codes, small.atoms, alpha))
            return Result(
                components=small.atoms,
                activations=codes.T,
                objective=ended,
                iterations=progress.iteration,
                converged=small.error <= tol,
                history=progress.history.at[progress.iteration].set(ended),
            )

        return each(one)(progress)._replace(starts=fixed.starts)


def plan(
    key: PRNGKeyArray,
    *,
    width: int,
    num_samples: int,
    num_concepts: tuple[int, ...],
    alpha: Float[Array, ""] | float = 1.0,
    nonnegative: bool = True,
    tol: Float[Array, ""] | float = 1e-6,
    max_iter: int = 1000,
    n_init: int | None = None,
    init_atoms: Float[Array | np.ndarray, "K D"] | None = None,
) -> tuple[Plan, Given]:
    """Returns how to factor Z[N, width] for each of Q numbers of concepts.

    Args:
        key: random key.
        width: number of columns of Z.
        num_samples: number of leading rows of Z that count; the others must be zero.
        num_concepts: Q numbers of concepts.
        alpha: weight of the l1 penalty, in units of Z.
        nonnegative: whether codes must be >= 0.
        tol: see the head of this file.
        max_iter: maximum number of updates.
        n_init: number of starts; None for 8 up to 64 concepts and 2 above, where starts cost more
            and differ less.
        init_atoms: float[K, D] to start from; None to search for a start.

    Returns:
        the plan and its inputs. The result of a solve has a leading axis Q; its atoms beyond a
        run's own number are zero, and its history is that of the start that was kept.
    """
    n_init = n_init or (8 if max(num_concepts) <= 64 else 2)
    from_atoms = init_atoms is not None
    most = bucket_of_concepts(max(num_concepts), num_samples, width, ATOMS)
    if init_atoms is not None:
        missing = most - len(init_atoms)
        init_atoms = jnp.pad(jnp.asarray(init_atoms), ((0, missing), (0, 0)))
    columns = min(most + OVERSAMPLE, bucket_of_rows(num_samples, width), width)
    fixed = Plan(most, columns, nonnegative, room_for(max_iter), n_init, from_atoms)
    counts = Counts.of(num_samples, num_concepts, max_iter)
    return fixed, Given(key, scalar(alpha), scalar(tol), init_atoms, counts)


def solve(
    Z: Float[Array, "N D"], key: PRNGKeyArray, *, mesh: Mesh | None = None, **options: Any
) -> Result:
    """Factors Z in one compiled program; the options are those of `plan`."""
    return run_compiled(*plan(key, width=Z.shape[1], **options), Z, mesh)


def _best_start(
    problem: Problem,
    key: PRNGKeyArray,
    num_samples: Int[Array, ""],
    n_init: int,
    tol: Float[Array, ""],
    max_iter: Int[Array, ""],
    nonnegative: bool,
    rows: Rows,
) -> tuple[Float[Array, "K R"], Float[Array, "S K R"]]:
    """Returns the atoms of the best start on a sample of the rows, and where every start ended."""
    K = len(problem.active)
    row_key, start_key = jax.random.split(key)
    numbers = sample(row_key, num_samples, K, len(problem.Z), rows)
    X, energy = rows.take(problem.Z, numbers), rows.take(problem.energy, numbers)
    sampled = Problem(X, energy, problem.alpha, problem.active)

    def attempt(atoms: Array) -> State:
        progress = begin(uncoded(sampled, atoms), SCREEN)
        step = partial(update, sampled, nonnegative=nonnegative)
        return run(step, progress, tol=tol, max_iter=max_iter).state

    count = jnp.minimum(num_samples, len(X))
    atoms = first_atoms(X, start_key, K, n_init, count) * problem.active[:, None]
    ended = each(attempt)(atoms)
    starts = best_first(ended.small.objective, ended.small.atoms)
    return starts[0], starts


def first_atoms(
    X: Float[Array, "N R"],
    key: PRNGKeyArray,
    num_concepts: int,
    n_init: int,
    num_samples: Int[Array, ""] | int | None = None,
) -> Float[Array, "S K R"]:
    """Returns atoms to start from, for rows whose columns are principal axes (see `turn_to_axes`).

    U >= 0 gives each axis two signs, and a plain SVD start discards one at random. The first start
    takes the K signed axes that carry most energy; the second takes K axes with the better sign
    each; the others take random unit rows.

    Args:
        X: float[N, R].
        key: random key.
        num_concepts: number of atoms K.
        n_init: number of starts S.
        num_samples: number of leading rows of X that count; None for all.
    """
    K, R = num_concepts, X.shape[1]
    counted = jnp.arange(len(X)) < (len(X) if num_samples is None else num_samples)
    carried = jnp.concatenate(
        [jnp.sum(jnp.maximum(X, 0) ** 2, axis=0), jnp.sum(jnp.minimum(X, 0) ** 2, axis=0)]
    )
    axes = jnp.eye(R, dtype=X.dtype)
    both = jnp.concatenate([axes, -axes])
    better = jnp.where((carried[:R] >= carried[R:])[:, None], axes, -axes)

    def drawn(key: Array) -> Array:
        chosen = X[top_k(jnp.where(counted, jax.random.uniform(key, (len(X),)), -1), K)[1]]
        return chosen / _length(chosen)

    # If K exceeds the number of signed axes, rows fill in for the missing atoms.
    filler = drawn(jax.random.fold_in(key, n_init))
    first = jnp.concatenate([both[jnp.argsort(-carried)], filler])[:K]
    second = jnp.concatenate([better, filler])[:K]
    others = jax.vmap(drawn)(jax.random.split(key, n_init))
    return jnp.concatenate([jnp.stack([first, second]), others])[:n_init]


def energies(Z: Float[Array, "N D"]) -> Float[Array, " N"]:
    """Returns 1/2 |z_n|^2."""
    return 0.5 * jnp.sum(jnp.square(Z.astype(real_dtype(Z))), axis=1)


def _length(rows: Float[Array, "K D"]) -> Float[Array, "K 1"]:
    length = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return jnp.where(length > 0, length, 1)
