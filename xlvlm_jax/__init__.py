"""Concept-based explanation and steering of vision-language models, in JAX and Flax.

vlm = ports.load("llava-hf/llava-1.5-7b-hf")
concepts = xlvlm_jax.decompose(Z, 20, key=jax.random.key(0))
words = xlvlm_jax.ground_text(concepts.components, vlm.unembed, vlm.tokenizer)
"""

from ports.edits import ablate, add, add_relative, edit_with, replace, stacked
from ports.programs import compilation_cache
from ports.sites import capture
from ports.steering import steer
from xlvlm_jax import embedded as _embedded  # noqa: F401  (it names the model)
from xlvlm_jax import metrics, shift
from xlvlm_jax.concepts import Concepts, decompose, decompose_stored, project
from xlvlm_jax.estimators import PCA, KMeans, SemiNMF
from xlvlm_jax.grounding import ground_images, ground_text
from xlvlm_jax.selection import Selection
from xlvlm_jax.spelling import find_word
from xlvlm_jax.steering import SteeringVector, fine_vectors, steering_vector
from xlvlm_jax.store import Features

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
    "add_relative",
    "capture",
    "compilation_cache",
    "decompose",
    "decompose_stored",
    "edit_with",
    "find_word",
    "fine_vectors",
    "ground_images",
    "ground_text",
    "metrics",
    "project",
    "replace",
    "shift",
    "stacked",
    "steer",
    "steering_vector",
]
