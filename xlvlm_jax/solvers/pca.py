"""Principal component analysis.

    minimise   1/2 |Z - 1 m - S C|_F^2   over scores S[N, K] and components C[K, D] with C C^T = I

m is the mean row, S = (Z - 1 m) C^T. `tol` is compared to the gain of explained variance that
another update would bring, relative to what is explained.

Block Krylov iteration with restarts (Musco and Musco, "Randomized block Krylov methods for stronger
and faster approximate singular value decomposition", 2015; Wu and Simon, "Thick-restart Lanczos
method", 2000): an update takes the best axes in the span of the last W axes and their images under
A = (Z - 1 m)^T (Z - 1 m). Only the W new directions are multiplied with Z; and since the last axes
stay in the span, explained variance cannot decrease. To first order, axis v with variance l = v^T A
v would gain 2 |A v - l v|^2 / l from its image. The first span is that of the leading directions of
some rows.

If min(N, D) is at most EXACT or 2 W, the first span is the whole space. If D is so small compared
to N and K that the covariance costs less than a few updates, the axes are its eigenvectors and
nothing is iterated. Signs follow scikit-learn: the entry of largest absolute value in a component
is positive.
"""

import functools
import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from xlvlm_jax.solvers import residual, sums
from xlvlm_jax.solvers.collectives import ONE_DEVICE, Rows
from xlvlm_jax.solvers.compression import directions_of_sample
from xlvlm_jax.solvers.linalg import complement, matmul, orthonormal, real_dtype
from xlvlm_jax.solvers.loop import Result, begin, each, run
from xlvlm_jax.solvers.phases import Carry, Phase, at_once
from xlvlm_jax.solvers.restarts import draw_rows
from xlvlm_jax.solvers.sums import Wide

OVERSAMPLE = 20
LANES = 32  # a product with 32 columns takes hardly longer than one with 20
SAMPLE = 8  # rows per direction that the first directions are computed from
ANYWHERE = 8  # how many of the first directions are random
EXACT = 256
# Choice between covariance and iteration, in products of Z with one column: the updates that hidden
# states need, and the eigenvectors of [D, D], which cost EIGH * D^3.
UPDATES = 2
EIGH = 10
BLOCKS = 3  # row blocks of the covariance, so that only two thirds of it are computed
CANCELS = 0.1  # of the energy: a smaller difference of sums has lost digits
DOMINANT = 16  # times the median axis's variance
SPREAD = 2**12  # first axis's variance over the last one's: more leaves float32 three digits
TINY = 1e-30


class Problem(NamedTuple):
    """Constants of a run."""

    Z: Float[Array, "N D"]
    real: Float[Array, " N"]  # 1 for a sample, 0 for a row that pads Z on a mesh
    mean: Wide  # [D], with the digits that a float32 mean lacks
    energy: Float[Array, ""]  # 1/2 |Z - 1 m|_F^2
    far: Bool[Array, ""]  # whether m is so far from zero that products with Z lose digits


class State(NamedTuple):
    """What an update reads and writes."""

    basis: Float[Array, "D W"]  # orthonormal, by decreasing variance
    scores: Float[Array, "N W"]  # (Z - 1 m) basis
    images: Float[Array, "D W"]  # A basis
    objective: Float[Array, ""]
    error: Float[Array, ""]


def prepare(Z: Float[Array, "N D"], num_samples: int, rows: Rows = ONE_DEVICE) -> Problem:
    """Returns the constants for a Z whose first `num_samples` rows count."""
    real = (rows.numbers(len(Z)) < num_samples).astype(real_dtype(Z))
    mean = sums.column_means(Z, num_samples, rows)
    squares = sums.total(real * sums.squared_distances(Z, *mean))
    energy = 0.5 * rows.total(squares).value
    variance = 2 * energy / (float(num_samples) * Z.shape[1])
    return Problem(Z, real, mean, energy, sums.is_far(mean.high, variance))


def width(num_concepts: int) -> int:
    """Returns W, the number of axes that are iterated on for K components."""
    return -(-num_concepts // LANES) * LANES


def init(
    problem: Problem,
    directions: Float[Array, "D R"],
    num_concepts: int,
    rows: Rows = ONE_DEVICE,
) -> State:
    """Returns the state at the best axes within the span of the given directions."""
    basis = orthonormal(directions)
    W = min(width(num_concepts), basis.shape[1])
    return best_axes(problem, [basis], [project(problem, basis)], W, num_concepts, rows)


def update(problem: Problem, state: State, num_concepts: int, rows: Rows = ONE_DEVICE) -> State:
    """Returns the best axes within the span of the last axes and their images."""
    new = complement(state.basis, state.images)
    bases, scores = [state.basis, new], [state.scores, project(problem, new)]
    return best_axes(problem, bases, scores, state.basis.shape[1], num_concepts, rows)


def best_axes(
    problem: Problem,
    bases: list[Float[Array, "D _"]],
    scores: list[Float[Array, "N _"]],
    W: int,
    num_concepts: int,
    rows: Rows = ONE_DEVICE,
) -> State:
    """Returns the state at the W leading axes within a span (Rayleigh-Ritz).

    Args:
        problem: constants of the run.
        bases: list of float[D, _], together an orthonormal basis of the span.
        scores: list of float[N, _], the centred rows in each of the bases.
        W: number of axes.
        num_concepts: number of axes that count in the objective.
        rows: where the rows of Z are.
    """
    overlaps = rows.total(
        [[sums.overlaps(left, right).value for right in scores] for left in scores]
    )
    variances, axes = principal(jnp.block(overlaps), num_concepts)
    variances, axes = variances[:W], axes[:, :W]
    basis = _turn(bases, axes)
    # Rounding accumulates over updates: one step of Newton's method restores an orthonormal basis.
    straight = 1.5 * jnp.eye(W, dtype=basis.dtype) - 0.5 * matmul(basis.T, basis)
    basis, turned = matmul(basis, straight), _turn(scores, matmul(axes, straight))
    images = covariance_image(problem, turned, rows)
    objective = problem.energy - 0.5 * jnp.sum(variances[:num_concepts])
    error = expected_gain(basis, images, variances, num_concepts)
    return State(basis, turned, images, objective, error)


def principal(
    overlaps: Float[Array, "R R"], num_concepts: int
) -> tuple[Float[Array, " R"], Float[Array, "R R"]]:
    """Returns the eigenvalues of a positive semi-definite matrix, decreasing, and its eigenvectors.

    If the first eigenvalues are far larger than the others, the others would be lost in their
    rounding error. The result then comes from the singular vectors of a square root, which spans
    half as many digits.
    """
    values, vectors = jnp.linalg.eigh(overlaps)

    def of_root() -> tuple[Array, Array]:
        # With rows and columns on one scale, eigenvalues differ by the angles alone.
        scale = jnp.sqrt(jnp.maximum(jnp.diagonal(overlaps), TINY))
        angles, turned = jnp.linalg.eigh(overlaps / jnp.outer(scale, scale))
        root = jnp.sqrt(jnp.maximum(angles, 0))[:, None] * turned.T * scale
        _, lengths, axes = jnp.linalg.svd(root)
        return lengths**2, axes.T

    spread = values[-1] > SPREAD * values[max(len(values) - num_concepts, 0)]
    return jax.lax.cond(spread, of_root, lambda: (values[::-1], vectors[:, ::-1]))


def _turn(parts: list[Float[Array, "M _"]], axes: Float[Array, "R W"]) -> Float[Array, "M W"]:
    """Returns [parts] axes without concatenating the parts, which would double their memory."""
    ends = list(itertools.accumulate(part.shape[1] for part in parts))
    products = (
        matmul(part, axes[end - part.shape[1] : end]) for part, end in zip(parts, ends, strict=True)
    )
    return functools.reduce(jnp.add, products)


def project(problem: Problem, basis: Float[Array, "D R"]) -> Float[Array, "N R"]:
    """Returns (Z - 1 m) basis, with zeros for rows that pad Z."""
    mean, beyond = problem.mean
    products = sums.centred_scores(problem.Z, basis, mean, problem.far)
    return problem.real[:, None] * (products - matmul(beyond, basis))


def covariance_image(
    problem: Problem, scores: Float[Array, "N R"], rows: Rows = ONE_DEVICE
) -> Float[Array, "D R"]:
    """Returns (Z - 1 m)^T scores."""
    mean, beyond = problem.mean
    # Scores of padding rows are zero.
    images = sums.weighted_directions(scores.T, problem.Z, mean, problem.far)
    return rows.total(images.T - jnp.outer(beyond, jnp.sum(scores, axis=0)))


def covariance(problem: Problem, rows: Rows = ONE_DEVICE) -> Float[Array, "D D"]:
    """Returns (Z - 1 m)^T (Z - 1 m), from blocks of its rows; the lower triangle is mirrored."""
    N, D = problem.Z.shape
    edges = [round(i * D / BLOCKS) for i in range(BLOCKS + 1)]
    spans = list(itertools.pairwise(edges))
    mean, beyond = problem.mean

    def part(first: Array | int, count: int) -> list[Array]:
        # Centred before the product: the energy of a large mean would round away the rest.
        real = sums.block_of(problem.real, first, count)[:, None]
        z = real * ((sums.block_of(problem.Z, first, count) - mean) - beyond)
        return [matmul(z[:, start:stop].T, z[:, start:]) for start, stop in spans]

    totals = sums.add_up(part, N, sums.rows_of_block(D))
    blocks = rows.total([total.value for total in totals])
    padded = [jnp.pad(block, ((0, 0), (D - block.shape[1], 0))) for block in blocks]
    total = jnp.concatenate(padded)
    return jnp.triu(total) + jnp.triu(total, 1).T


def solved(problem: Problem, num_concepts: int, rows: Rows = ONE_DEVICE) -> State:
    """Returns the state at the optimum, from the covariance; without images, as none follow."""
    variances, axes = jnp.linalg.eigh(covariance(problem, rows))
    variances, basis = variances[::-1][:num_concepts], axes[:, ::-1][:, :num_concepts]
    objective = problem.energy - 0.5 * jnp.sum(variances)
    images = jnp.zeros_like(basis)
    return State(basis, project(problem, basis), images, objective, jnp.zeros_like(objective))


def first_directions(
    problem: Problem, key: PRNGKeyArray, num_concepts: int, num_samples: int, rows: Rows
) -> Float[Array, "D R"]:
    """Returns a sketch of the row space, or directions that span all of it if N or D is small."""
    Z, D = problem.Z, problem.Z.shape[1]
    if is_small(num_samples, D, num_concepts):
        if num_samples >= D:
            return jnp.eye(D, dtype=real_dtype(Z))
        return (rows.take(Z, jnp.arange(num_samples)) - problem.mean.high).T
    R = width(num_concepts + OVERSAMPLE)
    if num_samples < 2 * SAMPLE * R:
        sketch = project(problem, jax.random.normal(key, (D, R), real_dtype(Z)))
        return covariance_image(problem, sketch, rows)
    # With this many rows, a sample says nearly as much as all of them and saves a pass over Z. The
    # last directions are drawn from the whole space, so that nothing outside the sample is out of
    # reach.
    sample_key, key = jax.random.split(key)
    row_key, sample_key = jax.random.split(sample_key)
    X = rows.take(Z, draw_rows(row_key, num_samples, SAMPLE * R)) - problem.mean.high
    leading = directions_of_sample(X, sample_key, R - ANYWHERE)
    anywhere = jax.random.normal(key, (D, ANYWHERE), leading.dtype) / D**0.5
    return jnp.concatenate([leading, anywhere], axis=1)


def is_small(N: int, D: int, K: int) -> bool:
    """Returns whether the span of one update would be nearly all of the space of Z[N, D]."""
    return min(N, D) <= max(EXACT, 2 * width(K))


def is_narrow(N: int, D: int, K: int) -> bool:
    """Returns whether the covariance of Z[N, D] costs less than updates would."""
    upper = (BLOCKS + 1) / (2 * BLOCKS)
    return upper * N * D + EIGH * D**2 < 2 * (2 + UPDATES) * N * width(K)


def expected_gain(
    basis: Float[Array, "D R"],
    images: Float[Array, "D R"],
    variances: Float[Array, " R"],
    num_concepts: int,
) -> Float[Array, ""]:
    """Returns the relative gain in variance explained by the first axes that an update would bring.

    An axis with more than DOMINANT times the median variance counts as that much, and its gain in
    proportion: a few columns of huge variance say nothing about the other axes.
    """
    # Subtracts what already lies in the span: each axis has a trace of a column of huge variance in
    # its last digit, whose image is not a gain.
    wanted = images[:, :num_concepts]
    missed = jnp.sum((wanted - matmul(basis, matmul(basis.T, wanted))) ** 2, axis=0)
    variances = variances[:num_concepts]
    gain = jnp.where(variances > TINY, 2 * missed / jnp.maximum(variances, TINY), 0)
    counted = jnp.minimum(variances, DOMINANT * jnp.median(variances))
    share = counted / jnp.maximum(variances, TINY)
    return jnp.sum(share * gain) / jnp.maximum(jnp.sum(counted), TINY)


def remaining(
    problem: Problem,
    estimate: Float[Array, ""],
    scores: Float[Array, "N K"],
    components: Float[Array, "K D"],
    rows: Rows = ONE_DEVICE,
) -> Float[Array, ""]:
    """Returns the objective: the estimate, or the sum of the residual if that has lost digits."""

    def of_residual() -> Array:
        # The part of the mean beyond float32 is one more component, with a score of one.
        codes = jnp.concatenate([scores, problem.real[:, None]], axis=1)
        atoms = jnp.concatenate([components, problem.mean.low[None]])
        squares = residual.of_products(problem.Z, codes, atoms, problem.mean.high)
        return 0.5 * sums.total(problem.real * squares).value

    # Energy minus explained variance cancels if the fit is good.
    cancels = estimate < CANCELS * problem.energy
    there = jax.lax.cond(cancels, of_residual, lambda: jnp.zeros_like(estimate))
    return jnp.where(cancels, rows.total(there), estimate)


class Given(NamedTuple):
    """Inputs of a run other than Z."""

    key: PRNGKeyArray
    tol: Float[Array, ""]


class Plan(NamedTuple):
    """Settings that are fixed at compile time, and the phases of the solver."""

    width: int  # number of columns of Z
    num_samples: int
    num_concepts: tuple[int, ...]
    max_iter: int

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Phases in the order they run."""
        repeated = () if self.narrow or self.exact else (Phase(self.improve, repeats=True),)
        return Phase(self.start), *repeated, Phase(self.finish)

    @property
    def runs(self) -> tuple[int, ...]:
        """A single run: fewer components are the first ones of more."""
        return (max(self.num_concepts),)

    @property
    def narrow(self) -> bool:
        """Whether the components come from the covariance."""
        N, D = self.num_samples, self.width
        return N >= D and is_narrow(N, D, *self.runs)

    @property
    def exact(self) -> bool:
        """Whether the first span is the whole space."""
        return is_small(self.num_samples, self.width, *self.runs)

    def start(self, Z: Array, given: tuple, limit: Any, rows: Rows) -> Carry:
        """Finds the best axes in a sketch of the row space."""
        key, tol = given
        (K,), N = self.runs, self.num_samples
        problem = prepare(Z, N, rows)
        if self.narrow:
            state = solved(problem, K, rows)
        else:
            state = init(problem, first_directions(problem, key, K, N, rows), K, rows)
            state = state._replace(error=jnp.zeros_like(state.error)) if self.exact else state
        progress = jax.tree.map(lambda leaf: leaf[None], begin(state, self.max_iter))
        return Carry(tol, problem._replace(Z=None), progress)

    def improve(self, Z: Array, carry: Carry, limit: Any, rows: Rows) -> Carry:
        """Runs updates."""
        problem = carry.fixed._replace(Z=Z)
        step = partial(update, problem, num_concepts=self.runs[0], rows=rows)
        goes_on = each(partial(run, step, tol=carry.tol, max_iter=limit))
        return carry._replace(progress=goes_on(carry.progress))

    def finish(self, Z: Array, carry: Carry, limit: Any, rows: Rows) -> Result:
        """Computes the components with their signs, and the objective."""
        problem = carry.fixed._replace(Z=Z)
        (K,), progress = self.runs, jax.tree.map(lambda leaf: leaf[0], carry.progress)
        components = progress.state.basis[:, :K].T
        scores = progress.state.scores[:, :K]
        sign = _signs(components)
        beyond = rows.total(sums.column_sums(scores**2).value)
        left = remaining(problem, progress.state.objective, scores, components, rows)
        # Corrects the whole history by the rounding error of the energy.
        missed = left - progress.state.objective
        missing = jnp.arange(K) >= jnp.array(self.num_concepts)[:, None]

        def copies(value: Array) -> Array:
            return jnp.broadcast_to(value, (len(self.num_concepts), *value.shape))

        return Result(
            components=copies(sign[:, None] * components),
            activations=copies(sign * scores),
            objective=left + 0.5 * jnp.sum(jnp.where(missing, beyond, 0), axis=1),
            iterations=copies(progress.iteration),
            converged=copies(progress.state.error <= carry.tol),
            history=copies(progress.history + missed),
            mean=copies(problem.mean.high),
        )


def plan(
    key: PRNGKeyArray,
    *,
    width: int,
    num_samples: int,
    num_concepts: tuple[int, ...],
    tol: Float[Array, ""] | float = 1e-5,
    max_iter: int = 100,
) -> tuple[Plan, Given]:
    """Returns how to find the leading components of Z[N, width].

    Args:
        key: random key.
        width: number of columns of Z.
        num_samples: number of leading rows of Z that count.
        num_concepts: Q numbers of components.
        tol: see the head of this file.
        max_iter: maximum number of updates.

    Returns:
        the plan and its inputs. The result of a solve has a leading axis Q; fewer components are
        the first ones of more.
    """
    return Plan(width, num_samples, num_concepts, max_iter), Given(key, jnp.float32(tol))


@partial(jax.jit, static_argnames=("num_samples", "num_concepts", "max_iter", "mesh"))
def solve(
    Z: Float[Array, "N D"], key: PRNGKeyArray, *, mesh: Mesh | None = None, **options: Any
) -> Result:
    """Finds the components in one compiled program; the options are those of `plan`."""
    return at_once(*plan(key, width=Z.shape[1], **options), Z, mesh)


@jax.jit
def activations(
    Z: Float[Array, "N D"], components: Float[Array, "K D"], mean: Float[Array, " D"]
) -> Float[Array, "N K"]:
    """Returns the scores (Z - 1 m) C^T."""
    far = sums.is_far(mean, jnp.mean((Z - mean) ** 2))
    return sums.centred_scores(Z, components.T, mean, far)


def with_signs(components: Float[Array, "K D"]) -> Float[Array, "K D"]:
    """Returns the components with their largest entries made positive."""
    return _signs(components)[:, None] * components


def _signs(components: Float[Array, "K D"]) -> Float[Array, " K"]:
    largest = jnp.argmax(jnp.abs(components), axis=1)
    return jnp.where(components[jnp.arange(len(components)), largest] < 0, -1.0, 1.0)
