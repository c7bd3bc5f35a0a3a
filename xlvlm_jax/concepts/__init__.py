"""Concepts: finding them, storing them, reading them as words and images, and scoring them.

record            `Concepts`, and their directory on disk
methods           the methods and their options
decomposition     `decompose` and `project`
reconstruction    from activations back to states
grounding         words and images
estimators        the same methods as scikit-learn estimators
stage             from one directory to the next, for the command line
scores            how good concepts are
"""

from xlvlm_jax.concepts.decomposition import (
    decompose,
    decompose_stored,
    distances,
    memory_needed,
    project,
    project_stored,
)
from xlvlm_jax.concepts.grounding import ground_images, ground_text
from xlvlm_jax.concepts.reconstruction import explained_by, reconstruct
from xlvlm_jax.concepts.record import Concepts

__all__ = [
    "Concepts",
    "decompose",
    "decompose_stored",
    "distances",
    "explained_by",
    "ground_images",
    "ground_text",
    "memory_needed",
    "project",
    "project_stored",
    "reconstruct",
]
