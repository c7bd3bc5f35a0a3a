"""Crosscoders: autoencoders of two sources at once, with codes that both share.

    x = [s_1 z_1, s_2 z_2]           rows of both sources for the same token, side by side
    h = (x - b_dec) W_enc + b_enc
    y = c W_dec + b_dec              W_dec = [W_1, W_2], a decoder per source
    w_k = |W_1k| + |W_2k|            norms of a feature's decoder in each source
    penalty = l1 mean_n sum_k c_nk w_k / sqrt(D)      of `relu`
    c = codes(h), the largest h w    of `topk` and `batchtopk`

The sources are two sites, or the same site of two models, such as before and after fine-tuning. A
feature that only one of them has costs less than one that both have, so its other decoder falls
to zero: |W_2k| / w_k tells whose it is. Rows of W_dec have length one, so w is from 1 (a feature of
one source) to sqrt(2). At the end w_k = 1, with codes in those units, so that the largest h are the
largest h w. If both sources are as wide, their decoders start in the same directions. Sources:
Lindsey et al. 2024, "Sparse crosscoders for cross-layer features and model diffing"; Minder et al.
2025, "Overcoming sparsity artifacts in crosscoders to interpret chat-tuning", for the choice by
h w instead of a penalty, which makes shared features look exclusive less often.

D width of both sources together, K features.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from xlvlm_jax.solvers.linalg import TINY, matmul
from xlvlm_jax.solvers.sae.batchtopk import BatchTopK
from xlvlm_jax.solvers.sae.relu import ReLU
from xlvlm_jax.solvers.sae.start import Start, unit_length
from xlvlm_jax.solvers.sae.topk import TopK
from xlvlm_jax.solvers.sae.training import Params, Training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crosscoder(Training):
    """What all crosscoders share; see the head of this file."""

    num_sources = 2

    def begin(self, begun: Start, key: PRNGKeyArray, num_concepts: int) -> tuple[Params, Params]:
        """Returns the parameters before the first update, and the source of each column."""
        params, fixed = super().begin(begun, key, num_concepts)
        first, second = begun.widths
        if first == second:
            half = params["W_dec"][:, :first]
            W_dec = unit_length(jnp.concatenate([half, half], axis=1))
            params |= {"W_dec": W_dec, "W_enc": W_dec.T.copy()}
        of_column = np.repeat(np.eye(2, dtype=np.float32), begun.widths, axis=0)
        return params, fixed | {"sources": jnp.asarray(of_column)}

    def weights(self, params: Params) -> Float[Array, " K"]:
        """Returns w."""
        squares = matmul(params["W_dec"] ** 2, params["sources"])
        return jnp.sum(jnp.sqrt(jnp.maximum(squares, TINY)), axis=1)

    def codes(
        self, hidden: Float[Array, "B K"], params: Params
    ) -> tuple[Float[Array, "B K"], Float[Array, ""]]:
        """Returns the codes, chosen by what they weigh, and the smallest weight that is kept."""
        weighted = jax.lax.stop_gradient(hidden * self.weights(params))
        chosen, cut = super().codes(weighted, params)
        return jnp.where(chosen > 0, hidden, 0), cut

    def penalty(
        self, hidden: Float[Array, "B K"], codes: Float[Array, "B K"], params: Params, D: int
    ) -> Float[Array, ""]:
        """Returns the penalty of the codes as they weigh."""
        return super().penalty(hidden, codes * self.weights(params), params, D)

    def finish(self, params: Params, scale: Any, threshold: Float[Array, ""]) -> Params:
        """Returns the parameters with decoders whose norms, of scaled rows, add up to one."""
        found = super().finish(params, 1.0, threshold)
        w, s = self.weights(params), matmul(params["sources"], jnp.float32(scale))
        return found | {
            "W_enc": params["W_enc"] * s[:, None] * w,
            "W_dec": params["W_dec"] / s / w[:, None],
            "b_enc": params["b_enc"] * w,
            "b_dec": params["b_dec"] / s,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReLUCrosscoder(Crosscoder, ReLU):
    """A crosscoder with an L1 penalty; see `relu`."""

    architecture = "crosscoder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKCrosscoder(Crosscoder, TopK):
    """A crosscoder with k codes per row; see `topk`."""

    architecture = "topk_crosscoder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchTopKCrosscoder(Crosscoder, BatchTopK):
    """A crosscoder with k codes per row on average; see `batchtopk`."""

    architecture = "batchtopk_crosscoder"
