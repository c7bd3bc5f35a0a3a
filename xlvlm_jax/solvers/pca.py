"""Principal component analysis.

    minimise   1/2 |Z - 1 m - S C|_F^2   over scores S[N, K] and components C[K, D] with C C^T = I

m the mean row, S = (Z - 1 m) C^T. `tol` is compared to the relative gain of explained variance in
the last update.

Block subspace iteration with Rayleigh-Ritz steps (Halko, Martinsson and Tropp, "Finding structure
with randomness", 2011, sections 4.5 and 5) on K + OVERSAMPLE directions from a random start.
Explained variance cannot fall: the new subspace is the image of the old one under the covariance.
Where min(N, D) <= EXACT the start holds every direction, and there is nothing to iterate. Signs
follow scikit-learn: the largest entry of a component, in absolute value, is positive.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from xlvlm_jax.solvers.loop import Result, begin, image, matmul, real_rows, run

OVERSAMPLE = 20
EXACT = 256
TINY = 1e-30


class Problem(NamedTuple):
    """Constants of a run."""

    Z: Float[Array, "N D"]
    rows: Float[Array, " N"]  # 1 for a sample, 0 for a row that pads Z on a mesh
    mean: Float[Array, " D"]
    energy: Float[Array, ""]  # 1/2 |Z - 1 m|_F^2


class State(NamedTuple):
    """What an update reads and writes."""

    basis: Float[Array, "D R"]  # orthonormal, by falling variance
    scores: Float[Array, "N R"]  # (Z - 1 m) basis; the columns are orthogonal
    objective: Float[Array, ""]
    error: Float[Array, ""]


def prepare(Z: Float[Array, "N D"], num_samples: int) -> Problem:
    """The constants for a Z whose first `num_samples` rows count."""
    rows = real_rows(Z, num_samples)
    mean = matmul(rows, Z) / num_samples
    return Problem(Z, rows, mean, 0.5 * jnp.sum(rows * jnp.sum((Z - mean) ** 2, axis=1)))


def init(problem: Problem, directions: Float[Array, "D R"], num_concepts: int) -> State:
    """The state at the span of the given directions."""
    state, _ = _ritz(problem, directions, num_concepts)
    return state


def update(problem: Problem, state: State, num_concepts: int) -> State:
    """One product with the covariance, then the best axes within its image."""
    directions = image(problem.Z, state.scores)
    directions = directions - jnp.outer(problem.mean, matmul(problem.rows, state.scores))
    new, explained = _ritz(problem, directions, num_concepts)
    gain = (state.objective - new.objective) / jnp.maximum(explained, TINY)
    return new._replace(error=gain)


@partial(jax.jit, static_argnames=("num_samples", "num_concepts", "max_iter"))
def solve(
    Z: Float[Array, "N D"],
    key: PRNGKeyArray,
    *,
    num_samples: int,
    num_concepts: int,
    tol: Float[Array, ""] | float = 1e-5,
    max_iter: int = 100,
) -> Result:
    """The leading components of the rows of Z; those from `num_samples` on are ignored."""
    K, D = num_concepts, Z.shape[1]
    problem = prepare(Z, num_samples)
    exact = min(num_samples, D) <= EXACT
    if not exact:
        directions = jax.random.normal(key, (D, min(K + OVERSAMPLE, num_samples, D)))
    elif num_samples >= D:
        directions = jnp.eye(D)
    else:
        directions = (Z[:num_samples] - problem.mean).T
    state = init(problem, directions, K)
    state = state._replace(error=jnp.float32(0)) if exact else state
    progress = begin(state, max_iter)
    progress = run(partial(update, problem, num_concepts=K), progress, tol=tol, max_iter=max_iter)
    components = progress.state.basis[:, :K].T
    scores = progress.state.scores[:, :K]
    # From the residual itself: energy - explained variance cancels when the fit is good.
    residual = Z - jnp.outer(problem.rows, problem.mean) - matmul(scores, components)
    largest = jnp.argmax(jnp.abs(components), axis=1)
    sign = jnp.where(components[jnp.arange(K), largest] < 0, -1.0, 1.0)
    return Result(
        components=sign[:, None] * components,
        activations=sign * scores[:num_samples],
        objective=0.5 * jnp.sum(residual**2),
        iterations=progress.iteration,
        converged=progress.state.error <= tol,
        history=progress.history,
        mean=problem.mean,
    )


@jax.jit
def activations(
    Z: Float[Array, "N D"], components: Float[Array, "K D"], mean: Float[Array, " D"]
) -> Float[Array, "N K"]:
    """Scores (Z - 1 m) C^T."""
    return matmul(Z, components.T) - matmul(components, mean)


def _ritz(
    problem: Problem, directions: Float[Array, "D R"], num_concepts: int
) -> tuple[State, Float[Array, ""]]:
    """The principal axes within the span of `directions`, and what the first K of them explain."""
    basis = jnp.linalg.qr(directions)[0]
    scores = matmul(problem.Z, basis) - jnp.outer(problem.rows, matmul(problem.mean, basis))
    squares, axes = jnp.linalg.eigh(matmul(scores.T, scores))
    axes = axes[:, ::-1]
    explained = 0.5 * jnp.sum(squares[::-1][:num_concepts])
    objective = jnp.maximum(problem.energy - explained, 0)
    state = State(matmul(basis, axes), matmul(scores, axes), objective, jnp.float32(jnp.inf))
    return state, explained
