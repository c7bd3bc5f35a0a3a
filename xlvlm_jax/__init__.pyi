# What `xlvlm_jax` exports, imported at first use (see ports/lazy_names.py).
from ports.intervene.adaptive_edits import add_adaptive, add_if_similar
from ports.intervene.edits import ablate, add, add_relative, edit_with, replace, stacked
from ports.intervene.sites import capture
from ports.intervene.steer import steer
from ports.programs import compilation_cache
from xlvlm_jax import causal, concept_benchmark, lenses, metrics, sae, shift
from xlvlm_jax.concepts.answer_gradients import answer_gradients
from xlvlm_jax.concepts.decomposition import decompose, decompose_stored, project
from xlvlm_jax.concepts.estimators import PCA, KMeans, SemiNMF
from xlvlm_jax.concepts.grounding import ground_images, ground_text
from xlvlm_jax.concepts.maps import concept_maps, gradient_maps, vector_maps, word_maps
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.features.reader import Features
from xlvlm_jax.features.selection import Selection
from xlvlm_jax.features.spelling import find_word
from xlvlm_jax.steering import SteeringVector, fine_vectors, steering_vector

__version__: str

__all__ = [
    "PCA",
    "Concepts",
    "Features",
    "KMeans",
    "Selection",
    "SemiNMF",
    "SteeringVector",
    "ablate",
    "add",
    "add_adaptive",
    "add_if_similar",
    "add_relative",
    "answer_gradients",
    "capture",
    "causal",
    "compilation_cache",
    "concept_benchmark",
    "concept_maps",
    "decompose",
    "decompose_stored",
    "edit_with",
    "find_word",
    "fine_vectors",
    "gradient_maps",
    "ground_images",
    "ground_text",
    "lenses",
    "metrics",
    "project",
    "replace",
    "sae",
    "shift",
    "stacked",
    "steer",
    "steering_vector",
    "vector_maps",
    "word_maps",
]
