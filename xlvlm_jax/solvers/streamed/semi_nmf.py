"""Semi-NMF on a source of rows: `solvers.semi_nmf` with one pass over the source per update."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from xlvlm_jax.solvers import phases, semi_nmf
from xlvlm_jax.solvers import semi_nmf_atoms as dictionary
from xlvlm_jax.solvers import semi_nmf_codes as coding
from xlvlm_jax.solvers.collectives import Rows
from xlvlm_jax.solvers.linalg import inner_products, matmul
from xlvlm_jax.solvers.loop import Progress, Result, each
from xlvlm_jax.solvers.phases import Carry, Phase, Standing, Tell
from xlvlm_jax.solvers.semi_nmf_atoms import Atoms, Sums
from xlvlm_jax.solvers.streamed.columns import compress, leading, turn_to_axes
from xlvlm_jax.solvers.streamed.tiles import (
    Largest,
    Source,
    Tile,
    Write,
    add_up,
    give_back,
    values_of,
    write_out,
)
from xlvlm_jax.solvers.sums import total


class InColumns(semi_nmf.Plan):
    """A plan for rows on their principal axes, without a second matrix of their size."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Phases in the order they run."""
        repeated = Phase(self.improve, repeats=True)
        return Phase(self.explore), repeated, Phase(self.start_again), repeated, Phase(self.finish)

    def explore(self, Z: Array, given: tuple, limit: Any, rows: Rows) -> Carry:
        """Starts from the best of several starts on a sample of the rows."""
        return self._begun(Z, semi_nmf.energies(Z), given, rows)

    def start_again(self, Z: Array, carry: Carry, limit: Any, rows: Rows) -> Carry:
        """Forgets the momentum: updates without it may find more, and cost little here."""

        def one(progress: Progress) -> Progress:
            small, codes = progress.state
            state = semi_nmf.State(
                dictionary.begin(small.atoms, small.objective), small.scale[:, None] * codes
            )
            return progress._replace(state=state)

        return carry._replace(progress=each(one)(carry.progress))

    def finish(self, Z: Array, carry: Carry, limit: Any, rows: Rows) -> Result:
        """Encodes the rows on the final atoms, block by block."""
        tol, fixed, progress = carry
        # An accelerator encodes all rows together.
        size = min(coding.TOGETHER, len(Z)) if jax.default_backend() == "cpu" else len(Z)

        def one(progress: Progress) -> Result:
            small, codes = progress.state

            def block(i: Array, found: tuple[Array, Array]) -> tuple[Array, ...]:
                first = jnp.minimum(i * size, len(Z) - size)  # the last block reaches back
                z = jax.lax.dynamic_slice_in_dim(Z, first, size)
                start = jax.lax.dynamic_slice_in_dim(codes, first, size, axis=1)
                start = small.scale[:, None] * start
                parts = _encoded(z, start, small.atoms, fixed.alpha, self.nonnegative)
                return tuple(
                    jax.lax.dynamic_update_slice_in_dim(whole, part, first, 0)
                    for whole, part in zip(found, parts, strict=True)
                )

            empty = jnp.zeros(codes.shape[::-1], codes.dtype), jnp.zeros_like(fixed.energy)
            activations, cost = jax.lax.fori_loop(0, -(-len(Z) // size), block, empty)
            ended = total(cost).value
            return Result(
                components=small.atoms,
                activations=activations,
                objective=ended,
                iterations=progress.iteration,
                converged=small.error <= tol,
                history=progress.history.at[progress.iteration].set(ended),
            )

        return each(one)(progress)._replace(starts=fixed.starts)


def in_columns(
    shape: tuple[int, int], key: PRNGKeyArray, *, num_concepts: int, **options: Any
) -> tuple[InColumns, semi_nmf.Given, jax.ShapeDtypeStruct]:
    """Returns how rows are factored in memory in a few columns, and the shape of these.

    Args:
        shape: (N, D) of the rows.
        key: random key.
        num_concepts: K.
        **options: as for `semi_nmf.plan`.
    """
    N, D = shape
    X = jax.ShapeDtypeStruct((N, min(num_concepts + semi_nmf.OVERSAMPLE, N, D)), jnp.float32)
    plan, given = semi_nmf.plan(
        key, width=X.shape[1], num_samples=N, num_concepts=(num_concepts,), **options
    )
    return InColumns(*plan), given, X


def solve(
    source: Source,
    key: PRNGKeyArray,
    write: Write,
    tell: Tell | None = None,
    *,
    num_concepts: int,
    alpha: float = 1.0,
    nonnegative: bool = True,
    tol: float = 1e-6,
    max_iter: int = 1000,
    n_init: int | None = None,
) -> Result:
    """Does `semi_nmf.solve` for one number of concepts; activations go to `write(start, rows)`."""
    N, D = source.shape
    K = num_concepts
    origin = jnp.zeros(D, jnp.float32)  # the model has no mean
    plan, given, shape = in_columns(
        (N, D),
        key,
        num_concepts=K,
        alpha=alpha,
        nonnegative=nonnegative,
        tol=tol,
        max_iter=max_iter,
        n_init=n_init,
    )
    basis = leading(source, key, shape.shape[1], origin)
    phases.compiled(plan, given, shape)
    give_back()  # before the columns take theirs
    small = turn_to_axes(compress(source, basis, origin))
    # The compressed rows lack what lies outside the basis, and so does their objective.
    basis, energy, outside = small.basis, small.energy / 2, 0.5 * small.outside
    # device_put, as asarray would copy an array that a CPU can use in place.
    X = jax.device_put(small.X)
    del small  # also frees its rows, if they are on another device now
    give_back()
    begun = phases.watched(plan, given, X, None, tell or (lambda standing: None))
    del X
    atoms = matmul(begun.components[0, :K], basis.T)
    state = dictionary.begin(atoms, begun.objective[0] + outside)
    history = list(np.asarray(begun.history[0])[: int(begun.iterations[0]) + 1] + outside)
    assert begun.activations is not None, "a solver in memory returns activations"
    codes, lasso = np.asarray(begun.activations)[0, :, :K], (jnp.float32(alpha), nonnegative)
    begun = begun._replace(activations=None)  # the first update frees them
    while len(history) <= max_iter and not state.error <= tol:
        state, codes = _update(source, energy, codes, state, *lasso)
        history.append(float(state.objective))
        if tell is not None:
            tell(Standing(K, len(history) - 1, max_iter, history[-1], float(state.error)))

    objective = write_out(
        source, lambda tile: _finish(tile.Z, _part(codes, tile), state, *lasso), write
    )
    return Result(
        components=state.atoms,
        activations=None,
        objective=objective.value,
        iterations=jnp.int32(len(history) - 1),
        converged=jnp.asarray(state.error <= tol),
        history=jnp.array([*history[:-1], float(objective.value)], jnp.float32),
        starts=None if begun.starts is None else begun.starts[0],
    )


def _update(
    source: Source,
    energy: Float[np.ndarray, " N"],
    codes: Float[np.ndarray, "N K"],
    state: Atoms,
    alpha: Float[Array, ""],
    nonnegative: bool,
) -> tuple[Atoms, Float[np.ndarray, "N K"]]:
    """Does `solvers.semi_nmf.update`: one pass for the codes and the sums, then the atoms."""
    new_codes, worst = np.empty_like(codes), Largest(codes.shape[1])

    def on_tile(tile: Tile) -> tuple:
        parts = _part(energy, tile), _part(codes, tile)
        return collect(tile.Z, *parts, state, alpha, nonnegative)

    def keep(tile: Tile, kept: tuple) -> None:
        new_codes[tile.start : tile.start + tile.num_rows] = kept[0][: tile.num_rows]
        worst.add(tile.start, np.asarray(kept[1][: tile.num_rows]))

    sums = values_of(add_up(source, on_tile, keep))
    unused = sums.used <= 0
    residuals = np.zeros(state.atoms.shape, np.float32)
    if np.any(unused):
        ahead = np.asarray(dictionary.extrapolate(state)[0])
        found = source.take(worst.numbers) - new_codes[worst.numbers] @ ahead
        residuals[: len(found)] = found
    new, accepted = _advance(state, sums, residuals, alpha, unused)
    return new, new_codes if accepted else codes * np.asarray(state.scale)


_advance = jax.jit(dictionary.advance)


def _part(values: Float[np.ndarray, "N ..."], tile: Tile) -> Float[np.ndarray, "B ..."]:
    """Returns the values of a tile's rows, with zeros for padding."""
    part = values[tile.start : tile.start + tile.num_rows]
    return np.pad(part, [(0, len(tile.real) - tile.num_rows)] + [(0, 0)] * (values.ndim - 1))


@partial(jax.jit, static_argnames="nonnegative")
def collect(
    Z: Array, energy: Array, codes: Array, state: Atoms, alpha: Array, nonnegative: bool
) -> tuple[Sums, tuple[Array, Array]]:
    """Returns a tile's share of an update: its sums, and its codes and squared residuals."""
    ahead, _ = dictionary.extrapolate(state)
    codes, sums, cost = semi_nmf.collect(
        Z.astype(jnp.float32), energy, (codes * state.scale).T, ahead, alpha, nonnegative
    )
    return sums, (codes.T, cost - alpha * jnp.sum(jnp.abs(codes), axis=0))


@partial(jax.jit, static_argnames="nonnegative")
def _finish(
    Z: Array, codes: Array, state: Atoms, alpha: Array, nonnegative: bool
) -> tuple[Array, Array]:
    start = codes * state.scale
    found, cost = _encoded(Z.astype(jnp.float32), start.T, state.atoms, alpha, nonnegative)
    return total(cost).value, found


def _encoded(
    Z: Float[Array, "B D"],
    codes: Float[Array, "K B"],
    atoms: Float[Array, "K D"],
    alpha: Float[Array, ""],
    nonnegative: bool,
) -> tuple[Float[Array, "B K"], Float[Array, " B"]]:
    """Returns the optimal codes, and each row's share of the objective."""
    products, gram = inner_products(atoms, Z), matmul(atoms, atoms.T)
    codes = coding.encode(products, gram, alpha, codes, nonnegative=nonnegative)
    return codes.T, semi_nmf.costs(Z, codes, atoms, alpha)
