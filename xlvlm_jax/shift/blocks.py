"""Shift vectors and their spread for too many rows to hold: reads blocks and sums in float64.

Computes the figures of `vectors` from sums over the samples of each concept. With d_m = b_m - a_m
the move of a sample, e_m its direction and s the mean move of the concept, one pass is enough: the
mean of d_m . s is |s|^2, and the mean cosine of d_m with s is the mean of e_m . s / |s|.

N rows, M pairs of rows, B rows of a block, D width, K concepts.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from xlvlm_jax.concepts.decomposition import project, project_stored
from xlvlm_jax.concepts.grounding import tiles_of
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.metrics.most_activated import strongest_concept
from xlvlm_jax.shift.pairs import Pairs
from xlvlm_jax.shift.vectors import MIN_SAMPLES, TRIMMED, AssignBy, Reduce, Spread, nearest
from xlvlm_jax.solvers.streamed import Source
from xlvlm_jax.solvers.validation import StoredMatrix, check_block, is_stored, read_block

BLOCK_BYTES = 2**25  # size of a block of rows in float64
CENTRED_BYTES = 2**27  # size of all rows whose medians are computed together
Rows = jax.Array | np.ndarray | StoredMatrix


class Moves(NamedTuple):
    """How the samples of each concept move."""

    counts: Int[np.ndarray, " K"]
    shifts: Float[np.ndarray, "K D"]  # NaN for fewer than two samples
    spread: Spread


def moves(
    original: Rows,
    finetuned: Rows,
    pairs: Pairs,
    assignment: Int[np.ndarray, " M"],
    num_concepts: int,
    reduce: Reduce = "mean",
) -> Moves:
    """Computes `vectors.concept_shift` and `vectors.spread` with one block of rows in memory.

    "median" and "trimmed_mean" need all rows of a concept at once, so they read all rows again for
    every group of concepts that fits into memory.

    Args:
        original, finetuned: float[N, D], the states of each model, or readers of them.
        pairs: the matching rows of the two.
        assignment: int[M], the concept of each pair, 0 to K - 1; `analyse` leaves out pairs
            without one.
        num_concepts: K.
        reduce: see `concept_shift`.

    Returns:
        Counts, shifts and spread of the concepts.

    Raises:
        ValueError: `reduce` is unknown.
    """
    if reduce not in ("mean", "median", "trimmed_mean"):
        raise ValueError(f"reduce is {reduce!r}; expected 'mean', 'median' or 'trimmed_mean'")
    K, D = num_concepts, original.shape[1]
    moved, directions, norms = np.zeros((K, D)), np.zeros((K, D)), np.zeros((K, 2))
    for part, a, b in blocks_of_pairs(original, finetuned, pairs):
        moves = b - a
        lengths = np.linalg.norm(moves, axis=1, keepdims=True)
        own = assignment[part]
        moved += _add_up(moves, own, K)
        norms += _add_up(np.hstack([lengths**2, lengths > 0]), own, K)
        directions += _add_up(np.divide(moves, lengths, out=moves, where=lengths > 0), own, K)
    counts = np.bincount(assignment, minlength=K)
    few = counts < MIN_SAMPLES
    sizes = np.maximum(counts, 1)[:, None]
    mean, direction, (square, turned) = moved / sizes, directions / sizes, (norms / sizes).T
    magnitude = np.linalg.norm(mean, axis=1)

    def over_pairs(mean: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Returns the mean product of two different rows, from their mean and mean square."""
        return (counts * np.sum(mean**2, axis=1) - own) / np.maximum(counts - 1, 1)

    reach = np.where(magnitude > 0, magnitude, 1)
    spread = Spread(
        consistency=over_pairs(direction, turned),
        product=over_pairs(mean, square),
        cosine_with_mean=np.sum(direction * mean, axis=1) / reach,
        product_with_mean=magnitude**2,
        magnitude=magnitude,
    )
    if reduce != "mean":
        mean = _centres(original, finetuned, pairs, assignment, counts, reduce)
    return Moves(
        counts,
        np.where(few[:, None], np.nan, mean).astype(np.float32),
        Spread(*(np.where(few, np.nan, figure).astype(np.float32) for figure in spread)),
    )


def assigned(concepts: Concepts, Z: Rows, by: AssignBy = "activation") -> Int[np.ndarray, " N"]:
    """Returns the concept that each row of Z belongs to.

    Args:
        concepts: the concepts.
        Z: float[N, D], the states, or a reader of them.
        by: "activation" for the most active concept, otherwise see `nearest`.

    Returns:
        int[N]; NONE, -1, for a row that activates no concept.

    Raises:
        ValueError: `by` is unknown, or the concepts have activations of other rows.
    """
    if by == "activation":
        return np.concatenate(
            [strongest_concept(codes) for _, codes in activations_of(concepts, Z)]
        )
    N, D = np.shape(Z)
    size = max(BLOCK_BYTES // (8 * D), 1)
    components = np.asarray(concepts.components)
    starts = range(0, N, size)
    rows = (_take(Z, np.arange(start, min(start + size, N))) for start in starts)
    return np.concatenate([np.asarray(nearest(block, components, by)) for block in rows])


def activations_of(concepts: Concepts, Z: Rows) -> Iterator[tuple[int, Float[np.ndarray, "B K"]]]:
    """Yields blocks of activations of the rows of Z.

    Args:
        concepts: the concepts; without activations, Z is projected on them.
        Z: float[N, D], the states, or a reader of them.

    Yields:
        (first row, float32[B, K]).

    Raises:
        ValueError: the concepts have activations of other rows.
    """
    require_rows(concepts, Z)
    if concepts.activations is not None:
        yield from tiles_of(concepts.activations)
    elif is_stored(Z):
        for start, _, codes in project_stored(Z, concepts):
            yield start, np.asarray(codes)
    else:
        yield 0, np.asarray(project(Z, concepts))


def require_rows(concepts: Concepts, Z: Rows, whose: str = "") -> None:
    """Checks that the activations of concepts, if there are any, are those of the rows of Z.

    Args:
        concepts: the concepts.
        Z: float[N, D], the states, or a reader of them.
        whose: "original " or "fine-tuned ", for the message.

    Raises:
        ValueError: their numbers differ.
    """
    activations, N = concepts.activations, np.shape(Z)[0]
    if activations is not None and len(activations) != N:
        raise ValueError(
            f"the {whose}concepts have activations for {len(activations)} rows, the {whose}features"
            f" {N}; give the features that the concepts were learnt on"
        )


def _centres(
    original: Rows,
    finetuned: Rows,
    pairs: Pairs,
    assignment: Int[np.ndarray, " M"],
    counts: Int[np.ndarray, " K"],
    reduce: Reduce,
) -> Float[np.ndarray, "K D"]:
    """Returns the centre of each concept's fine-tuned states minus its original states' centre."""
    from scipy import stats

    K, D = len(counts), original.shape[1]
    found = np.zeros((K, D))
    # Reads as many concepts together as fit.
    group = np.cumsum(counts * 4 * D * 2) // CENTRED_BYTES
    for number in np.unique(group):
        concepts = np.flatnonzero((group == number) & (counts >= MIN_SAMPLES))
        held = np.flatnonzero(np.isin(assignment, concepts))
        some = Pairs(pairs.original[held], pairs.finetuned[held], pairs.num_samples)
        states = np.empty((2, len(held), D), np.float32)
        for part, a, b in blocks_of_pairs(original, finetuned, some):
            states[0, part], states[1, part] = a, b
        for k in concepts:
            own = states[:, assignment[held] == k].astype(np.float64)
            before, after = (
                np.median(own, axis=1)
                if reduce == "median"
                else stats.trim_mean(own, TRIMMED, axis=1)
            )
            found[k] = after - before
    return found


def _add_up(
    rows: Float[np.ndarray, "B C"], assignment: Int[np.ndarray, " B"], num_concepts: int
) -> Float[np.ndarray, "K C"]:
    """Returns the sum of the rows of each concept."""
    B = len(rows)
    members = (np.ones(B), (assignment, np.arange(B)))
    return sparse.csr_array(members, shape=(num_concepts, B)) @ rows


def blocks_of_pairs(
    original: Rows, finetuned: Rows, pairs: Pairs
) -> Iterator[tuple[slice, Float[np.ndarray, "B D"], Float[np.ndarray, "B D"]]]:
    """Yields blocks of pairs: (slice of the pairs, original rows, fine-tuned rows) in float64."""
    size = max(BLOCK_BYTES // (8 * original.shape[1]), 1)
    for start in range(0, len(pairs.original), size):
        part = slice(start, start + size)
        a, b = (
            _take(Z, rows[part]).astype(np.float64)
            for Z, rows in ((original, pairs.original), (finetuned, pairs.finetuned))
        )
        yield part, a, b


def _take(Z: Rows, rows: Int[np.ndarray, " B"]) -> np.ndarray:
    """Returns the given rows; a reader reads the range that spans them, unless it is far larger."""
    if not is_stored(Z):
        return np.asarray(Z[rows])
    first, last = int(rows.min()), int(rows.max()) + 1
    if last - first <= 4 * len(rows):
        return read_block(Z, first, last)[rows - first]
    if isinstance(Z, Source):  # in random order, the rows of a block lie all over Z
        return check_block(Z.take(rows), (len(rows), Z.shape[1]), first)
    # In ascending order, so that each chunk of the file is read once.
    order = np.argsort(rows, kind="stable")
    found = np.empty((len(rows), Z.shape[1]), np.float32)
    size = max(BLOCK_BYTES // (4 * Z.shape[1]), 1)
    for begin in range(first, last, size):
        end = min(begin + size, last)
        lower, upper = np.searchsorted(rows[order], [begin, end])
        if upper > lower:
            here = order[lower:upper]
            found[here] = read_block(Z, begin, end)[rows[here] - begin]
    return found
