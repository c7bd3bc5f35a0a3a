"""Shift vectors: how the samples of a concept move, and how consistently.

Original states a_m and fine-tuned states b_m come from the same samples; a sample belongs to the
concept that it activates most.

    shift of concept k       s_k = mean of b_m - mean of a_m over the samples of k
    shifted concept          u_k + alpha s_k
    consistency              mean cosine of (b_m - a_m) and (b_n - a_n) over pairs m != n of k

N samples, D width, K concepts. A concept with fewer than two samples (see `counts`) has no shift:
its values are NaN. Everything here works under jit (with num_concepts and reduce static), vmap
and grad; float64 states give float64 results if x64 is enabled. The error of the means does not
grow with N, nor with an offset of the states (see `solvers.sums`).
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Int

from xlvlm_jax.solvers import sums
from xlvlm_jax.solvers.linalg import matmul

Array = jax.Array | np.ndarray
Reduce = Literal["mean", "median", "trimmed_mean"]
AssignBy = Literal["activation", "cosine", "l2"]
MIN_SAMPLES = 2  # samples that a concept needs to have a shift
TRIMMED = 0.1  # share that "trimmed_mean" cuts off at each end, as in scipy.stats.trim_mean


def assign(activations: Float[Array, "N K"]) -> Int[Array, " N"]:
    """Returns int32[N], the most activated concept of each sample. Works under jit and vmap.

    Args:
        activations: float[N, K]; of equal ones the first counts.
    """
    return jnp.argmax(jnp.asarray(activations), axis=1).astype(jnp.int32)


def nearest(
    states: Float[Array, "N D"], components: Float[Array, "K D"], by: AssignBy = "cosine"
) -> Int[Array, " N"]:
    """Returns int32[N], the concept that each state is most similar to. Works under jit and vmap.

    Args:
        states: float[N, D].
        components: float[K, D], the concepts.
        by: "cosine", or "l2" for the smallest distance.

    Raises:
        ValueError: `by` is neither.
    """
    states, components = (jnp.asarray(rows, jnp.float32) for rows in (states, components))
    if by == "cosine":
        # Of zero, the cosine with everything is zero.
        lengths = _norms(components)
        scores = matmul(states, (components / _nonzero(lengths)[:, None]).T)
    elif by == "l2":
        # Around the concepts' mean, so that an offset of all states costs no precision.
        centre = jnp.mean(components, axis=0)
        states, components = states - centre, components - centre
        scores = matmul(states, components.T) - jnp.sum(components**2, axis=1) / 2
    else:
        raise ValueError(f"states are assigned by {by!r}; expected 'cosine' or 'l2'")
    return jnp.argmax(scores, axis=1).astype(jnp.int32)


def normalised(shifts: Float[Array, "K D"]) -> Float[Array, "K D"]:
    """Returns shifts divided by the norm of their whole matrix, as XL-VLMs normalises them.

    Works under jit, vmap and grad.

    Args:
        shifts: float[K, D]; NaN for a concept without a shift, which does not count. Zeros stay.

    Returns:
        float32[K, D], of Frobenius norm 1 without the rows of NaN.
    """
    shifts = jnp.asarray(shifts)
    return shifts / _nonzero(_norms(jnp.where(jnp.isnan(shifts), 0, shifts).reshape(1, -1)))


def counts(assignment: Int[Array, " N"], num_concepts: int) -> Int[Array, " K"]:
    """Counts the samples of each concept. Works under jit (num_concepts static) and vmap.

    Args:
        assignment: int[N], as for `concept_shift`.
        num_concepts: K.

    Raises:
        ValueError: a number is not in -1 to K - 1.
    """
    return jnp.bincount(_within(assignment, num_concepts), length=num_concepts)


def concept_shift(
    original: Float[Array, "N D"],
    destination: Float[Array, "N D"],
    assignment: Int[Array, " N"],
    num_concepts: int,
    reduce: Reduce = "mean",
) -> Float[Array, "K D"]:
    """Returns the centre of each concept's fine-tuned states minus its original states' centre.

    Works under jit (num_concepts and reduce static), vmap and grad.

    Args:
        original, destination: float[N, D], states of the same samples before and after
            fine-tuning.
        assignment: int[N], the concept of each sample, 0 to K - 1; -1 for none. Under a trace,
            where values can't be checked, larger numbers count as none.
        num_concepts: K.
        reduce: the centre: "mean", "median" (of each coordinate) or "trimmed_mean" (without the
            lowest and highest tenth of each coordinate).

    Returns:
        float32[K, D], NaN for concepts with fewer than two samples.

    Raises:
        ValueError: the shapes do not match, a concept's number is not in -1 to K - 1, or `reduce`
            is unknown.
    """
    original, destination, assignment = _paired(original, destination, assignment, num_concepts)
    if reduce not in ("mean", "median", "trimmed_mean"):
        raise ValueError(f"reduce is {reduce!r}; expected 'mean', 'median' or 'trimmed_mean'")
    if reduce == "mean":
        sizes, moved = _means(destination - original, assignment, num_concepts)
        return jnp.where(sizes[:, None] >= MIN_SAMPLES, moved, jnp.nan)
    # Relative to a common origin, so that an offset of all states costs no precision.
    origin = sums.column_means(original).high
    original, destination = original - origin, destination - origin
    sizes = jnp.bincount(assignment, length=num_concepts)
    rank = jnp.arange(len(assignment))[:, None]

    def centre(states: jax.Array, members: jax.Array, size: jax.Array) -> jax.Array:
        cut = (size - 1) // 2 if reduce == "median" else (TRIMMED * size).astype(int)
        ordered = jnp.sort(jnp.where(members[:, None], states, jnp.inf), axis=0)
        kept = (rank >= cut) & (rank < size - cut)
        # A concept without samples has no finite row.
        middle = jnp.where(size > 0, ordered[size // 2], 0)
        total = sums.add_up(
            lambda first, count: jnp.sum(
                sums.block_of(jnp.where(kept, ordered - middle, 0), first, count), axis=0
            ),
            len(ordered),
            sums.rows_of_block(ordered.shape[1]),
        )
        return middle + total.value / (size - 2 * cut)

    def of_concept(concept: jax.Array) -> jax.Array:
        members, size = assignment == concept, sizes[concept]
        moved = centre(destination, members, size) - centre(original, members, size)
        return jnp.where(size >= MIN_SAMPLES, moved, jnp.nan)

    # One concept at a time: all at once would need K copies of the states.
    return jax.lax.map(of_concept, jnp.arange(num_concepts))


def shifted(
    components: Float[Array, "K D"],
    shifts: Float[Array, "K D"],
    alpha: float | Float[Array, ""] = 1.0,
    *,
    unit_norm: bool = False,
) -> Float[Array, "K D"]:
    """Returns the concepts moved by alpha times their shift.

    Works under jit, vmap and grad.

    Args:
        components: float[K, D], the concepts.
        shifts: float[K, D], their shifts.
        alpha: the strength.
        unit_norm: divide each moved concept by its norm; zeros stay.

    Returns:
        float32[K, D], NaN for a concept without a shift.
    """
    moved = jnp.asarray(components) + alpha * jnp.asarray(shifts)
    return moved / _nonzero(_norms(moved))[:, None] if unit_norm else moved


class Spread(NamedTuple):
    """How consistently the samples of each concept move; all fields are float32[K].

    Attributes:
        consistency: float32[K], mean cosine of the shifts of two samples.
        product: float32[K], mean dot product of the shifts of two samples.
        cosine_with_mean: float32[K], mean cosine of a sample's shift with the concept's.
        product_with_mean: float32[K], mean dot product of a sample's shift with the concept's.
        magnitude: float32[K], norm of the concept's mean shift.
    """

    consistency: Array
    product: Array
    cosine_with_mean: Array
    product_with_mean: Array
    magnitude: Array


def spread(
    original: Float[Array, "N D"],
    destination: Float[Array, "N D"],
    assignment: Int[Array, " N"],
    num_concepts: int,
) -> Spread:
    """Measures how consistently the samples of each concept move.

    Works under jit (num_concepts static), vmap and grad.

    Args:
        original, destination, assignment, num_concepts: as for `concept_shift`. A sample that does
            not move has no direction and counts with cosine 0.

    Returns:
        The measures, NaN for a concept with fewer than two samples.

    Raises:
        ValueError: the shapes do not match, or a concept's number is not in -1 to K - 1.
    """
    original, destination, assignment = _paired(original, destination, assignment, num_concepts)
    moves = destination - original
    norms = _norms(moves)
    units = moves / _nonzero(norms)[:, None]
    members, mean = _means(moves, assignment, num_concepts)
    _, mean_unit = _means(units, assignment, num_concepts)
    sizes = members.astype(moves.dtype)
    magnitude = _norms(mean)

    def over_pairs(mean: jax.Array, own: jax.Array) -> jax.Array:
        """Returns the mean product of two different rows, from their mean and mean square."""
        return (sizes * jnp.sum(mean**2, axis=1) - own) / (sizes - 1)

    toward = jnp.sum(moves * mean[assignment], axis=1)
    reach = norms * magnitude[assignment]
    cosine = jnp.where(reach > 0, toward / _nonzero(reach), 0)
    of_rows = jnp.stack([jnp.sum(units**2, axis=1), norms**2, cosine, toward], axis=1)
    own_unit, own, cosine, toward = _means(of_rows, assignment, num_concepts)[1].T
    figures = Spread(
        consistency=over_pairs(mean_unit, own_unit),
        product=over_pairs(mean, own),
        cosine_with_mean=cosine,
        product_with_mean=toward,
        magnitude=magnitude,
    )
    return jax.tree.map(lambda row: jnp.where(sizes >= MIN_SAMPLES, row, jnp.nan), figures)


def consistency(
    original: Float[Array, "N D"],
    destination: Float[Array, "N D"],
    assignment: Int[Array, " N"],
    num_concepts: int,
) -> Float[Array, " K"]:
    """Returns the mean cosine between the shifts of two samples of each concept.

    Works under jit (num_concepts static), vmap and grad.

    Args:
        original, destination, assignment, num_concepts: as for `spread`.

    Returns:
        float32[K], `spread(...).consistency`.
    """
    return spread(original, destination, assignment, num_concepts).consistency


@functools.partial(jax.jit, static_argnames="num_concepts")
def _means(
    rows: jax.Array, assignment: jax.Array, num_concepts: int
) -> tuple[Int[Array, " K"], Float[Array, "K D"]]:
    """Returns the number of rows of each concept and their mean; zeros for one without rows."""
    sizes, near = sums.cluster_means(rows, assignment, num_concepts)
    # A second pass over the residuals: concepts may be far apart.
    near = near.value
    nothing = jnp.zeros(rows.shape[1], rows.dtype)
    _, left = sums.cluster_sums(rows - near[assignment], assignment, num_concepts, nothing)
    return sizes, near + left.value / jnp.maximum(sizes, 1)[:, None]


def _norms(rows: jax.Array) -> jax.Array:
    """Returns the norm of each row, with gradient zero for a row of zeros."""
    squares = jnp.sum(rows**2, axis=1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def _nonzero(norms: jax.Array) -> jax.Array:
    """Returns norms to divide by: 1 for those of zero, whose vectors have no direction."""
    return jnp.where(norms > 0, norms, 1)


def _within(assignment: Array, num_concepts: int) -> jax.Array:
    """Returns the concept of each sample, K for none, which sums over concepts leave out.

    Indices below zero would count from the end.
    """
    if not isinstance(assignment, Tracer) and np.size(assignment):
        least, most = int(np.min(assignment)), int(np.max(assignment))
        if not -1 <= least <= most < num_concepts:
            wrong = least if least < -1 else most
            raise ValueError(
                f"a sample is assigned to concept {wrong}; expected 0 to {num_concepts - 1}, or -1 "
                "for none"
            )
    assignment = jnp.asarray(assignment)
    return jnp.where(assignment < 0, num_concepts, assignment)


def _paired(
    original: Array, destination: Array, assignment: Array, num_concepts: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    a, b = jnp.asarray(original), jnp.asarray(destination)
    assignment = jnp.asarray(assignment)
    if a.shape != b.shape or a.ndim != 2 or assignment.shape != a.shape[:1]:
        raise ValueError(
            f"states have shapes {a.shape} and {b.shape}, the assignment {assignment.shape}; "
            "expected [N, D] for both states, of the same samples, and [N]"
        )
    kind = jnp.promote_types(a.dtype, jnp.float32)
    return a.astype(kind), b.astype(kind), _within(assignment, num_concepts)
