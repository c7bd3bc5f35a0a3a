# What `xlvlm_jax.causal` exports, imported at first use (see ports/lazy_names.py).
from xlvlm_jax.causal.changes import (
    ConceptEdits,
    Effects,
    Questions,
    Slopes,
    concept_edits,
    effects,
    prepare,
    slopes,
    spliced_losses,
)
from xlvlm_jax.causal.record import CausalRecord
from xlvlm_jax.causal.scores import (
    CausalScores,
    auc,
    causal_scores,
    loss_recovered,
    rank_correlation,
    share,
    signs,
)
from xlvlm_jax.causal.stage import Measured, measure_concepts, score_causally
from xlvlm_jax.causal.words import Vocabulary, matched_words, own_tokens, vocabulary_of

__all__ = [
    "CausalRecord",
    "CausalScores",
    "ConceptEdits",
    "Effects",
    "Measured",
    "Questions",
    "Slopes",
    "Vocabulary",
    "auc",
    "causal_scores",
    "concept_edits",
    "effects",
    "loss_recovered",
    "matched_words",
    "measure_concepts",
    "own_tokens",
    "prepare",
    "rank_correlation",
    "score_causally",
    "share",
    "signs",
    "slopes",
    "spliced_losses",
    "vocabulary_of",
]
