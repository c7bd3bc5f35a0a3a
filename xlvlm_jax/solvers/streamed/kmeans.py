"""K-means on a source of rows: `solvers.kmeans` with one pass over the source per update."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from xlvlm_jax.solvers import kmeans, kmeans_assignment, kmeans_nearest, phases
from xlvlm_jax.solvers.collectives import Rows
from xlvlm_jax.solvers.kmeans_assignment import Sums
from xlvlm_jax.solvers.linalg import matmul
from xlvlm_jax.solvers.loop import Result
from xlvlm_jax.solvers.phases import Carry, Standing, Tell
from xlvlm_jax.solvers.streamed.columns import compress, leading, leading_of_sample
from xlvlm_jax.solvers.streamed.tiles import (
    Largest,
    Source,
    Tile,
    Write,
    add_up,
    give_back,
    origin,
    write_out,
)
from xlvlm_jax.solvers.sums import Wide, cluster_sums, column_sums, total


class InColumns(kmeans.Plan):
    """A plan that ends with the centroids, without arrays of N K numbers for X."""

    def finish(self, Z: Array, carry: Carry, limit: Any, rows: Rows) -> Result:
        """Returns the centroids; the history has the inertia before each update."""
        tol, fixed, progress = carry
        return Result(
            components=progress.state.offsets + fixed.problem.mean,
            activations=None,
            objective=progress.state.objective,
            iterations=progress.iteration,
            converged=progress.state.error <= tol,
            history=progress.history,
            starts=fixed.starts,
        )


def in_columns(
    shape: tuple[int, int], key: PRNGKeyArray, *, num_concepts: int, **options: Any
) -> tuple[InColumns, kmeans.Given, jax.ShapeDtypeStruct]:
    """Returns how rows are clustered in memory in a few columns, and the shape of these.

    Args:
        shape: (N, D) of the rows.
        key: random key.
        num_concepts: K.
        **options: as for `kmeans.plan`.
    """
    N, D = shape
    X = jax.ShapeDtypeStruct((N, min(kmeans.columns(N, num_concepts)[0], N, D)), jnp.float32)
    plan, given = kmeans.plan(
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
    tol: float = 1e-4,
    max_iter: int = 300,
    n_init: int = 1,
    unit: float = 1.0,
) -> Result:
    """Does `kmeans.solve` for one number of clusters; activations go to `write(start, rows)`."""
    N, D = source.shape
    K = num_concepts
    mean = jnp.asarray(origin(source))
    plan, given, shape = in_columns(
        (N, D), key, num_concepts=K, tol=tol, max_iter=max_iter, n_init=n_init
    )
    # The same choice as in memory, so that a key leads to the same clusters.
    directions = leading_of_sample if kmeans.columns(N, K)[1] else leading
    basis = directions(source, key, shape.shape[1], mean)
    phases.compiled(plan, given, shape)
    give_back()  # before the columns take theirs
    small = compress(source, basis, mean)
    X, outside = jax.device_put(small.X), small.outside
    del small
    begun = phases.watched(plan, given, X, None, tell or (lambda standing: None))
    del X
    offsets: Array = matmul(begun.components[0, :K], basis.T)
    error = jnp.inf
    # Each value belongs to the centroids before an update; the first pass computes the last one.
    history = list(np.asarray(begun.history[0])[1 : int(begun.iterations[0]) + 1] + outside)
    labels = np.empty(N, np.int32)
    while len(history) < max_iter and not error <= tol:
        far = Largest(K)

        def keep(tile: Tile, kept: tuple, far: Largest = far) -> None:
            labels[tile.start : tile.start + tile.num_rows] = kept[0][: tile.num_rows]
            far.add(tile.start, np.asarray(kept[1][: tile.num_rows]))

        def on_tile(tile: Tile, offsets: Array = offsets) -> tuple:
            return collect(tile.Z, tile.real, mean, offsets)

        sums, energy, moment = add_up(source, on_tile, keep)
        inertia = kmeans_assignment.inertia(energy, offsets, sums)
        # Variance of the columns about their own mean; the origin is only near it.
        variance = (energy.value - jnp.sum(moment.value**2) / N) / (float(N) * D)
        empty = sums.counts.high == 0
        if np.any(empty):
            rows = jnp.asarray(source.take(far.numbers), jnp.float32) - mean
            of = jnp.asarray(labels[far.numbers])
            apart = jnp.asarray(far.scores > 0, jnp.float32)
            sums = kmeans.relocate(sums, rows, apart, of, empty)
        history.append(float(inertia))
        moved: tuple[Array, Array, Array] = kmeans.advance(variance, offsets, sums)
        offsets, _, error = moved
        if tell is not None:
            tell(Standing(K, len(history), max_iter, history[-1], float(error)))

    # The objective and the activations are of the centroids as float32 holds them.
    centroids = offsets + mean
    offsets, of_unit = centroids - mean, jnp.float32(unit)

    def finish(tile: Tile) -> tuple:
        return _finish(tile.Z, tile.real, mean, offsets, of_unit)

    inertia = write_out(source, finish, write).value
    return Result(
        components=centroids,
        activations=None,
        objective=inertia,
        iterations=jnp.int32(len(history)),
        converged=jnp.asarray(error <= tol),
        history=jnp.array([*history, float(inertia)], jnp.float32),
        starts=None if begun.starts is None else begun.starts[0][:, :K],
    )


@jax.jit
def collect(Z: Array, real: Array, mean: Array, offsets: Array) -> tuple[Any, Any]:
    """Returns a tile's share of an update: sums over its rows, and what is kept of each row."""
    Z = real[:, None] * (Z.astype(jnp.float32) - mean)
    energy, zero = jnp.sum(Z**2, axis=1), jnp.zeros_like(mean)
    labels, least, _ = kmeans_nearest.nearest(kmeans_assignment.score(Z, offsets, zero, False))
    far = jnp.where(real > 0, energy + least, -jnp.inf)
    sums = Sums(*cluster_sums(Z, labels, len(offsets), zero, real))
    return (sums, total(energy), column_sums(Z)), (labels, far)


@jax.jit
def _finish(Z: Array, real: Array, mean: Array, offsets: Array, unit: Array) -> tuple[Wide, Array]:
    squared = kmeans.assign(Z.astype(jnp.float32) - mean, offsets)[1]
    return total(real * jnp.min(squared, axis=1)), kmeans.similarity(squared, unit)
