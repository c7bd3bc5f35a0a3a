# What `xlvlm_jax.lenses` exports, imported at first use (see ports/lazy_names.py).
from xlvlm_jax.lenses.jacobian import (
    JacobianLens,
    average_jacobian,
    fit_jacobian_lens,
    load_jacobian_lens,
)
from xlvlm_jax.lenses.neighbours import Neighbours, nearest
from xlvlm_jax.lenses.reading import LensReading, logit_lens, read_states

__all__ = [
    "JacobianLens",
    "LensReading",
    "Neighbours",
    "average_jacobian",
    "fit_jacobian_lens",
    "load_jacobian_lens",
    "logit_lens",
    "nearest",
    "read_states",
]
