"""TopK: codes are the k largest of each row.

    c = relu(h) where h is one of the k largest of its row, else 0

There is no penalty: k is the sparsity. Source: Gao et al. 2024, "Scaling and evaluating sparse
autoencoders"; Makhzani and Frey 2013.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from xlvlm_jax.solvers.sae.selection import cut_above
from xlvlm_jax.solvers.sae.training import Params, Training
from xlvlm_jax.solvers.validation import check_whole


def check_k(k: int, num_concepts: int) -> None:
    """Checks that k is a number of features.

    Raises:
        ValueError: it is not.
    """
    check_whole("k", k, 1)
    if k > num_concepts:
        raise ValueError(
            f"k={k} is larger than num_concepts={num_concepts}, the number of features; use a "
            "smaller k or more features"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(Training):
    """TopK; see the head of this file.

    Attributes:
        k: number of active features per row.
    """

    k: int = 32

    architecture = "topk"

    def check(self, num_concepts: int) -> None:
        """Checks the options.

        Raises:
            ValueError: a value is invalid.
        """
        super().check(num_concepts)
        check_k(self.k, num_concepts)

    def codes(
        self, hidden: Float[Array, "B K"], params: Params
    ) -> tuple[Float[Array, "B K"], Float[Array, ""]]:
        """Returns the codes."""
        kept = (hidden > 0) & (hidden >= cut_above(hidden, self.k))
        return jnp.where(kept, hidden, 0), jnp.zeros((), jnp.float32)
