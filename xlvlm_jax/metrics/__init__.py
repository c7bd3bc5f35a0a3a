"""What the concepts, and the steered answers, are worth."""

from xlvlm_jax.metrics.attributes import AttributeScore, attribute_scores
from xlvlm_jax.metrics.overlap import word_overlap
from xlvlm_jax.metrics.vqa import normalise_answer, vqa_accuracy

__all__ = [
    "AttributeScore",
    "attribute_scores",
    "normalise_answer",
    "vqa_accuracy",
    "word_overlap",
]
