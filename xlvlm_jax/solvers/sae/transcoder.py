"""Transcoders: autoencoders from the states of one site to those of another.

    x = s z, t = r u                 z and u: rows of both sites for the same token
    h = x W_enc + b_enc
    y = c W_dec + b_dec              (+ x W_skip^T)
    L = mean (t - y)^2 + ...         everything else as in `training`

c are the codes of `relu`, `topk` or `batchtopk`. So features are read where a layer begins and
written where it ends, and tell what it computes. With `skip`, what is linear in x is left to
W_skip, which starts at zero. W_enc starts in random directions, W_dec in those that a linear map
from x to t, fitted by ridge regression, makes of them (an SAE's start, if t is x), b_enc at the
negated median of x W_enc. Sources: Dunefsky, Chlenski and Nanda 2024, "Transcoders find
interpretable LLM feature circuits"; Paulo, Shabalin and Belrose 2025, "Transcoders beat sparse
autoencoders for interpretability", for the skip connection.

D and E widths of the two sites, K features.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from xlvlm_jax.solvers.linalg import TINY, matmul
from xlvlm_jax.solvers.sae.batchtopk import BatchTopK
from xlvlm_jax.solvers.sae.relu import ReLU
from xlvlm_jax.solvers.sae.start import Start, unit_directions, unit_length
from xlvlm_jax.solvers.sae.topk import TopK
from xlvlm_jax.solvers.sae.training import Params, Training

RIDGE = 1e-2  # of the mean variance of a column


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transcoder(Training):
    """What all transcoders share; see the head of this file.

    Attributes:
        skip: whether W_skip is learnt.
    """

    skip: bool = False

    num_sources = 2

    def columns(self, params: Params) -> tuple[slice, slice]:
        """Returns the columns of x, and those of t."""
        D = params["W_enc"].shape[0]
        return slice(D), slice(D, None)

    def offset(self, params: Params) -> Float[Array, " K"]:
        """Returns b_enc: b_dec is of another site."""
        return params["b_enc"]

    def begin(self, begun: Start, key: PRNGKeyArray, num_concepts: int) -> tuple[Params, Params]:
        """Returns the parameters before the first update."""
        D, E = begun.widths
        W_enc = unit_directions(key, num_concepts, D).T
        params = {
            "W_enc": W_enc,
            "W_dec": unit_length(matmul(W_enc.T, _linear_map(begun.rows, begun.median, D))),
            "b_enc": -matmul(begun.median[:D], W_enc),
            "b_dec": begun.median[D:],
        }
        return params | ({"W_skip": jnp.zeros((E, D), jnp.float32)} if self.skip else {}), {}

    def finish(self, params: Params, scale: Any, threshold: Float[Array, ""]) -> Params:
        """Returns the parameters, whose codes are in units of u."""
        s, r = scale
        found = super().finish(params, r, threshold)
        return found | {
            name: params[name] * (s / r) for name in ("W_enc", "W_skip") if name in params
        }


@partial(jax.jit, static_argnums=2)
def _linear_map(
    rows: Float[Array, "S D_plus_E"], centre: Float[Array, " D_plus_E"], D: int
) -> Float[Array, "D E"]:
    """Returns the matrix that maps the first D columns to the others, by ridge regression."""
    x, t = (rows - centre)[:, :D], (rows - centre)[:, D:]
    gram = matmul(x.T, x)
    ridge = RIDGE * jnp.trace(gram) / D + TINY
    return jnp.linalg.solve(gram + ridge * jnp.eye(D), matmul(x.T, t))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReLUTranscoder(Transcoder, ReLU):
    """A transcoder with an L1 penalty; see `relu`."""

    architecture = "transcoder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKTranscoder(Transcoder, TopK):
    """A transcoder with k codes per row; see `topk`."""

    architecture = "topk_transcoder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchTopKTranscoder(Transcoder, BatchTopK):
    """A transcoder with k codes per row on average; see `batchtopk`."""

    architecture = "batchtopk_transcoder"
