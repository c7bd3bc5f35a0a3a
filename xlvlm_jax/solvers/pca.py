"""Principal component analysis.

    minimise   1/2 |Z - 1 m - S C|_F^2   over scores S[N, K] and components C[K, D] with C C^T = I

m is the mean row, S = (Z - 1 m) C^T. `tol` is compared to the gain of explained variance that one
more block would bring (an update has some), relative to what is explained.

Block Lanczos iteration with thick restarts (Golub and Underwood, "The block Lanczos method for
computing eigenvalues", 1977; Wu and Simon, "Thick-restart Lanczos method", 2000): the image of a
block of columns under A = (Z - 1 m)^T (Z - 1 m), made orthogonal to all before it, is the next
block. An update adds some blocks to the last axes and takes the best axes in their span (Rayleigh
and Ritz). Only the blocks are multiplied with Z; and since the last axes stay in the span,
explained variance cannot decrease. A maps the whole span but its last block into itself, so that
the next block tells what every axis misses: to first order, axis v with variance l = v^T A v would
gain 2 |A v - l v|^2 / l from its image.

Up to LANES components start from a sketch: the leading directions of some rows, or random sums of
all. More start from the image of a random block of few columns, and a span of about twice as many
columns as axes, or three times if a block is as wide as they are many. Rounding in images of
directions of huge variance must not pass for convergence: see HIDES.
Narrow blocks need fewer columns in all than blocks as wide as there are axes (Meyer, Musco and
Musco, "On the unreasonable effectiveness of single vector Krylov methods for low-rank
approximation", 2024): a third at [10000, 4096], K = 256.

If D is so small compared to N and K that the covariance costs less than a few updates, or at most
N and at most EXACT or 2 W, W the number of axes, the axes are its eigenvectors and nothing is
iterated. If N is as small, the first span is the whole row space.

Signs follow scikit-learn: the entry of largest absolute value in a component is positive.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
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

LANES = 32  # a product with 32 columns takes hardly longer than one with 20
# Columns per block: the fewer, the fewer are multiplied with Z until many axes are found. With less
# than this, a product takes longer per column: a CPU's is too thin, a GPU waits for the memory, a
# TPU fills 128 lanes.
WIDTHS = {"cpu": 32, "gpu": 64, "tpu": 128}
SKETCH = 64  # first directions of at most LANES components
SAMPLE = 8, 16  # rows per direction that the first directions are computed from: least and most
SHARE = 8  # of the rows: a larger sample costs more than it saves
ANYWHERE = 8  # how many of the first directions are random
EXACT = 256
# Choice between covariance and iteration, in products of Z with one column: the updates that hidden
# states need, and the eigenvectors of [D, D], which cost EIGH * D^3.
UPDATES = 2
EIGH = 10
BLOCKS = 3  # row blocks of the covariance, so that only two thirds of it are computed
CANCELS = 0.1  # of the energy: a smaller difference of sums has lost digits
FAINT = 2**-8  # the same for what the covariance has in directions beside the axes
DOMINANT = 16  # times the median axis's variance
AT_ONCE = 2**17  # rows that are multiplied at once for images of axes
# First axis's variance over another's: with more, eigenvectors in float32 keep two or three digits
# of that one. Up to SPREAD over the median axis and WIDER over the last, all axes together still
# explain within 1e-6 of what they could. From STEEP on, small entries have to be on one scale with
# the large ones before any eigenvalues are computed.
SPREAD, WIDER, STEEP = 2**12, 2**14, 2**20
# First axis's variance over the last one's: with more, images are looked at before axes are said to
# have converged. Rounding hides 2^-24 times this of an image, or 1.5e-5 of a gain.
HIDES = 2**16
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

    basis: Float[Array, "D V"]  # orthonormal, by decreasing variance
    scores: Float[Array, "N V"]  # (Z - 1 m) basis
    new: Float[Array, "D B"]  # orthonormal, and to the basis: what A adds to its span
    objective: Float[Array, ""]
    error: Float[Array, ""]
    spread: Bool[Array, ""]  # whether rounding may hide what the axes miss, see HIDES


class Span(NamedTuple):
    """What the best axes are looked for in."""

    basis: Float[Array, "D M"]  # orthonormal
    scores: Float[Array, "N M"]  # (Z - 1 m) basis
    new: Float[Array, "D B"]  # orthonormal, and to the basis: what A adds to the span
    beyond: Float[Array, "B B"]  # new^T A [the last B columns of the basis]


def prepare(
    Z: Float[Array, "N D"], num_samples: Int[Array, ""] | int, rows: Rows = ONE_DEVICE
) -> Problem:
    """Returns the constants for a Z whose first `num_samples` rows count."""
    real, mean = _centre(Z, num_samples, rows)
    squares = sums.total(real * sums.squared_distances(Z, *mean))
    return _problem(Z, num_samples, real, mean, 0.5 * rows.total(squares).value)


def _centre(
    Z: Float[Array, "N D"], num_samples: Int[Array, ""] | int, rows: Rows
) -> tuple[Float[Array, " N"], Wide]:
    """Returns which rows count, and their mean."""
    real = (rows.numbers(len(Z)) < num_samples).astype(real_dtype(Z))
    return real, sums.column_means(Z, num_samples, rows)


def _problem(
    Z: Float[Array, "N D"],
    num_samples: Int[Array, ""] | int,
    real: Float[Array, " N"],
    mean: Wide,
    energy: Float[Array, ""],
) -> Problem:
    variance = 2 * energy / (jnp.asarray(num_samples, energy.dtype) * Z.shape[1])
    far = (sums.is_far(mean.high, variance, count) for count in (1, len(Z)))
    return Problem(Z, real, mean, energy, *far)


def num_axes(num_concepts: int) -> int:
    """Returns W, the number of axes that are iterated on for K components."""
    return -(-num_concepts // LANES) * LANES


class Blocks(NamedTuple):
    """How a span grows: by blocks of few columns, each the image of the last."""

    width: int  # B, columns per block
    first: int  # number of blocks that the first axes come from; 0 if they come from a sketch
    more: int  # number of blocks per update
    kept: int  # V, axes that an update keeps


def blocks_for(num_concepts: int, N: int, D: int, backend: str | None = None) -> Blocks:
    """Returns how a span grows for K components of Z[N, D], on JAX's backend if none is named."""
    W = num_axes(num_concepts)
    if W == LANES:
        return Blocks(W, 0, 1, W)

    def of_width(B: int) -> Blocks:
        kept = -(-W // B) * B + B
        # The last block's image needs room too.
        most = min(kept + W, min(N, D) - B) // B * B
        kept = min(kept, most - B)
        return Blocks(B, most // B, (most - kept) // B, kept)

    blocks = of_width(min(W, WIDTHS.get(backend or jax.default_backend(), LANES)))
    # If the space has no room for an update by such blocks. It has by LANES columns, see is_small.
    while blocks.kept < W and blocks.width > LANES:
        blocks = of_width(max(blocks.width // 2, LANES))
    return blocks


def init(
    problem: Problem,
    directions: Float[Array, "D R"],
    num_concepts: Int[Array, ""] | int,
    blocks: Blocks,
    rows: Rows = ONE_DEVICE,
) -> State:
    """Returns the state at the best axes in the span of the directions, and of the first blocks."""
    basis = orthonormal(directions)
    none = basis[:, :0]
    if blocks.first:
        # Every column of a random block has a share of each direction of huge variance; in its
        # image, rounding of these would hide all others. An orthonormal basis of that image has
        # them in its first columns alone, as each is made orthogonal to those before.
        new = orthonormal(covariance_image(problem, project(problem, basis), rows))
        energy, scores = problem.energy, project(problem, none)
        empty = State(none, scores, new, energy, energy, jnp.array(False))
        span = extend(problem, empty, blocks.first, rows)
        return best_axes(problem, span, blocks.kept, num_concepts, rows)
    found = best_axes(problem, _whole(problem, basis), blocks.kept, num_concepts, rows)
    return with_images(problem, found, num_concepts, rows)


def best_within(
    problem: Problem,
    directions: Float[Array, "D R"],
    most: int,
    num_concepts: Int[Array, ""] | int,
    rows: Rows = ONE_DEVICE,
) -> State:
    """Returns the state at the `most` best axes in the span of the directions, without a block."""
    span = _whole(problem, orthonormal(directions))
    return best_axes(problem, span, most, num_concepts, rows)


def _whole(problem: Problem, basis: Float[Array, "D M"]) -> Span:
    """Returns a span that nothing is added to."""
    none = basis[:, :0]
    return Span(basis, project(problem, basis), none, matmul(none.T, none))


def with_images(
    problem: Problem,
    state: State,
    num_concepts: Int[Array, ""] | int,
    rows: Rows = ONE_DEVICE,
) -> State:
    """Returns the state with the images of all of its axes as the next block."""
    images = covariance_image(problem, state.scores, rows)
    new = complement(state.basis, images)
    missed = jnp.sum(matmul(new.T, images) ** 2, axis=0)
    variances = jnp.sum(state.basis * images, axis=0)
    return state._replace(new=new, error=expected_gain(missed, variances, num_concepts))


def update(
    problem: Problem,
    state: State,
    num_concepts: Int[Array, ""] | int,
    rows: Rows = ONE_DEVICE,
    blocks: int = 1,
) -> State:
    """Returns the best axes in the span of the last axes and of some more blocks."""
    span = extend(problem, state, blocks, rows)
    found = best_axes(problem, span, state.basis.shape[1], num_concepts, rows)
    # The last axes are in the span: more is rounding, a digit of a huge energy.
    return found._replace(objective=jnp.minimum(found.objective, state.objective))


def extend(problem: Problem, state: State, count: int, rows: Rows = ONE_DEVICE) -> Span:
    """Returns the span of the state's axes and of `count` blocks, each the image of the last."""
    V, B = state.basis.shape[1], state.new.shape[1]

    def step(i: Array, span: Span) -> Span:
        at = V + i * B
        basis = jax.lax.dynamic_update_slice_in_dim(span.basis, span.new, at, axis=1)
        score = project(problem, span.new)
        image = covariance_image(problem, score, rows)
        new = complement(basis, image)
        scores = jax.lax.dynamic_update_slice_in_dim(span.scores, score, at, axis=1)
        return Span(basis, scores, new, matmul(new.T, image))

    # Columns that are yet to come are zero, which changes no product.
    room = ((0, 0), (0, count * B))
    basis, scores = jnp.pad(state.basis, room), jnp.pad(state.scores, room)
    first = Span(basis, scores, state.new, jnp.zeros((B, B), basis.dtype))
    return jax.lax.fori_loop(0, count, step, first)


def best_axes(
    problem: Problem,
    span: Span,
    count: int,
    num_concepts: Int[Array, ""] | int,
    rows: Rows = ONE_DEVICE,
) -> State:
    """Returns the state at the `count` leading axes within a span (Rayleigh-Ritz)."""
    variances, axes = principal(overlaps(span.scores, rows), num_concepts)
    axes = axes[:, :count]
    basis = matmul(span.basis, axes)
    # Rounding accumulates over updates. Each axis is made orthogonal to those of larger variance: a
    # share of these would change its variance most. Correct to first order.
    products = matmul(basis.T, basis)
    straight = jnp.eye(len(products), dtype=basis.dtype) - jnp.triu(products, 1)
    straight = straight + jnp.diag(0.5 - 0.5 * jnp.diagonal(products))
    basis, scores = matmul(basis, straight), matmul(span.scores, matmul(axes, straight))
    objective = problem.energy - 0.5 * _sum_of_first(variances, num_concepts)
    # All of the span but its last block has its image in the span.
    missed = jnp.sum(matmul(span.beyond, axes[len(axes) - span.new.shape[1] :]) ** 2, axis=0)
    error = expected_gain(missed, variances[:count], num_concepts)
    spread = _spread(variances, num_concepts) > HIDES
    return State(basis, scores, span.new, objective, error, spread)


def _spread(variances: Float[Array, " R"], num_concepts: Int[Array, ""] | int) -> Float[Array, ""]:
    """Returns the first variance over the last one that counts; they are decreasing."""
    last = variances[jnp.minimum(num_concepts, len(variances)) - 1]
    return variances[0] / jnp.maximum(last, TINY)


def checked(
    problem: Problem,
    state: State,
    blocks: Blocks,
    num_concepts: Int[Array, ""] | int,
    tol: Float[Array, ""] | float,
    rows: Rows = ONE_DEVICE,
) -> State:
    """Returns a state whose error is that of the images of its axes if it seems to be converged.

    The error that an update gives is what the last block misses; the images of the others lie in
    the span, but for what rounding has hidden. If so much may be hidden, this looks at the images
    of all axes, one product of Z with each. The next block is what those miss that miss most.
    """
    if not blocks.first:
        return state  # the images of few axes were their next block

    def by_images(state: State) -> State:
        images = covariance_image(problem, state.scores, rows)
        missed, variances = _beyond(state.basis, images), jnp.sum(state.basis * images, axis=0)
        squares = jnp.sum(missed**2, axis=0)
        error = expected_gain(squares, variances, num_concepts)
        # Of the axes that miss most: relative to their variance, as rounding grows with it.
        counts = (jnp.arange(len(variances)) < num_concepts) & (variances > TINY)
        share = jnp.where(counts, squares / variances / variances, -1)
        _, axes = jax.lax.top_k(share, state.new.shape[1])
        return state._replace(new=complement(state.basis, missed[:, axes]), error=error)

    doubtful = state.spread & (state.error <= tol)
    return jax.lax.cond(doubtful, by_images, lambda state: state, state)


def _beyond(basis: Float[Array, "D V"], images: Float[Array, "D V"]) -> Float[Array, "D V"]:
    """Returns what the images have beyond the span of the basis."""
    # Twice: a part of an axis of huge variance that rounding has left is not a gain.
    for _ in range(2):
        images = images - matmul(basis, matmul(basis.T, images))
    return images


def overlaps(scores: Float[Array, "N M"], rows: Rows = ONE_DEVICE) -> Float[Array, "M M"]:
    """Returns scores^T scores; the lower triangle is mirrored."""
    N, M = scores.shape

    def block(first: Array | int, count: int) -> Array:
        return _rows_last(sums.block_of(scores, first, count))

    return _products_of_columns(block, N, M, rows)


def _rows_last(values: Float[Array, "N M"]) -> Float[Array, "N M"]:
    """Returns values that a TPU keeps with the rows along its lanes.

    For a loop over blocks of rows, its compiler would copy all of them with the columns there, each
    row padded to 128.
    """
    if jax.default_backend() != "tpu":
        return values
    return with_layout_constraint(values, Layout((1, 0)))


def principal(
    overlaps: Float[Array, "R R"], num_concepts: Int[Array, ""] | int, steep: bool = True
) -> tuple[Float[Array, " R"], Float[Array, "R R"]]:
    """Returns the eigenvalues of a positive semi-definite matrix, decreasing, and its eigenvectors.

    If the first eigenvalues are far larger than the others, the others would be lost in their
    rounding error, and come from their own part of the matrix. If they are larger by many digits,
    so that there may be several steps, the eigenvectors come from the singular vectors of a square
    root, which spans half as many digits. This keeps small ones if large ones are along few of the
    rows and columns.

    Args:
        overlaps: float[R, R], symmetric, with no eigenvalue below zero but by rounding.
        num_concepts: number of leading eigenvectors that count.
        steep: whether to provide for larger ones by many digits, with a program for an SVD.
    """
    increasing, columns = jnp.linalg.eigh(overlaps)
    values, vectors = increasing[::-1], columns[:, ::-1]

    def of_root(*plain: Array) -> tuple[Array, Array]:
        # With rows and columns on one scale, eigenvalues differ by the angles alone.
        scale = jnp.sqrt(jnp.maximum(jnp.diagonal(overlaps), TINY))
        angles, turned = jnp.linalg.eigh(overlaps / jnp.outer(scale, scale))
        root = jnp.sqrt(jnp.maximum(angles, 0))[:, None] * turned.T * scale
        _, lengths, axes = jnp.linalg.svd(root)
        return lengths**2, axes.T

    def as_found(values: Array, vectors: Array) -> tuple[Array, Array]:
        return values, vectors

    spread = _spread(values, num_concepts)
    rounding = jnp.finfo(values.dtype).eps * values[0]
    if steep:
        is_steep = spread > STEEP
        values, vectors = jax.lax.cond(is_steep, of_root, as_found, values, vectors)
        rounding = jnp.where(is_steep, 0, rounding)  # of half as many digits
    of_median = _spread(values, num_concepts // 2 + 1)
    apart = partial(_apart, overlaps, num_concepts=num_concepts, rounding=rounding)
    lost = (spread > WIDER) | (of_median > SPREAD)
    return jax.lax.cond(lost, apart, as_found, values, vectors)


def _apart(
    overlaps: Float[Array, "R R"],
    values: Float[Array, " R"],
    vectors: Float[Array, "R R"],
    num_concepts: Int[Array, ""] | int,
    rounding: Float[Array, ""],
) -> tuple[Float[Array, " R"], Float[Array, "R R"]]:
    """Returns better eigenvalues and eigenvectors: small ones free of the large ones' rounding.

    A vector's share of another is off by a digit. Of a large one, this is removed to first order;
    then the small ones are those of what is left. A value below `rounding` says nothing.
    """
    last = values[jnp.minimum(num_concepts, len(values)) - 1]
    is_large = values > SPREAD * jnp.maximum(last, rounding)
    turned = matmul(vectors.T, matmul(overlaps, vectors))
    shared = jnp.where(is_large[:, None] & ~is_large, turned, 0)
    # Values near each other may keep a share.
    gaps = jnp.maximum(values[:, None] - values, 0.5 * values[:, None])
    angles = shared / jnp.maximum(gaps, TINY)
    vectors = vectors + matmul(vectors, angles.T - angles)

    left = jnp.where(is_large | is_large[:, None], 0, turned - matmul(angles.T, shared))
    # Large ones are taken out: they come last.
    beneath = -jnp.max(jnp.sum(jnp.abs(left), axis=1)) - TINY
    small, axes = jnp.linalg.eigh((left + left.T) / 2 + jnp.diag(is_large * beneath))
    count = jnp.sum(is_large)
    small, axes = (jnp.roll(found[..., ::-1], count, axis=-1) for found in (small, axes))
    axes = jnp.where(is_large, jnp.eye(len(axes), dtype=axes.dtype), ~is_large[:, None] * axes)
    return jnp.where(is_large, values, small), matmul(vectors, axes)


def project(problem: Problem, basis: Float[Array, "D R"]) -> Float[Array, "N R"]:
    """Returns (Z - 1 m) basis, with zeros for rows that pad Z."""
    mean, beyond = problem.mean

    def moved(products: Array) -> Array:
        return problem.real[:, None] * (products - matmul(beyond, basis))

    return sums.centred_scores(problem.Z, basis, mean, problem.far, moved)


def covariance_image(
    problem: Problem, scores: Float[Array, "N R"], rows: Rows = ONE_DEVICE
) -> Float[Array, "D R"]:
    """Returns (Z - 1 m)^T scores."""
    mean, beyond = problem.mean
    # Scores of padding rows are zero.
    far = problem.far_in_sums
    images = sums.weighted_directions(scores.T, problem.Z, mean, far, AT_ONCE)
    return rows.total(images.T - jnp.outer(beyond, jnp.sum(scores, axis=0)))


def covariance(
    Z: Float[Array, "N D"], real: Float[Array, " N"], mean: Wide, rows: Rows = ONE_DEVICE
) -> Float[Array, "D D"]:
    """Returns (Z - 1 m)^T (Z - 1 m), from blocks of its rows; the lower triangle is mirrored.

    Args:
        Z: float[N, D].
        real: float[N], 1 for a row that counts and 0 for another.
        mean: the mean of those that count, float[D].
        rows: where the rows of Z are.
    """
    (N, D), (middle, beyond) = Z.shape, mean

    def centred(first: Array | int, count: int) -> Array:
        # Centred before the product: the energy of a large mean would round away the rest.
        counts = sums.block_of(real, first, count)[:, None]
        return counts * ((sums.block_of(Z, first, count) - middle) - beyond)

    return _products_of_columns(centred, N, D, rows)


def _products_of_columns(
    block: Callable[[Array | int, int], Array], N: int, M: int, rows: Rows
) -> Float[Array, "M M"]:
    """Returns X^T X of X[N, M] whose rows `block(first, count)` returns."""
    edges = [round(i * M / BLOCKS) for i in range(BLOCKS + 1)]
    spans = list(itertools.pairwise(edges))

    def part(first: Array | int, count: int) -> list[Array]:
        x = block(first, count)
        return [matmul(x[:, start:stop].T, x[:, start:]) for start, stop in spans]

    totals = sums.add_up(part, N, sums.rows_of_block(M))
    upper = rows.total([total.value for total in totals])
    total = jnp.concatenate([jnp.pad(each, ((0, 0), (M - each.shape[1], 0))) for each in upper])
    return jnp.triu(total) + jnp.triu(total, 1).T


def solved(
    Z: Float[Array, "N D"],
    num_samples: Int[Array, ""] | int,
    num_concepts: Int[Array, ""] | int,
    most: int,
    rows: Rows = ONE_DEVICE,
    steep: bool = False,
) -> tuple[Problem, State]:
    """Returns the constants and the state at the optimum, from the covariance.

    The state has neither blocks, as no update follows, nor scores, which take a pass over Z: those
    of the final components are enough.

    Args:
        Z: float[N, D].
        num_samples: number of leading rows of Z that count.
        num_concepts: number of axes that count in the objective.
        most: number of axes.
        rows: where the rows of Z are.
        steep: as for `principal`.
    """
    real, mean = _centre(Z, num_samples, rows)
    total = covariance(Z, real, mean, rows)
    energy = 0.5 * sums.total(jnp.diagonal(total)).value
    problem = _problem(Z, num_samples, real, mean, energy)
    variances, axes = principal(total, num_concepts, steep)
    basis = axes[:, :most]
    estimate = energy - 0.5 * _sum_of_first(variances[:most], num_concepts)

    def beside() -> Array:
        # What all other eigenvectors explain: their rounding counts only squared.
        others = jnp.where(jnp.arange(len(axes)) < num_concepts, 0, axes)
        return 0.5 * sums.total(jnp.sum(others * matmul(total, others), axis=0)).value

    objective = jax.lax.cond(estimate < CANCELS * energy, beside, lambda: estimate)
    zero, none = jnp.zeros_like(objective), basis[:, :0]
    scores = jnp.zeros((len(Z), 0), basis.dtype)
    return problem, State(basis, scores, none, objective, zero, zero > 0)


def _sum_of_first(values: Float[Array, " R"], count: Int[Array, ""] | int) -> Float[Array, ""]:
    return jnp.sum(jnp.where(jnp.arange(len(values)) < count, values, 0))


def whole_space(
    problem: Problem, num_samples: Int[Array, ""] | int, rows: Rows
) -> Float[Array, "D R"]:
    """Returns directions that span the row space of Z[N, D]: R = min(N, D)."""
    Z, D = problem.Z, problem.Z.shape[1]
    whole = rows.count(len(Z))
    if whole >= D:
        return jnp.eye(D, dtype=real_dtype(Z))
    numbers = jnp.arange(whole)
    real = (numbers < num_samples)[:, None]
    return (real * (rows.take(Z, numbers) - problem.mean.high)).T


def first_directions(
    problem: Problem,
    key: PRNGKeyArray,
    blocks: Blocks,
    num_samples: Int[Array, ""] | int,
    rows: Rows,
    sample: int,
) -> Float[Array, "D R"]:
    """Returns directions to start from.

    Args:
        problem: constants of the run.
        key: random key.
        blocks: how the span grows. If from its first block, that is random.
        num_samples: number of leading rows of Z that count.
        rows: where the rows of Z are.
        sample: number of rows whose leading directions to return; 0 for random sums of all rows.
    """
    Z, D = problem.Z, problem.Z.shape[1]
    if blocks.first:
        return jax.random.normal(key, (D, blocks.width), real_dtype(Z))
    if not sample:
        # Of few rows; the same however they are spread.
        sums_of = jax.random.uniform(key, (rows.count(len(Z)), SKETCH), real_dtype(Z), -1, 1)
        mine = problem.real[:, None] * sums_of[rows.numbers(len(Z))]
        return covariance_image(problem, mine, rows)
    # With this many rows, a sample says nearly as much as all of them and saves a pass over Z. The
    # last directions are drawn from the whole space, so that nothing outside the sample is out of
    # reach.
    sample_key, key = jax.random.split(key)
    row_key, sample_key = jax.random.split(sample_key)
    drawn = draw_rows(row_key, num_samples, sample, len(Z), rows)
    X = rows.take(Z, drawn) - problem.mean.high
    leading = directions_of_sample(X, sample_key, SKETCH - ANYWHERE)
    anywhere = jax.random.normal(key, (D, ANYWHERE), leading.dtype) / D**0.5
    return jnp.concatenate([leading, anywhere], axis=1)


def rows_of_sample(N: int) -> int:
    """Returns how many of N rows the first directions come from; 0 if all."""
    least, most = (SKETCH * each for each in SAMPLE)
    count = min(N // SHARE, most)
    return count if count >= least else 0


def is_small(N: int, D: int, K: int) -> bool:
    """Returns whether the span of one update would be nearly all of the space of Z[N, D]."""
    return min(N, D) <= max(EXACT, 2 * num_axes(K))


def is_narrow(N: int, D: int, K: int) -> bool:
    """Returns whether the covariance of Z[N, D] costs less than updates would."""
    upper = (BLOCKS + 1) / (2 * BLOCKS)
    return upper * N * D + EIGH * D**2 < 2 * (2 + UPDATES) * N * num_axes(K)


def expected_gain(
    missed: Float[Array, " R"],
    variances: Float[Array, " R"],
    num_concepts: Int[Array, ""] | int,
) -> Float[Array, ""]:
    """Returns the relative gain in variance explained by the first axes that a block would bring.

    An axis with more than DOMINANT times the median variance counts as that much, and its gain in
    proportion: a few columns of huge variance say nothing about the other axes.

    Args:
        missed: float[R], squared lengths of what the axes' images have beyond the span.
        variances: float[R], decreasing.
        num_concepts: number of axes that count.
    """
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
    least: float = CANCELS,
) -> Float[Array, ""]:
    """Returns the objective: the estimate, or the sum of the residual if that has lost digits.

    Args:
        problem: constants of the run.
        estimate: the objective from sums that may cancel.
        scores: float[N, K].
        components: float[K, D].
        rows: where the rows of Z are.
        least: share of the energy below which the estimate has lost digits.
    """

    def of_residual() -> Array:
        # The part of the mean beyond float32 is one more component, with a score of one.
        codes = jnp.concatenate([scores, problem.real[:, None]], axis=1)
        atoms = jnp.concatenate([components, problem.mean.low[None]])
        squares = residual.of_products(problem.Z, codes, atoms, problem.mean.high)
        return 0.5 * sums.total(problem.real * squares).value

    # Energy minus explained variance cancels if the fit is good.
    cancels = estimate < least * problem.energy
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

    most: int  # number of components, of which some may not be asked for
    room: int  # number of updates that the history has room for
    narrow: bool  # whether the components come from the covariance
    exact: bool  # whether the first span is the whole space
    sample: int  # number of rows that the first directions come from; 0 if all
    blocks: Blocks | None  # how a span grows; None if it does not

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Phases in the order they run."""
        repeated = () if self.blocks is None else (Phase(self.improve, repeats=True),)
        return Phase(self.start), *repeated, Phase(self.finish)

    @property
    def has_wide_products(self) -> bool:
        """Whether rows are multiplied with many columns, see `compiling`."""
        return self.narrow and self.most > LANES

    def runs(self, counts: Counts) -> tuple[int, ...]:
        """Returns a single run: fewer components are the first ones of more."""
        return (max(one_run_each(counts)),)

    def start(self, Z: Array, given: tuple, limit: Any, rows: Rows) -> Carry:
        """Finds the best axes in the first span."""
        key, tol, (N, num_concepts, _) = given
        K = jnp.max(num_concepts)
        if self.narrow:
            problem, state = solved(Z, N, K, self.most, rows, steep=self.exact)
            return self._begun(tol, problem, num_concepts, state)
        problem = prepare(Z, N, rows)
        if self.blocks is None:
            state = best_within(problem, whole_space(problem, N, rows), self.most, K, rows)
        else:
            how = N, rows, self.sample
            directions = first_directions(problem, key, self.blocks, *how)
            state = init(problem, directions, K, self.blocks, rows)
            state = checked(problem, state, self.blocks, K, tol, rows)
        return self._begun(tol, problem, num_concepts, state)

    def _begun(self, tol: Array, problem: Problem, num_concepts: Array, state: State) -> Carry:
        progress = jax.tree.map(lambda leaf: leaf[None], begin(state, self.room))
        return Carry(tol, Fixed(problem._replace(Z=None), num_concepts), progress)

    def improve(self, Z: Array, carry: Carry, limit: Any, rows: Rows) -> Carry:
        """Runs updates."""
        problem, K = carry.fixed.problem._replace(Z=Z), jnp.max(carry.fixed.num_concepts)
        assert self.blocks is not None  # else this is no phase
        blocks = self.blocks

        def step(state: State) -> State:
            state = update(problem, state, K, rows, blocks.more)
            return checked(problem, state, blocks, K, carry.tol, rows)

        goes_on = each(partial(run, step, tol=carry.tol, max_iter=limit))
        return carry._replace(progress=goes_on(carry.progress))

    def finish(self, Z: Array, carry: Carry, limit: Any, rows: Rows) -> Result:
        """Computes the components with their signs, and the objective."""
        problem, num_concepts = carry.fixed.problem._replace(Z=Z), carry.fixed.num_concepts
        progress = jax.tree.map(lambda leaf: leaf[0], carry.progress)
        components = progress.state.basis[:, : self.most].T
        in_use = jnp.arange(len(components)) < jnp.max(num_concepts)
        sign = in_use * _signs(components)
        components = sign[:, None] * components
        if self.narrow:
            # Computed once, not again where it is a result.
            scores = jax.lax.optimization_barrier(project(problem, components.T))
            least = FAINT
        else:
            scores, least = sign * progress.state.scores[:, : self.most], CANCELS
        objective = progress.state.objective
        left = remaining(problem, objective, scores, components, rows, least)
        # Corrects the whole history by the rounding error of the energy.
        missed = left - objective
        # Fewer components leave the variance of the others, in the history as much as at the end.
        omitted = jnp.zeros_like(left)[None]
        if len(num_concepts) > 1:
            beyond = rows.total(sums.column_sums(scores**2).value)
            missing = jnp.arange(len(components)) >= num_concepts[:, None]
            omitted = 0.5 * jnp.sum(jnp.where(missing, beyond, 0), axis=1)

        def copies(value: Array) -> Array:
            return jnp.broadcast_to(value, (len(num_concepts), *value.shape))

        return Result(
            components=copies(components),
            activations=copies(scores),
            objective=left + omitted,
            iterations=copies(progress.iteration),
            converged=copies(progress.state.error <= carry.tol),
            history=progress.history + missed + omitted[:, None],
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
        the first ones of more, and their history is that of more with the variance that the others
        have at the end.
    """
    # Choices by cost alone: those of all numbers of rows that are padded to one.
    K, N, D = max(num_concepts), bucket_of_rows(num_samples, width), width
    most = min(num_axes(K), N, D)
    exact = is_small(N, D, K)
    narrow = N >= D and (exact or is_narrow(N, D, K))
    counts = Counts.of(num_samples, num_concepts, max_iter)
    blocks = None if exact or narrow else blocks_for(K, N, D)
    fixed = Plan(most, room_for(max_iter), narrow, exact, rows_of_sample(N), blocks)
    return fixed, Given(key, np.float32(tol), counts)  # type: ignore[arg-type]


def solve(
    Z: Float[Array, "N D"], key: PRNGKeyArray, *, mesh: Mesh | None = None, **options: Any
) -> Result:
    """Finds the components in one compiled program; the options are those of `plan`."""
    return run_compiled(*plan(key, width=Z.shape[1], **options), Z, mesh)


@jit
def activations(
    Z: Float[Array, "N D"],
    components: Float[Array, "K D"],
    mean: Float[Array, " D"],
    num_samples: Int[Array, ""] | np.integer | int,
) -> Float[Array, "N K"]:
    """Returns the scores (Z - 1 m) C^T, of which the first `num_samples` count."""
    # Rows that pad Z are zero: far from a mean that is far from zero, as no row is.
    real = (jnp.arange(len(Z)) < num_samples)[:, None]
    variance = jnp.sum(jnp.where(real, (Z - mean) ** 2, 0) / Z.shape[1])
    variance = variance / jnp.maximum(num_samples, 1)
    return sums.centred_scores(Z, components.T, mean, sums.is_far(mean, variance))


def with_signs(components: Float[Array, "K D"]) -> Float[Array, "K D"]:
    """Returns the components with their largest entries made positive."""
    return _signs(components)[:, None] * components


def _signs(components: Float[Array, "K D"]) -> Float[Array, " K"]:
    largest = jnp.argmax(jnp.abs(components), axis=1)
    return jnp.where(components[jnp.arange(len(components)), largest] < 0, -1.0, 1.0)
