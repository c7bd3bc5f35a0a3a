"""Fine-tuning shift: measures how fine-tuning moves concepts and what mean shifts recover.

From "Analyzing Fine-tuning Representation Shift for Multimodal LLMs Steering" (ICCV 2025).

    vectors     shift vectors, and how consistently the samples of a concept move
    recovery    how close shifted concepts come to the fine-tuned model's own; overlap, correlation
    pairs       matching rows of two directories of features
    analyse     the whole analysis for two matrices of states
    record      the result, with `save` and `load`
    grounding   words and images of original, shifted and fine-tuned concepts
    stage       the whole analysis for two directories of features

`paired_states`, from `ports.paired`, runs both models in one program.

Examples:
    >>> import numpy as np
    >>> from xlvlm_jax import shift
    >>> original, finetuned = np.float32([[0, 0], [2, 0]]), np.float32([[0, 3], [2, 3]])
    >>> shift.concept_shift(original, finetuned, np.array([0, 0]), 1).tolist()
    [[0.0, 3.0]]
"""

from ports.paired import paired_states, share_params
from xlvlm_jax.features.manifest import finetuned_site
from xlvlm_jax.shift.analyse import analyse
from xlvlm_jax.shift.grounding import ground_samples, ground_words
from xlvlm_jax.shift.pairs import Pairs, match_samples
from xlvlm_jax.shift.record import ShiftAnalysis
from xlvlm_jax.shift.recovery import Correlation, correlation, mismatched_overlap, overlap, recovery
from xlvlm_jax.shift.stage import shift_features
from xlvlm_jax.shift.vectors import (
    MIN_SAMPLES,
    TRIMMED,
    AssignBy,
    Reduce,
    Spread,
    assign,
    concept_shift,
    consistency,
    counts,
    nearest,
    normalised,
    shifted,
    spread,
)
from xlvlm_jax.solvers.matching import match

__all__ = [
    "MIN_SAMPLES",
    "TRIMMED",
    "AssignBy",
    "Correlation",
    "Pairs",
    "Reduce",
    "ShiftAnalysis",
    "Spread",
    "analyse",
    "assign",
    "concept_shift",
    "consistency",
    "correlation",
    "counts",
    "finetuned_site",
    "ground_samples",
    "ground_words",
    "match",
    "match_samples",
    "mismatched_overlap",
    "nearest",
    "normalised",
    "overlap",
    "paired_states",
    "recovery",
    "share_params",
    "shift_features",
    "shifted",
    "spread",
]
