"""Metrics of concepts and of steered answers.

Examples:
    >>> import numpy as np, xlvlm_jax
    >>> xlvlm_jax.metrics.hoyer_sparsity(np.float32([[5, 0, 0, 0], [1, 1, 1, 1]]))
    0.5
    >>> xlvlm_jax.metrics.word_overlap([["dog", "puppy"], ["dog", "cat"]])
    0.5
"""

from typing import Any

from xlvlm_jax.data.amber import WordLists
from xlvlm_jax.metrics.absorption import absorption
from xlvlm_jax.metrics.amber import AmberScore, amber
from xlvlm_jax.metrics.amber_descriptions import (
    AmberDescriptionScore,
    amber_counts,
    amber_description_scores,
    amber_descriptions,
    listed_words,
    nltk_nouns,
    spacy_alike,
)
from xlvlm_jax.metrics.attributes import AttributeScore, attribute_scores
from xlvlm_jax.metrics.baselines import noise_images, random_words, vocabulary_words
from xlvlm_jax.metrics.bert_score import (
    BertScore,
    BertScorer,
    bert_score,
    default_layer,
    read_baseline,
)
from xlvlm_jax.metrics.chair import (
    ChairScore,
    chair,
    chair_counts,
    chair_scores,
    mentioned_objects,
)
from xlvlm_jax.metrics.clip_score import (
    clip_scores,
    describe,
    embed_images,
    embed_pixels,
    embed_texts,
    pixels_of,
)
from xlvlm_jax.metrics.codes import active_share, dead_concepts, explained_variance, hoyer_sparsity
from xlvlm_jax.metrics.information import (
    attribute_information,
    completeness,
    disentanglement,
)
from xlvlm_jax.metrics.localisation import picture_auc, pointing
from xlvlm_jax.metrics.monosemanticity import mean_similarity, monosemanticity
from xlvlm_jax.metrics.most_activated import mean_of_top, top_concepts
from xlvlm_jax.metrics.naming import Naming, naming_accuracy
from xlvlm_jax.metrics.overlap import overlap_matrix, word_overlap
from xlvlm_jax.metrics.perturbation import accuracy_losses, targeted_perturbation
from xlvlm_jax.metrics.pope import (
    PopeScore,
    StartScore,
    label_at_start,
    pope,
    pope_counts,
    pope_scores,
    read_answer,
)
from xlvlm_jax.metrics.probing import sparse_probing, split_concepts
from xlvlm_jax.metrics.safety import defers_to_expert, expert_deference, harmfulness
from xlvlm_jax.metrics.stability import stability
from xlvlm_jax.metrics.uncertainty import Interval, McNemar, bootstrap, mcnemar
from xlvlm_jax.metrics.vqa import normalise_answer, vqa_accuracy

__all__ = [
    "AmberDescriptionScore",
    "AmberScore",
    "AttributeScore",
    "BertScore",
    "BertScorer",
    "ChairScore",
    "Interval",
    "McNemar",
    "Naming",
    "PopeScore",
    "StartScore",
    "WordLists",
    "absorption",
    "accuracy_losses",
    "active_share",
    "amber",
    "amber_counts",
    "amber_description_scores",
    "amber_descriptions",
    "attribute_information",
    "attribute_scores",
    "bert_score",
    "bootstrap",
    "chair",
    "chair_counts",
    "chair_scores",
    "clip_scores",
    "completeness",
    "dead_concepts",
    "default_layer",
    "defers_to_expert",
    "describe",
    "disentanglement",
    "embed_images",
    "embed_pixels",
    "embed_texts",
    "expert_deference",
    "explained_variance",
    "harmfulness",
    "hoyer_sparsity",
    "label_at_start",
    "listed_words",
    "mcnemar",
    "mean_of_top",
    "mean_similarity",
    "mentioned_objects",
    "monosemanticity",
    "naming_accuracy",
    "nltk_nouns",
    "noise_images",
    "normalise_answer",
    "overlap_matrix",
    "picture_auc",
    "pixels_of",
    "pointing",
    "pope",
    "pope_counts",
    "pope_scores",
    "random_words",
    "read_answer",
    "read_baseline",
    "spacy_alike",
    "sparse_probing",
    "split_concepts",
    "stability",
    "targeted_perturbation",
    "top_concepts",
    "vocabulary_words",
    "vqa_accuracy",
    "word_overlap",
]


def __getattr__(name: str) -> Any:
    # These need `Concepts`, which depend on metrics; they used to be here.
    if name in ("explained_by", "reconstruct"):
        from xlvlm_jax.concepts import reconstruction

        return getattr(reconstruction, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
