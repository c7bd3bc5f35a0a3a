# What `xlvlm_jax.sae` exports, imported at first use (see ports/lazy_names.py).
from xlvlm_jax.sae.dictionary import Dictionary, Settings
from xlvlm_jax.sae.reading import load
from xlvlm_jax.sae.saelens import save

__all__ = ["Dictionary", "Settings", "load", "save"]
