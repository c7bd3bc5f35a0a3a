# What `xlvlm_jax.concepts` exports, imported at first use (see ports/lazy_names.py).
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
