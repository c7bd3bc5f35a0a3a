"""BatchTopK: codes are the largest of a whole batch, k per row on average.

    c = relu(h) where h is one of the B k largest of the B rows, else 0

So rows that need more features get more. The smallest code that was kept, averaged over the last
updates, is the threshold in use: c = relu(h) where h > threshold. Source: Bussmann, Leask and
Nanda 2024, "BatchTopK sparse autoencoders".
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from xlvlm_jax.solvers.sae.selection import cut_above
from xlvlm_jax.solvers.sae.topk import TopK
from xlvlm_jax.solvers.sae.training import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchTopK(TopK):
    """BatchTopK; see the head of this file.

    Attributes:
        k: mean number of active features per row.
    """

    architecture = "batchtopk"

    def codes(
        self, hidden: Float[Array, "B K"], params: Params
    ) -> tuple[Float[Array, "B K"], Float[Array, ""]]:
        """Returns the codes, and the smallest that is kept."""
        cut = cut_above(hidden, len(hidden) * self.k, of_all=True)
        kept = (hidden > 0) & (hidden >= cut)
        smallest = jnp.min(hidden, where=kept, initial=jnp.inf)
        return jnp.where(kept, hidden, 0), jnp.where(smallest < jnp.inf, smallest, 0)

    def finish(self, params: Params, scale: Any, threshold: Float[Array, ""]) -> Params:
        """Returns the parameters with one threshold for all features."""
        folded = super().finish(params, scale, threshold)
        return folded | {"threshold": jnp.full_like(folded["b_enc"], threshold / scale)}
