"""JumpReLU: each feature has a threshold of its own, which is learnt.

    c = h where h > theta, else 0, theta = exp(log_threshold) > 0
    penalty = l0_weight (mean_n |c_n|_0 / k - 1)^2

A jump has no derivative in theta; that of its mean over rows is estimated with a rectangle of width
eps = bandwidth theta around it,

    d c / d theta = -(theta / eps) [|h - theta| < eps / 2]
    d [h > theta] / d theta = -(1 / eps) [|h - theta| < eps / 2]

All thresholds start where k features per row are active. Source: Rajamanoharan et al. 2024,
"Jumping ahead: improving reconstruction fidelity with JumpReLU sparse autoencoders", equations 10
to 12, with an eps that is the same for all features, and appendix F for the penalty, whose k is a
mean number of active features like that of the other methods.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from xlvlm_jax.solvers.linalg import matmul
from xlvlm_jax.solvers.sae.selection import cut_above
from xlvlm_jax.solvers.sae.start import Start
from xlvlm_jax.solvers.sae.topk import check_k
from xlvlm_jax.solvers.sae.training import Params, Training
from xlvlm_jax.solvers.validation import check_number

FIRST_ROWS, LEAST_THRESHOLD = 1024, 1e-3


@jax.custom_vjp
def jump(
    h: Float[Array, "B K"], theta: Float[Array, " K"], bandwidth: Float[Array, ""]
) -> Float[Array, "B K"]:
    """Returns h where it exceeds theta, else 0, with the derivatives at the head of this file."""
    return jnp.where(h > theta, h, 0)


@jax.custom_vjp
def exceeds(
    h: Float[Array, "B K"], theta: Float[Array, " K"], bandwidth: Float[Array, ""]
) -> Float[Array, "B K"]:
    """Returns 1 where h exceeds theta, else 0, with a derivative in theta alone."""
    return (h > theta).astype(h.dtype)


def _near(h: Array, theta: Array, bandwidth: Array) -> Array:
    eps = bandwidth * theta
    return (jnp.abs(h - theta) < eps / 2).astype(h.dtype) / eps


def _jump_backward(kept: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, None]:
    h, theta, _ = kept
    return jnp.where(h > theta, g, 0), -theta * jnp.sum(_near(*kept) * g, axis=0), None


def _exceeds_backward(kept: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, None]:
    return jnp.zeros_like(kept[0]), -jnp.sum(_near(*kept) * g, axis=0), None


jump.defvjp(lambda *kept: (jump(*kept), kept), _jump_backward)
exceeds.defvjp(lambda *kept: (exceeds(*kept), kept), _exceeds_backward)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JumpReLU(Training):
    """JumpReLU; see the head of this file.

    Attributes:
        k: mean number of active features per row that the penalty leads to.
        l0_weight: weight of the penalty.
        bandwidth: eps over theta.
    """

    k: int = 32
    l0_weight: float = 0.1
    bandwidth: float = 0.25

    architecture = "jumprelu"

    def check(self, num_concepts: int) -> None:
        """Checks the options.

        Raises:
            ValueError: a value is invalid.
        """
        super().check(num_concepts)
        check_k(self.k, num_concepts)
        check_number("l0_weight", self.l0_weight, 0)
        check_number("bandwidth", self.bandwidth, 0)
        if self.bandwidth == 0:
            raise ValueError("bandwidth must be positive; got 0")

    def begin(self, begun: Start, key: PRNGKeyArray, num_concepts: int) -> tuple[Params, Params]:
        """Returns the parameters before the first update."""
        params, fixed = super().begin(begun, key, num_concepts)
        hidden = matmul(begun.rows[:FIRST_ROWS] - params["b_dec"], params["W_enc"])
        first = cut_above(hidden, self.k * len(hidden), of_all=True)[0, 0]
        # Rows that are all equal have nothing to explain, and no values to part.
        logs = jnp.log(jnp.maximum(first, LEAST_THRESHOLD))
        return params | {"log_threshold": jnp.full(num_concepts, logs, jnp.float32)}, fixed

    def codes(
        self, hidden: Float[Array, "B K"], params: Params
    ) -> tuple[Float[Array, "B K"], Float[Array, ""]]:
        """Returns the codes."""
        theta = jnp.exp(params["log_threshold"])
        return jump(hidden, theta, jnp.float32(self.bandwidth)), jnp.zeros((), jnp.float32)

    def penalty(
        self, hidden: Float[Array, "B K"], codes: Float[Array, "B K"], params: Params, D: int
    ) -> Float[Array, ""]:
        """Returns the weighted squared deviation from k active features."""
        theta = jnp.exp(params["log_threshold"])
        active = exceeds(hidden, theta, jnp.float32(self.bandwidth))
        return self.l0_weight * (jnp.mean(jnp.sum(active, axis=1)) / self.k - 1) ** 2

    def finish(self, params: Params, scale: Any, threshold: Float[Array, ""]) -> Params:
        """Returns the parameters with the thresholds."""
        thresholds = jnp.exp(params["log_threshold"]) / scale
        return super().finish(params, scale, threshold) | {"threshold": thresholds}
