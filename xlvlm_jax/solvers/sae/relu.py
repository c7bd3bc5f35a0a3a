"""ReLU with an L1 penalty.

    c = relu(h)
    penalty = l1 mean_n sum_k c_nk / sqrt(D)

The decoder's rows have length one, so codes can't shrink while rows grow; with |x| near sqrt(D),
a weight means the same at any width. Source: Bricken et al. 2023, "Towards monosemanticity".
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xlvlm_jax.solvers.sae.training import Params, Training
from xlvlm_jax.solvers.validation import check_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReLU(Training):
    """ReLU with an L1 penalty; see the head of this file.

    Attributes:
        l1: weight of the penalty.
    """

    l1: float = 0.1

    def check(self, num_concepts: int) -> None:
        """Checks the options.

        Raises:
            ValueError: a value is invalid.
        """
        super().check(num_concepts)
        check_number("l1", self.l1, 0)

    def codes(
        self, hidden: Float[Array, "B K"], params: Params
    ) -> tuple[Float[Array, "B K"], Float[Array, ""]]:
        """Returns the codes."""
        return jax.nn.relu(hidden), jnp.zeros((), jnp.float32)

    def penalty(
        self, hidden: Float[Array, "B K"], codes: Float[Array, "B K"], params: Params, D: int
    ) -> Float[Array, ""]:
        """Returns the weighted mean size of the codes."""
        return self.l1 * jnp.mean(jnp.sum(codes, axis=1)) / D**0.5
