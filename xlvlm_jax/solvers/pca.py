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

If D is so small compared to N and K that the covariance costs less than a few updates, or at most
N and at most EXACT or 2 W, the axes are its eigenvectors and nothing is iterated. If N is as small,
the first span is the whole row space. With more than LANES components, the last of which often
differ little in variance, the span also has the directions that the last update added, as in
conjugate gradients (Knyazev, "Toward the optimal preconditioned eigensolver: locally optimal block
preconditioned conjugate gradient method", 2001): this halves the number of updates.

Signs follow scikit-learn: the entry of largest absolute value in a component is positive.
"""

import functools
import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from xlvlm_jax.solvers import residual, sums
from xlvlm_jax.solvers.buckets import bucket_of_rows, room_for
from xlvlm_jax.solvers.collectives import ONE_DEVICE, Rows
from xlvlm_jax.solvers.compiling import jit
from xlvlm_jax.solvers.compression import directions_of_sample
from xlvlm_jax.solvers.linalg import complement, matmul, orthonormal, real_dtype
from xlvlm_jax.solvers.loop import Result, begin, each, run
from xlvlm_jax.solvers.phases import Carry, Counts, Phase, one_run_each, run_compiled
from xlvlm_jax.solvers.restarts import draw_rows
from xlvlm_jax.solvers.sums import Wide

OVERSAMPLE = 20
LANES = 32  # a product with 32 columns takes hardly longer than one with 20
SAMPLE = 16  # rows per direction that the first directions are computed from
ANYWHERE = 8  # how many of the first directions are random
EXACT = 256
# Choice between covariance and iteration, in products of Z with one column: the updates that hidden
# states need, and the eigenvectors of [D, D], which cost EIGH * D^3.
UPDATES = 2
EIGH = 10
BLOCKS = 3  # row blocks of the covariance, so that only two thirds of it are computed
CANCELS = 0.1  # of the energy: a smaller difference of sums has lost digits
DOMINANT = 16  # times the median axis's variance
AT_ONCE = 2**17  # rows that are multiplied at once for images of axes
SPREAD = 2**12  # first axis's variance over the last one's: more leaves float32 three digits
TINY = 1e-30


class Problem(NamedTuple):
    """Constants of a run."""

    Z: Float[Array, "N D"]
    real: Float[Array, " N"]  # 1 for a sample, 0 for a row that pads Z on a mesh
    mean: Wide  # [D], with the digits that a float32 mean lacks
    energy: Float[Array, ""]  # 1/2 |Z - 1 m|_F^2
    far: Bool[Array, ""]  # whether m is so far from zero that products with Z lose digits
    far_in_sums: Bool[Array, ""]  # whether they do if they add up all rows


class State(NamedTuple):
    """What an update reads and writes."""

    basis: Float[Array, "D W"]  # orthonormal, by decreasing variance
    scores: Float[Array, "N W"]  # (Z - 1 m) basis
    images: Float[Array, "D W"]  # A basis
    moves: Float[Array, "D P"]  # orthonormal, and to the basis: how it moved; at first any
    move_scores: Float[Array, "N P"]  # (Z - 1 m) moves
    objective: Float[Array, ""]
    error: Float[Array, ""]


def prepare(
    Z: Float[Array, "N D"], num_samples: Int[Array, ""] | int, rows: Rows = ONE_DEVICE
) -> Problem:
    """Returns the constants for a Z whose first `num_samples` rows count."""
    real = (rows.numbers(len(Z)) < num_samples).astype(real_dtype(Z))
    mean = sums.column_means(Z, num_samples, rows)
    squares = sums.total(real * sums.squared_distances(Z, *mean))
    energy = 0.5 * rows.total(squares).value
    variance = 2 * energy / (jnp.asarray(num_samples, energy.dtype) * Z.shape[1])
    far = (sums.is_far(mean.high, variance, count) for count in (1, len(Z)))
    return Problem(Z, real, mean, energy, *far)


def num_axes(num_concepts: int) -> int:
    """Returns W, the number of axes that are iterated on for K components."""
    return -(-num_concepts // LANES) * LANES


def num_moves(num_concepts: int, N: int, D: int) -> int:
    """Returns P, the number of directions of the last update that are kept for K components."""
    W = num_axes(num_concepts)
    # In smaller spaces, eigenvectors of three times as many directions cost more than updates.
    return W if num_concepts > LANES and min(N, D) >= 6 * W else 0


def init(
    problem: Problem,
    directions: Float[Array, "D R"],
    num_concepts: Int[Array, ""] | int,
    rows: Rows = ONE_DEVICE,
    most: int | None = None,
) -> State:
    """Returns the state at the best axes within the span of the given directions.

    `most` is the largest number of concepts that the program serves; None for `num_concepts`.
    """
    basis = orthonormal(directions)
    if most is None:
        assert isinstance(num_concepts, int), "a traced number of concepts needs the largest one"
        most = num_concepts
    W = min(num_axes(most), basis.shape[1])
    bases, scores = [basis], [project(problem, basis)]
    P = num_moves(most, rows.count(len(problem.Z)), problem.Z.shape[1])
    return best_axes(problem, bases, scores, W, num_concepts, rows, P)


def update(
    problem: Problem,
    state: State,
    num_concepts: Int[Array, ""] | int,
    rows: Rows = ONE_DEVICE,
) -> State:
    """Returns the best axes within the span of the last axes, their images and their last moves."""
    W, P = state.basis.shape[1], state.moves.shape[1]
    known, known_scores = [state.basis], [state.scores]
    if P:
        known, known_scores = [*known, state.moves], [*known_scores, state.move_scores]
    new = complement(jnp.concatenate(known, axis=1), state.images)
    bases, scores = [*known, new], [*known_scores, project(problem, new)]
    return best_axes(problem, bases, scores, W, num_concepts, rows, P)


def best_axes(
    problem: Problem,
    bases: list[Float[Array, "D _"]],
    scores: list[Float[Array, "N _"]],
    W: int,
    num_concepts: Int[Array, ""] | int,
    rows: Rows = ONE_DEVICE,
    P: int = 0,
) -> State:
    """Returns the state at the W leading axes within a span (Rayleigh-Ritz).

    Args:
        problem: constants of the run.
        bases: list of float[D, _], together an orthonormal basis of the span.
        scores: list of float[N, _], the centred rows in each of the bases.
        W: number of axes.
        num_concepts: number of axes that count in the objective.
        rows: where the rows of Z are.
        P: number of moves that are kept.
    """
    upper = rows.total(
        [
            [sums.overlaps(left, right).value for right in scores[i:]]
            for i, left in enumerate(scores)
        ]
    )
    overlaps = [
        [upper[i][j - i] if j >= i else upper[j][i - j].T for j in range(len(scores))]
        for i in range(len(scores))
    ]
    variances, axes = principal(jnp.block(overlaps), num_concepts)
    variances, axes = variances[:W], axes[:, :W]
    basis = _turn(bases, axes)
    # Rounding accumulates over updates: one step of Newton's method restores an orthonormal basis.
    straight = 1.5 * jnp.eye(W, dtype=basis.dtype) - 0.5 * matmul(basis.T, basis)
    basis, turned = matmul(basis, straight), _turn(scores, matmul(axes, straight))
    images = covariance_image(problem, turned, rows)
    objective = problem.energy - 0.5 * _sum_of_first(variances, num_concepts)
    error = expected_gain(basis, images, variances, num_concepts)
    if len(bases) == 1:
        # Zeros would not do: where Z has fewer directions than W, axes would be made of them.
        moves = complement(basis, jnp.eye(len(basis), P, dtype=basis.dtype))
        moved = project(problem, moves)
    else:
        # What the new axes have of directions other than the last axes, orthogonal to the new ones.
        # Among orthonormal bases, that is a product of small matrices.
        turn = complement(axes, axes.at[:W].set(0)[:, axes.shape[1] - P :])
        moves, moved = _turn(bases, turn), _turn(scores, turn)
    return State(basis, turned, images, moves, moved, objective, error)


def principal(
    overlaps: Float[Array, "R R"], num_concepts: Int[Array, ""] | int
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

    spread = values[-1] > SPREAD * values[jnp.maximum(len(values) - num_concepts, 0)]
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
    far = problem.far_in_sums
    images = sums.weighted_directions(scores.T, problem.Z, mean, far, AT_ONCE)
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


def solved(
    problem: Problem,
    num_concepts: Int[Array, ""] | int,
    most: int,
    rows: Rows = ONE_DEVICE,
    careful: bool = False,
) -> State:
    """Returns the state at the optimum, from the covariance; without images, as none follow.

    Args:
        problem: constants of the run.
        num_concepts: number of axes that count in the objective.
        most: number of axes.
        rows: where the rows of Z are.
        careful: whether to keep the digits of variances far below the first, see `principal`. In
            the rare case that this matters, it takes an SVD of [D, D].
    """
    total = covariance(problem, rows)
    if careful:
        variances, axes = principal(total, num_concepts)
    else:
        variances, axes = (found[..., ::-1] for found in jnp.linalg.eigh(total))
    variances, basis = variances[:most], axes[:, :most]
    objective = problem.energy - 0.5 * _sum_of_first(variances, num_concepts)
    images, none = jnp.zeros_like(basis), jnp.zeros((len(basis), 0), basis.dtype)
    scores = project(problem, basis)
    return State(basis, scores, images, none, scores[:, :0], objective, jnp.zeros_like(objective))


def _sum_of_first(values: Float[Array, " R"], count: Int[Array, ""] | int) -> Float[Array, ""]:
    return jnp.sum(jnp.where(jnp.arange(len(values)) < count, values, 0))


def first_directions(
    problem: Problem,
    key: PRNGKeyArray,
    most: int,
    num_samples: Int[Array, ""] | int,
    rows: Rows,
    exact: bool,
    by_sample: bool,
) -> Float[Array, "D R"]:
    """Returns a sketch of the row space, or directions that span all of it.

    Args:
        problem: constants of the run.
        key: random key.
        most: K.
        num_samples: number of leading rows of Z that count.
        rows: where the rows of Z are.
        exact: whether the directions are to span all of the row space.
        by_sample: whether there are enough rows for a sample of them.
    """
    Z, D = problem.Z, problem.Z.shape[1]
    if exact:
        whole = rows.count(len(Z))
        if whole >= D:
            return jnp.eye(D, dtype=real_dtype(Z))
        numbers = jnp.arange(whole)
        real = (numbers < num_samples)[:, None]
        return (real * (rows.take(Z, numbers) - problem.mean.high)).T
    R = num_axes(most + OVERSAMPLE)
    if not by_sample:
        sketch = project(problem, jax.random.normal(key, (D, R), real_dtype(Z)))
        return covariance_image(problem, sketch, rows)
    # With this many rows, a sample says nearly as much as all of them and saves a pass over Z. The
    # last directions are drawn from the whole space, so that nothing outside the sample is out of
    # reach.
    sample_key, key = jax.random.split(key)
    row_key, sample_key = jax.random.split(sample_key)
    drawn = draw_rows(row_key, num_samples, SAMPLE * R, len(Z), rows)
    X = rows.take(Z, drawn) - problem.mean.high
    leading = directions_of_sample(X, sample_key, R - ANYWHERE)
    anywhere = jax.random.normal(key, (D, ANYWHERE), leading.dtype) / D**0.5
    return jnp.concatenate([leading, anywhere], axis=1)


def is_small(N: int, D: int, K: int) -> bool:
    """Returns whether the span of one update would be nearly all of the space of Z[N, D]."""
    return min(N, D) <= max(EXACT, 2 * num_axes(K))


def is_narrow(N: int, D: int, K: int) -> bool:
    """Returns whether the covariance of Z[N, D] costs less than updates would."""
    upper = (BLOCKS + 1) / (2 * BLOCKS)
    return upper * N * D + EIGH * D**2 < 2 * (2 + UPDATES) * N * num_axes(K)


def expected_gain(
    basis: Float[Array, "D R"],
    images: Float[Array, "D R"],
    variances: Float[Array, " R"],
    num_concepts: Int[Array, ""] | int,
) -> Float[Array, ""]:
    """Returns the relative gain in variance explained by the first axes that an update would bring.

    An axis with more than DOMINANT times the median variance counts as that much, and its gain in
    proportion: a few columns of huge variance say nothing about the other axes.
    """
    # Subtracts what already lies in the span: each axis has a trace of a column of huge variance in
    # its last digit, whose image is not a gain.
    missed = jnp.sum((images - matmul(basis, matmul(basis.T, images))) ** 2, axis=0)
    variances = jnp.where(jnp.arange(len(variances)) < num_concepts, variances, 0)
    # They are in decreasing order.
    median = 0.5 * (variances[(num_concepts - 1) // 2] + variances[num_concepts // 2])
    gain = jnp.where(variances > TINY, 2 * missed / jnp.maximum(variances, TINY), 0)
    counted = jnp.minimum(variances, DOMINANT * median)
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
    counts: Counts


class Fixed(NamedTuple):
    """What no update changes."""

    problem: Problem  # without its matrix
    num_concepts: Int[Array, " Q"]


class Plan(NamedTuple):
    """Settings that are fixed at compile time, and the phases of the solver."""

    most: int  # K, of which some may not be asked for
    room: int  # number of updates that the history has room for
    narrow: bool  # whether the components come from the covariance
    exact: bool  # whether the first span is the whole space
    by_sample: bool  # whether a sample of the rows gives the first span

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Phases in the order they run."""
        repeated = () if self.narrow or self.exact else (Phase(self.improve, repeats=True),)
        return Phase(self.start), *repeated, Phase(self.finish)

    def runs(self, counts: Counts) -> tuple[int, ...]:
        """Returns a single run: fewer components are the first ones of more."""
        return (max(one_run_each(counts)),)

    def start(self, Z: Array, given: tuple, limit: Any, rows: Rows) -> Carry:
        """Finds the best axes in a sketch of the row space."""
        key, tol, (N, num_concepts, _) = given
        K, problem = jnp.max(num_concepts), prepare(Z, N, rows)
        if self.narrow:
            state = solved(problem, K, self.most, rows, careful=self.exact)
        else:
            how = self.exact, self.by_sample
            directions = first_directions(problem, key, self.most, N, rows, *how)
            state = init(problem, directions, K, rows, self.most)
            state = state._replace(error=jnp.zeros_like(state.error)) if self.exact else state
        progress = jax.tree.map(lambda leaf: leaf[None], begin(state, self.room))
        return Carry(tol, Fixed(problem._replace(Z=None), num_concepts), progress)

    def improve(self, Z: Array, carry: Carry, limit: Any, rows: Rows) -> Carry:
        """Runs updates."""
        problem, K = carry.fixed.problem._replace(Z=Z), jnp.max(carry.fixed.num_concepts)
        step = partial(update, problem, num_concepts=K, rows=rows)
        goes_on = each(partial(run, step, tol=carry.tol, max_iter=limit))
        return carry._replace(progress=goes_on(carry.progress))

    def finish(self, Z: Array, carry: Carry, limit: Any, rows: Rows) -> Result:
        """Computes the components with their signs, and the objective."""
        problem, num_concepts = carry.fixed.problem._replace(Z=Z), carry.fixed.num_concepts
        progress = jax.tree.map(lambda leaf: leaf[0], carry.progress)
        components = progress.state.basis[:, : self.most].T
        scores = progress.state.scores[:, : self.most]
        in_use = jnp.arange(len(components)) < jnp.max(num_concepts)
        components, scores = in_use[:, None] * components, in_use * scores
        sign = _signs(components)
        beyond = rows.total(sums.column_sums(scores**2).value)
        left = remaining(problem, progress.state.objective, scores, components, rows)
        # Corrects the whole history by the rounding error of the energy.
        missed = left - progress.state.objective
        missing = jnp.arange(len(components)) >= num_concepts[:, None]

        def copies(value: Array) -> Array:
            return jnp.broadcast_to(value, (len(num_concepts), *value.shape))

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
    # Choices by cost alone: those of all numbers of rows that are padded to one.
    K, N, D = max(num_concepts), bucket_of_rows(num_samples, width), width
    most = min(num_axes(K), num_samples, D)
    exact = is_small(N, D, K)
    narrow = N >= D and (exact or is_narrow(N, D, K))
    by_sample = 2 * SAMPLE * num_axes(most + OVERSAMPLE) <= N
    counts = Counts.of(num_samples, num_concepts, max_iter)
    fixed = Plan(most, room_for(max_iter), narrow, exact, by_sample)
    return fixed, Given(key, np.float32(tol), counts)  # type: ignore[arg-type]


def solve(
    Z: Float[Array, "N D"], key: PRNGKeyArray, *, mesh: Mesh | None = None, **options: Any
) -> Result:
    """Finds the components in one compiled program; the options are those of `plan`."""
    return run_compiled(*plan(key, width=Z.shape[1], **options), Z, mesh)


@jit
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
