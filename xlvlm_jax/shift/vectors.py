"""Shift vectors: how the samples of a concept move, and how alike they move.

Original states a_m and fine-tuned states b_m belong to the same M samples; a sample belongs to the
concept that it activates most.

    shift of concept k       s_k = mean of b_m - mean of a_m over the samples of k
    shifted concept          u_k + alpha s_k
    consistency              mean cosine of (b_m - a_m) and (b_n - a_n) over pairs m != n of k

N samples, D width, K concepts. A concept with fewer than two samples has no shift: its figures are
NaN, which `counts` explains. Everything here can be jitted.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

Array = jax.Array | np.ndarray
Reduce = Literal["mean", "median", "trimmed_mean"]
MIN_SAMPLES = 2  # of a concept, for it to have a shift
TRIMMED = 0.1  # the share cut off at each end by "trimmed_mean", as in scipy.stats.trim_mean


def assign(activations: Float[Array, "N K"]) -> Int[Array, " N"]:
    """The most activated concept of each sample."""
    return jnp.argmax(jnp.asarray(activations), axis=1).astype(jnp.int32)


def counts(assignment: Int[Array, " N"], num_concepts: int) -> Int[Array, " K"]:
    """How many samples each concept has."""
    return jnp.bincount(jnp.asarray(assignment), length=num_concepts)


def concept_shift(
    original: Float[Array, "N D"],
    destination: Float[Array, "N D"],
    assignment: Int[Array, " N"],
    num_concepts: int,
    reduce: Reduce = "mean",
) -> Float[Array, "K D"]:
    """The shift of each concept: the centre of its fine-tuned states minus that of the original.

    Args:
        original, destination: states of the same samples before and after fine-tuning.
        assignment: the concept of each sample, 0 to K - 1.
        num_concepts: K.
        reduce: the centre: "mean", "median" (of every coordinate) or "trimmed_mean" (without the
            lowest and highest tenth of every coordinate).

    Returns rows of NaN for concepts with fewer than two samples.
    Raises ValueError for arrays that do not fit each other, or another `reduce`.
    """
    original, destination, assignment = _paired(original, destination, assignment)
    if reduce not in ("mean", "median", "trimmed_mean"):
        raise ValueError(f"reduce is {reduce!r}; expected 'mean', 'median' or 'trimmed_mean'")
    sizes = counts(assignment, num_concepts)
    rank = jnp.arange(len(assignment))[:, None]

    def centre(states: jax.Array, members: jax.Array, size: jax.Array) -> jax.Array:
        if reduce == "mean":
            return jnp.sum(jnp.where(members[:, None], states, 0), axis=0) / size
        cut = (size - 1) // 2 if reduce == "median" else (TRIMMED * size).astype(int)
        ordered = jnp.sort(jnp.where(members[:, None], states, jnp.inf), axis=0)
        kept = (rank >= cut) & (rank < size - cut)
        return jnp.sum(jnp.where(kept, ordered, 0), axis=0) / (size - 2 * cut)

    def of_concept(concept: jax.Array) -> jax.Array:
        members, size = assignment == concept, sizes[concept]
        moved = centre(destination, members, size) - centre(original, members, size)
        return jnp.where(size >= MIN_SAMPLES, moved, jnp.nan)

    # One concept at a time: all at once would need K copies of the states.
    return jax.lax.map(of_concept, jnp.arange(num_concepts))


def shifted(
    components: Float[Array, "K D"], shifts: Float[Array, "K D"], alpha: float = 1.0
) -> Float[Array, "K D"]:
    """Concepts moved by alpha times their shift; one without a shift stays NaN."""
    return jnp.asarray(components) + alpha * jnp.asarray(shifts)


class Spread(NamedTuple):
    """How the samples of each concept move, each float32[K]."""

    consistency: Array  # mean cosine of the shifts of two samples
    product: Array  # mean dot product of the shifts of two samples
    cosine_with_mean: Array  # mean cosine of a sample's shift with the concept's
    product_with_mean: Array  # mean dot product of a sample's shift with the concept's
    magnitude: Array  # norm of the concept's mean shift


def spread(
    original: Float[Array, "N D"],
    destination: Float[Array, "N D"],
    assignment: Int[Array, " N"],
    num_concepts: int,
) -> Spread:
    """How alike the shifts of a concept's samples are. NaN for fewer than two samples.

    A sample that does not move has no direction and counts with cosine 0.
    """
    original, destination, assignment = _paired(original, destination, assignment)
    moves = destination - original
    sizes = counts(assignment, num_concepts).astype(moves.dtype)
    norms = jnp.linalg.norm(moves, axis=1, keepdims=True)
    units = jnp.where(norms > 0, moves / jnp.where(norms > 0, norms, 1), 0)

    def sums(values: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values, assignment, num_concepts)

    def over_pairs(rows: jax.Array) -> jax.Array:
        """The mean product of two different rows, from the square of their sum."""
        own = sums(jnp.sum(rows**2, axis=1))
        return (jnp.sum(sums(rows) ** 2, axis=1) - own) / (sizes * (sizes - 1))

    mean = sums(moves) / sizes[:, None]
    magnitude = jnp.linalg.norm(mean, axis=1)
    toward = jnp.sum(moves * mean[assignment], axis=1)
    reach = norms[:, 0] * magnitude[assignment]
    cosine = jnp.where(reach > 0, toward / jnp.where(reach > 0, reach, 1), 0)
    figures = Spread(
        consistency=over_pairs(units),
        product=over_pairs(moves),
        cosine_with_mean=sums(cosine) / sizes,
        product_with_mean=sums(toward) / sizes,
        magnitude=magnitude,
    )
    return jax.tree.map(lambda row: jnp.where(sizes >= MIN_SAMPLES, row, jnp.nan), figures)


def consistency(
    original: Float[Array, "N D"],
    destination: Float[Array, "N D"],
    assignment: Int[Array, " N"],
    num_concepts: int,
) -> Float[Array, " K"]:
    """Mean cosine of the shifts of two samples of a concept; see `spread` for the other figures."""
    return spread(original, destination, assignment, num_concepts).consistency


def _paired(
    original: Array, destination: Array, assignment: Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    a, b = jnp.asarray(original), jnp.asarray(destination)
    assignment = jnp.asarray(assignment)
    if a.shape != b.shape or a.ndim != 2 or assignment.shape != a.shape[:1]:
        raise ValueError(
            f"states have shapes {a.shape} and {b.shape}, the assignment {assignment.shape}; "
            "expected [N, D] twice, of the same samples, and [N]"
        )
    kind = jnp.promote_types(a.dtype, jnp.float32)
    return a.astype(kind), b.astype(kind), assignment
