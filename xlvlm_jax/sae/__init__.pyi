# What `xlvlm_jax.sae` exports, imported at first use (see ports/lazy_names.py).
from xlvlm_jax.sae.dictionary import Dictionary, Settings
from xlvlm_jax.sae.reading import load
from xlvlm_jax.sae.saelens import save
from xlvlm_jax.sae.sharing import decoders, relative_norms, whose

__all__ = ["Dictionary", "Settings", "decoders", "load", "relative_norms", "save", "whose"]
