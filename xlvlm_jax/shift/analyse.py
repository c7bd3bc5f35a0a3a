"""Computes how concepts move between two sets of states, and what that recovers.

K concepts, D width, N and M rows of the original and of the fine-tuned features.
"""

import math

import jax
import numpy as np
from jaxtyping import Float

from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.metrics.most_activated import NONE
from xlvlm_jax.shift.blocks import assigned, moves, require_rows
from xlvlm_jax.shift.pairs import Pairs
from xlvlm_jax.shift.record import ShiftAnalysis
from xlvlm_jax.shift.recovery import recovery
from xlvlm_jax.shift.vectors import AssignBy, Reduce, normalised, shifted
from xlvlm_jax.solvers.matching import match
from xlvlm_jax.solvers.validation import StoredMatrix


def analyse(
    Z_original: Float[jax.Array | np.ndarray, "N D"] | StoredMatrix,
    Z_finetuned: Float[jax.Array | np.ndarray, "M D"] | StoredMatrix,
    pairs: Pairs,
    concepts: Concepts,
    finetuned_concepts: Concepts,
    *,
    alpha: float = 1.0,
    reduce: Reduce = "mean",
    assign_by: AssignBy = "activation",
    normalise_shifts: bool = False,
    normalise_shifted: bool = False,
) -> ShiftAnalysis:
    """Computes shift vectors of original concepts and how well they recover the fine-tuned ones.

    Runs on the host and cannot be traced.

    Args:
        Z_original, Z_finetuned: float[N, D] and float[M, D], the states of each model, or a reader
            of them such as `Features.stored(site)`, which keeps one block of rows in memory.
        pairs: the matching rows of the two.
        concepts: learnt on Z_original; their activations assign its rows, except those that
            activate none.
        finetuned_concepts: learnt on Z_finetuned, as many as `concepts`.
        alpha: shifted concept = concept + alpha x shift. Both need the same scale: k-means
            centroids, the paper's choice, are means of states; snmf atoms and pca components have
            norm 1 and need an alpha of about 1 / (a typical activation).
        reduce: "mean", "median" or "trimmed_mean"; see `concept_shift`.
        assign_by: how a sample's concept is found: its most active one ("activation"), or the most
            similar one to its original state by "cosine" or "l2".
        normalise_shifts: divide the shifts by the norm of their matrix, see `normalised`.
        normalise_shifted: divide each shifted concept by its norm.

    Returns:
        The analysis, not yet grounded in words and images.

    Raises:
        ValueError: the models have different widths, the dictionaries different sizes,
            concepts were learnt on other rows, or alpha is not finite.
    """
    (N, D), (_, E) = np.shape(Z_original), np.shape(Z_finetuned)
    if D != E:
        raise ValueError(
            f"the fine-tuned model's states are {E} wide, the original's {D}; a shift needs a"
            " fine-tuned version of the same model, at the same site"
        )
    (K, width), (L, other) = np.shape(concepts.components), np.shape(finetuned_concepts.components)
    if K != L:
        raise ValueError(
            f"{K} original and {L} fine-tuned concepts; matching needs equally many,"
            f" decompose both with the same number"
        )
    if not width == other == D:
        raise ValueError(
            f"concepts are {width} (original) and {other} (fine-tuned) wide, the states {D};"
            " give concepts learnt on these states"
        )
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}; expected a finite number")
    require_rows(concepts, Z_original, "original ")
    require_rows(finetuned_concepts, Z_finetuned, "fine-tuned ")
    assignment = assigned(concepts, Z_original, assign_by)[pairs.original]
    common = len(assignment)
    if (idle := assignment == NONE).any():  # sparse codes may all be zero
        pairs = Pairs(pairs.original[~idle], pairs.finetuned[~idle], pairs.num_samples)
        assignment = assignment[~idle]
    found = moves(Z_original, Z_finetuned, pairs, assignment, K, reduce)
    components = np.asarray(concepts.components, np.float32)
    shifts = np.asarray(normalised(found.shifts)) if normalise_shifts else found.shifts
    moved = shifted(components, shifts, alpha, unit_norm=normalise_shifted)
    matching = match(components, finetuned_concepts.components)
    destination = np.asarray(finetuned_concepts.components, np.float32)[matching]
    return ShiftAnalysis(
        original=components,
        shifts=shifts,
        shifted=np.asarray(moved),
        finetuned=destination,
        matching=np.asarray(matching),
        counts=found.counts,
        spread=found.spread,
        recovery=np.asarray(recovery(components, moved, destination)),
        recovery_l2=np.asarray(recovery(components, moved, destination, "l2")),
        alpha=float(alpha),
        reduce=reduce,
        rows={"original": N, "finetuned": Z_finetuned.shape[0], "common": common},
    )
