"""Concept-based explanation and steering of vision-language models, in JAX and Flax.

vlm = ports.load("llava-hf/llava-1.5-7b-hf")
concepts = xlvlm_jax.decompose(Z, 20, key=jax.random.key(0))
words = xlvlm_jax.ground_text(concepts.components, vlm.unembed, vlm.tokenizer)
"""

import importlib
from typing import TYPE_CHECKING, Any

from ports.intervene.edits import ablate, add, add_relative, edit_with, replace, stacked
from ports.intervene.sites import capture
from ports.intervene.steer import steer
from ports.programs import compilation_cache
from xlvlm_jax import metrics, shift
from xlvlm_jax.concepts.decomposition import decompose, decompose_stored, project
from xlvlm_jax.concepts.grounding import ground_images, ground_text
from xlvlm_jax.concepts.maps import concept_maps
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.demo import embedded  # noqa: F401  (it names the model)
from xlvlm_jax.features.reader import Features
from xlvlm_jax.features.selection import Selection
from xlvlm_jax.features.spelling import find_word
from xlvlm_jax.steering import SteeringVector, fine_vectors, steering_vector

if TYPE_CHECKING:
    from xlvlm_jax import sae
    from xlvlm_jax.concepts.estimators import PCA, KMeans, SemiNMF

__version__ = "0.1.0"

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
    "concept_maps",
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
    "sae",
    "shift",
    "stacked",
    "steer",
    "steering_vector",
]


def __getattr__(name: str) -> Any:
    if name == "sae":
        return importlib.import_module("xlvlm_jax.sae")
    # scikit-learn, which these are built on, takes as long to import as all the rest.
    if name in ("PCA", "KMeans", "SemiNMF"):
        return getattr(importlib.import_module("xlvlm_jax.concepts.estimators"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
