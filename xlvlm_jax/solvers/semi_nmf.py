"""Sparse semi-nonnegative matrix factorisation, also called non-negative dictionary learning.

    minimise   f(U, V) = 1/2 |Z - U V|_F^2 + alpha sum(U)
    over       U[N, K] >= 0 and V[K, D] with |V_k|_2 <= 1

Z and the atoms V may have any sign; only the codes U may not. `tol` is compared to the mean
relative decrease of f over the last WINDOW updates.

Semi-NMF: Ding, Li and Jordan, "Convex and semi-nonnegative matrix factorizations", TPAMI 2010; the
penalty and the unit ball: Mairal et al., "Online dictionary learning for sparse coding", ICML 2009.
One update is coordinate descent on the codes (through the K x K Gram matrix of the atoms), then
block coordinate descent on the atoms (through U^T Z and U^T U), both from an extrapolated point. An
update that raises f is undone and the extrapolation starts again (O'Donoghue and Candes, "Adaptive
restart for accelerated gradient schemes", 2015), so f never rises.

f is not convex. `solve` therefore tries `n_init` starts, and does it where that costs little:
optimal atoms lie in the row space of Z, of which a random projection keeps the leading part (Halko,
Martinsson and Tropp, 2011). The best start is finished there, then on Z itself.

Codes are held as [K, N] and not [N, K]: a coordinate's values are then contiguous.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from xlvlm_jax.solvers.loop import Progress, Result, begin, image, matmul, run

WINDOW = 5  # updates that the stopping rule looks back: after a restart one alone can be very small
SWEEPS = 2  # coordinate sweeps on the codes in one update; they are exact only in the limit
OVERSAMPLE = 44  # columns of the compressed Z beyond K
SCREEN = 120  # updates after which the starts are compared
MARGIN = 1e-4  # relative decrease of f that makes a later start better than an earlier one
TINY = 1e-30


class Problem(NamedTuple):
    """Constants of a run."""

    Z: Float[Array, "N D"]  # rows that pad Z on a mesh are zero, and so are their codes
    energy: Float[Array, " N"]  # 1/2 |z_n|^2 of the uncompressed rows
    alpha: Float[Array, ""]


class Point(NamedTuple):
    """Where f is evaluated."""

    codes: Float[Array, "K N"]
    atoms: Float[Array, "K D"]
    products: Float[Array, "K N"]  # V Z^T, kept because it extrapolates together with V


class State(NamedTuple):
    """What an update reads and writes."""

    point: Point
    before: Point  # the point one update earlier; extrapolation goes from it through `point`
    momentum: Float[Array, ""]  # Nesterov's t; 1 means that the next update is a plain one
    recent: Float[Array, " W"]  # the last WINDOW objectives, oldest first
    objective: Float[Array, ""]
    error: Float[Array, ""]


def init(problem: Problem, codes: Float[Array, "K N"], atoms: Float[Array, "K D"]) -> State:
    """The state at given codes and atoms, the latter inside the unit ball."""
    point = Point(codes, atoms, matmul(atoms, problem.Z.T))
    objective = jnp.sum(_row_objective(problem, point))
    inf = jnp.float32(jnp.inf)
    recent = jnp.full(WINDOW, inf).at[-1].set(objective)
    return State(point, point, jnp.float32(1), recent, objective, inf)


def update(problem: Problem, state: State) -> State:
    """One pass over the codes and the atoms. Never returns a state of higher objective."""
    momentum = (1 + jnp.sqrt(1 + 4 * state.momentum**2)) / 2
    y = _extrapolate(state.point, state.before, (state.momentum - 1) / momentum)

    gram = matmul(y.atoms, y.atoms.T)
    codes = sweep(y.codes, y.products, gram, problem.alpha, SWEEPS)
    overlap = matmul(codes, codes.T)
    atoms = _update_atoms(y.atoms, matmul(codes, problem.Z), overlap)

    unused = jnp.diagonal(overlap) <= 0
    atoms = jax.lax.cond(
        jnp.any(unused),
        lambda: _revive(problem, Point(codes, atoms, y.products), y.atoms, unused),
        lambda: atoms,
    )
    codes, atoms = _to_unit_norm(codes, atoms)
    point = Point(codes, atoms, matmul(atoms, problem.Z.T))
    objective = jnp.sum(_row_objective(problem, point))

    # A plain step cannot raise f; were it judged by float32's rounding of f, runs would end early.
    accepted = (objective <= state.objective) | (state.momentum <= 1)
    point = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), point, state.point)
    objective = jnp.minimum(objective, state.objective)
    recent = jnp.concatenate([state.recent[1:], objective[None]])
    # A revived atom has jumped, and a jump must not be extrapolated.
    restart = ~accepted | jnp.any(unused)
    return State(
        point=point,
        before=jax.tree.map(lambda new, old: jnp.where(restart, new, old), point, state.point),
        momentum=jnp.where(restart, 1.0, momentum),
        recent=recent,
        objective=objective,
        error=(state.recent[0] - objective) / (WINDOW * jnp.maximum(objective, TINY)),
    )


def sweep(
    codes: Float[Array, "K N"],
    products: Float[Array, "K N"],
    gram: Float[Array, "K K"],
    alpha: Float[Array, ""] | float,
    sweeps: int,
) -> Float[Array, "K N"]:
    """Minimise exactly over one coordinate of all rows' codes after the other, `sweeps` times."""
    K = gram.shape[0]

    def coordinate(i: Array, codes: Array) -> Array:
        k = i % K
        step = (products[k] - alpha - matmul(gram[k], codes)) / jnp.maximum(gram[k, k], TINY)
        return codes.at[k].set(jnp.where(gram[k, k] > 0, jnp.maximum(codes[k] + step, 0), 0))

    return jax.lax.fori_loop(0, sweeps * K, coordinate, codes)


def encode(
    Z: Float[Array, "N D"],
    atoms: Float[Array, "K D"],
    alpha: Float[Array, ""] | float,
    codes: Float[Array, "K N"] | None = None,
    *,
    tol: float = 1e-7,
    max_sweeps: int = 1000,
) -> Float[Array, "K N"]:
    """The codes that minimise f with the atoms fixed: a non-negative lasso for each row.

    Stops when no code moves by more than `tol` times the largest code of all.
    """
    gram, products = matmul(atoms, atoms.T), matmul(atoms, Z.T)

    def unfinished(carry: tuple) -> Array:
        _, change, sweeps = carry
        return (change > tol) & (sweeps < max_sweeps)

    def step(carry: tuple) -> tuple:
        old, _, sweeps = carry
        new = sweep(old, products, gram, alpha, 1)
        largest = jnp.max(new, initial=TINY)
        change = jnp.max(jnp.abs(new - old), initial=0) / largest
        return new, change, sweeps + 1

    codes = jnp.zeros_like(products) if codes is None else codes
    start = (codes, jnp.float32(jnp.inf), jnp.int32(0))
    return jax.lax.while_loop(unfinished, step, start)[0]


@jax.jit
def activations(
    Z: Float[Array, "N D"], atoms: Float[Array, "K D"], alpha: Float[Array, ""] | float
) -> Float[Array, "N K"]:
    """The codes of new rows on fixed atoms, see `encode`."""
    return encode(Z, atoms, alpha).T


def objective(
    Z: Float[Array, "N D"],
    codes: Float[Array, "K N"],
    atoms: Float[Array, "K D"],
    alpha: Float[Array, ""] | float,
) -> Float[Array, ""]:
    """f from the residual itself, without the cancellation of the form that the updates use."""
    residual = Z - matmul(codes.T, atoms)
    return 0.5 * jnp.sum(residual**2) + alpha * jnp.sum(codes)


@partial(jax.jit, static_argnames=("num_samples", "num_concepts", "max_iter", "n_init"))
def solve(
    Z: Float[Array, "N D"],
    key: PRNGKeyArray,
    *,
    num_samples: int,
    num_concepts: int,
    alpha: Float[Array, ""] | float = 1.0,
    tol: Float[Array, ""] | float = 1e-6,
    max_iter: int = 1000,
    n_init: int = 8,
    init_atoms: Float[Array, "K D"] | None = None,
) -> Result:
    """Factor Z; see the head of this file. Rows from `num_samples` on must be zero.

    The history is that of the start that was kept.
    """
    energy = 0.5 * jnp.sum(jnp.square(Z.astype(jnp.float32)), axis=1)
    alpha = jnp.float32(alpha)
    sketch_key, start_key = jax.random.split(key)
    full = Problem(Z, energy, alpha)

    if init_atoms is None:
        basis, compressed = compress(Z, sketch_key, min(num_concepts + OVERSAMPLE, num_samples))
        small = Problem(compressed, energy, alpha)
        progress = _best_start(small, start_key, num_samples, num_concepts, n_init, tol, max_iter)
        point = progress.state.point
        state = init(full, point.codes, matmul(point.atoms, basis.T))
        progress = progress._replace(state=state)
    else:
        codes, atoms = _to_unit_norm(
            jnp.zeros((num_concepts, Z.shape[0])), init_atoms.astype(jnp.float32)
        )
        progress = begin(init(full, codes, atoms), max_iter)

    progress = run(partial(update, full), progress, tol=tol, max_iter=max_iter)
    atoms = progress.state.point.atoms
    codes = encode(Z, atoms, alpha, progress.state.point.codes)
    return Result(
        components=atoms,
        activations=codes.T[:num_samples],
        objective=objective(Z, codes, atoms, alpha),
        iterations=progress.iteration,
        converged=progress.state.error <= tol,
        history=progress.history,
    )


def compress(
    Z: Float[Array, "N D"], key: PRNGKeyArray, width: int
) -> tuple[Float[Array, "D R"], Float[Array, "N R"]]:
    """An orthonormal basis W of the leading row space of Z, largest direction first, and Z W.

    One pass of the randomised range finder of Halko, Martinsson and Tropp, section 4.5.
    """
    D = Z.shape[1]
    sketch = matmul(Z, jax.random.normal(key, (D, min(width, D))))
    basis = jnp.linalg.qr(image(Z, sketch))[0]
    compressed = matmul(Z, basis)
    _, axes = jnp.linalg.eigh(matmul(compressed.T, compressed))
    axes = axes[:, ::-1]
    return matmul(basis, axes), matmul(compressed, axes)


def starts(
    problem: Problem, key: PRNGKeyArray, num_samples: int, num_concepts: int, n_init: int
) -> Float[Array, "S K R"]:
    """Atoms to start from, for a Z whose columns are its principal axes (as `compress` returns it).

    U >= 0 leaves each axis with two signs, and a plain SVD start throws one away at random. The
    first start takes, of all signed axes, the K that carry most; the second each of K axes with its
    better sign; the others unit rows of Z drawn at random.
    """
    K, R = num_concepts, problem.Z.shape[1]
    axes = jnp.eye(R)
    carried = jnp.concatenate(
        [
            jnp.sum(jnp.maximum(problem.Z, 0) ** 2, axis=0),
            jnp.sum(jnp.minimum(problem.Z, 0) ** 2, axis=0),
        ]
    )
    both = jnp.concatenate([axes, -axes])
    better = jnp.where((carried[:R] >= carried[R:])[:, None], axes, -axes)

    def rows(key: Array) -> Array:
        draw = jax.random.uniform(key, (num_samples,))
        return _unit(problem.Z[jax.lax.top_k(draw, K)[1]])

    # When K exceeds the number of signed axes the missing atoms are rows.
    filler = rows(jax.random.fold_in(key, n_init))
    first = jnp.concatenate([both[jnp.argsort(-carried)], filler])[:K]
    second = jnp.concatenate([better, filler])[:K]
    drawn = jax.vmap(rows)(jax.random.split(key, n_init))
    return jnp.concatenate([jnp.stack([first, second]), drawn])[:n_init]


def _best_start(
    problem: Problem,
    key: PRNGKeyArray,
    num_samples: int,
    num_concepts: int,
    n_init: int,
    tol: Float[Array, ""] | float,
    max_iter: int,
) -> Progress:
    """Run every start for SCREEN updates, then the one that got lowest to its end."""
    atoms = starts(problem, key, num_samples, num_concepts, n_init)
    codes = jnp.zeros((num_concepts, problem.Z.shape[0]))

    def attempt(i: Array, best: Progress) -> Progress:
        # One loop does both, so that the update is compiled once: the last turn continues the best.
        fresh = begin(init(problem, codes, atoms[jnp.minimum(i, n_init - 1)]), max_iter)
        last = i == n_init
        first = jax.tree.map(lambda old, new: jnp.where(last, old, new), best, fresh)
        limit = jnp.where(last, max_iter, min(SCREEN, max_iter))
        ended = run(partial(update, problem), first, tol=tol, max_iter=limit)
        # Of equally good starts the earlier one is kept, whatever rounding makes of them.
        better = last | (ended.state.objective < (1 - MARGIN) * best.state.objective)
        return jax.tree.map(lambda new, old: jnp.where(better, new, old), ended, best)

    none = begin(init(problem, codes, atoms[0]), max_iter)
    none = none._replace(state=none.state._replace(objective=jnp.float32(jnp.inf)))
    return jax.lax.fori_loop(0, n_init + 1, attempt, none)


def _row_objective(problem: Problem, point: Point) -> Float[Array, " N"]:
    # 1/2 |z - u V|^2 = 1/2 |z|^2 - u (V z - 1/2 V V^T u), without forming the residual [N, D].
    fitted = matmul(matmul(point.atoms, point.atoms.T), point.codes)
    gain = point.products - 0.5 * fitted - problem.alpha
    return problem.energy - jnp.sum(point.codes * gain, axis=0)


def _extrapolate(point: Point, before: Point, weight: Float[Array, ""]) -> Point:
    ahead = jax.tree.map(lambda new, old: new + weight * (new - old), point, before)
    scale = 1 / jnp.maximum(1, jnp.linalg.norm(ahead.atoms, axis=1, keepdims=True))
    return Point(jnp.maximum(ahead.codes, 0), scale * ahead.atoms, scale * ahead.products)


def _update_atoms(
    atoms: Float[Array, "K D"], products: Float[Array, "K D"], overlap: Float[Array, "K K"]
) -> Float[Array, "K D"]:
    """Minimise exactly over one atom after the other; products = U^T Z, overlap = U^T U."""

    def one(k: Array, atoms: Array) -> Array:
        gradient = matmul(overlap[k], atoms) - products[k]
        atom = atoms[k] - gradient / jnp.maximum(overlap[k, k], TINY)
        atom = atom / jnp.maximum(1, jnp.linalg.norm(atom))
        return atoms.at[k].set(jnp.where(overlap[k, k] > 0, atom, atoms[k]))

    return jax.lax.fori_loop(0, atoms.shape[0], one, atoms)


def _revive(
    problem: Problem, point: Point, coded_with: Float[Array, "K D"], unused: Bool[Array, " K"]
) -> Float[Array, "K D"]:
    """Point each unused atom at a residual: the j-th of them at that of the j-th worst coded row.

    Codes of unused atoms are zero, so this leaves f as it is. An atom that no residual longer than
    alpha could use stays.
    """
    K = unused.shape[0]
    cost = _row_objective(problem, point._replace(atoms=coded_with))
    penalty = problem.alpha * jnp.sum(point.codes, axis=0)
    worst = jax.lax.top_k(cost - penalty, K)[1]
    residual = problem.Z[worst] - matmul(point.codes[:, worst].T, point.atoms)
    length = jnp.linalg.norm(residual, axis=1)
    order = jnp.cumsum(unused) - 1
    useful = unused & (length[order] > problem.alpha)
    return jnp.where(useful[:, None], _unit(residual)[order], point.atoms)


def _to_unit_norm(
    codes: Float[Array, "K N"], atoms: Float[Array, "K D"]
) -> tuple[Float[Array, "K N"], Float[Array, "K D"]]:
    # Inside the ball, longer atoms with smaller codes fit the same and cost less.
    norm = jnp.linalg.norm(atoms, axis=1, keepdims=True)
    norm = jnp.where(norm > 0, norm, 1)
    return codes * norm, atoms / norm


def _unit(rows: Float[Array, "K D"]) -> Float[Array, "K D"]:
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), TINY)
