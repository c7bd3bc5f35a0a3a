"""What the concepts, and the steered answers, are worth."""

from xlvlm_jax.metrics.attributes import AttributeScore, attribute_scores
from xlvlm_jax.metrics.overlap import word_overlap

__all__ = ["AttributeScore", "attribute_scores", "word_overlap"]
