"""Archetypal: TopK whose atoms lie in the convex hull of the data.

    W_dec = A (P - b_dec)     A >= 0, rows of A sum to one; P are `points` rows of Z, scaled

So every atom, added to b_dec, is a mean of rows that occur, which makes atoms stable from one run
to the next. P and b_dec, the rows' geometric median, stay as they are; after each update negative
entries of A become zero, and its rows are divided by their sums. Atoms have the lengths that this
gives them. Source: Fel et al. 2025, "Archetypal SAE: adaptive and stable dictionary learning for
concept extraction in large vision models", without relaxation.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from xlvlm_jax.solvers.linalg import TINY, matmul
from xlvlm_jax.solvers.sae.start import Start
from xlvlm_jax.solvers.sae.topk import TopK
from xlvlm_jax.solvers.sae.training import Params
from xlvlm_jax.solvers.validation import check_whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Archetypal(TopK):
    """Archetypal; see the head of this file.

    Attributes:
        points: number of rows of P; None for twice the number of features, or all rows if fewer.
    """

    points: int | None = None

    unit_norm = False

    def check(self, num_concepts: int) -> None:
        """Checks the options.

        Raises:
            ValueError: a value is invalid.
        """
        super().check(num_concepts)
        if self.points is not None:
            check_whole("points", self.points, num_concepts)

    def rows_to_start(self, num_concepts: int) -> int:
        """Returns how many rows the start, and so P, is taken from, if there are as many."""
        return max(super().rows_to_start(num_concepts), self.points or 0)

    def begin(self, begun: Start, key: PRNGKeyArray, num_concepts: int) -> tuple[Params, Params]:
        """Returns the parameters before the first update: each atom is a row."""
        count = min(self.points or 2 * num_concepts, len(begun.rows))
        drawn = jax.random.permutation(key, len(begun.rows))[:count]
        fixed = {"points": begun.rows[drawn], "b_dec": begun.median}
        A = jnp.eye(num_concepts, count, dtype=jnp.float32)
        atoms = self.decoder({"weights": A, **fixed})
        squares = jnp.maximum(jnp.sum(atoms**2, axis=1), TINY)
        return {
            "W_enc": (atoms / squares[:, None]).T,
            "weights": A,
            "b_enc": jnp.zeros(num_concepts, jnp.float32),
        }, fixed

    def decoder(self, params: Params) -> Float[Array, "K D"]:
        """Returns W_dec."""
        return matmul(params["weights"], params["points"] - params["b_dec"])

    def constrain(self, params: Params) -> Params:
        """Returns the parameters with weights of points that are means."""
        A = jax.nn.relu(params["weights"])
        return params | {"weights": A / jnp.maximum(A.sum(axis=1, keepdims=True), TINY)}

    def finish(self, params: Params, scale: Any, threshold: Float[Array, ""]) -> Params:
        """Returns the parameters with atoms in the hull of the rows that are not scaled."""
        return {
            "W_enc": params["W_enc"] * scale,
            "W_dec": self.decoder(params) / scale,
            "b_enc": params["b_enc"],
            "b_dec": params["b_dec"] / scale,
        }
