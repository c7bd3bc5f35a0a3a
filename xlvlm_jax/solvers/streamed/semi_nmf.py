"""Semi-NMF on a source of rows: `solvers.semi_nmf` with one pass over the source per update."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from xlvlm_jax.solvers import phases, semi_nmf
from xlvlm_jax.solvers import semi_nmf_atoms as dictionary
from xlvlm_jax.solvers import semi_nmf_codes as coding
from xlvlm_jax.solvers.linalg import inner_products, matmul
from xlvlm_jax.solvers.loop import Result
from xlvlm_jax.solvers.phases import Standing, Tell
from xlvlm_jax.solvers.semi_nmf_atoms import Atoms, Sums
from xlvlm_jax.solvers.streamed.columns import compress
from xlvlm_jax.solvers.streamed.tiles import (
    Largest,
    Source,
    Tile,
    Write,
    add_up,
    values_of,
    write_out,
)


def columns(num_samples: int, width: int, num_concepts: int) -> int:
    """Returns how many columns per row are kept in memory."""
    return min(num_concepts + semi_nmf.OVERSAMPLE, num_samples, width)


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
    # The origin is zero: the model has no mean.
    small = compress(source, key, columns(N, D, K), jnp.zeros(D, jnp.float32))
    # The compressed rows lack what lies outside the basis, and so does their objective.
    basis, energy, outside = small.basis, small.energy / 2, 0.5 * small.outside
    X = jnp.asarray(small.X)
    del small  # also frees its rows, which are on the device now
    begun = phases.solve(
        semi_nmf,
        X,
        key,
        tell,
        num_samples=N,
        num_concepts=(K,),
        alpha=alpha,
        nonnegative=nonnegative,
        tol=tol,
        max_iter=max_iter,
        n_init=n_init,
    )
    del X
    atoms = matmul(begun.components[0, :K], basis.T)
    state = dictionary.begin(atoms, begun.objective[0] + outside)
    history = list(np.asarray(begun.history[0])[: int(begun.iterations[0]) + 1] + outside)
    assert begun.activations is not None, "a solver in memory returns activations"
    codes, lasso = np.array(begun.activations[0, :, :K]), (jnp.float32(alpha), nonnegative)
    begun = begun._replace(activations=None)  # frees another N K numbers
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
    Z = Z.astype(jnp.float32)
    products, gram = inner_products(state.atoms, Z), matmul(state.atoms, state.atoms.T)
    start = (codes * state.scale).T
    codes = coding.encode(products, gram, alpha, start, nonnegative=nonnegative)
    return semi_nmf.objective(Z, codes, state.atoms, alpha), codes.T
