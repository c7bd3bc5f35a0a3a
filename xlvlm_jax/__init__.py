"""Concept-based explanation and steering of vision-language models, in JAX and Flax.

vlm = ports.load("llava-hf/llava-1.5-7b-hf")
concepts = xlvlm_jax.decompose(Z, 20, key=jax.random.key(0))
words = xlvlm_jax.ground_text(concepts.components, vlm.unembed, vlm.tokenizer)
"""

from ports import lazy_names
from xlvlm_jax.demo import embedded  # noqa: F401  (it names the model)

__version__ = "0.1.0"

lazy_names.attach(__name__)
