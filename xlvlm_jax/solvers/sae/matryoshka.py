"""Matryoshka: BatchTopK whose first features are a dictionary by themselves.

    y_m = c_1:m W_dec_1:m + b_dec for each m of prefixes
    L has the mean over m of mean (x - y_m)^2

so general features come first and are not split into special ones (absorption). Source: Bussmann,
Nabeshima, Karvonen and Nanda 2025, "Learning multi-level features with matryoshka sparse
autoencoders".
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from xlvlm_jax.solvers.sae.batchtopk import BatchTopK
from xlvlm_jax.solvers.sae.products import product

SHARES = (16, 8, 4, 2, 1)  # of the features, by default


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matryoshka(BatchTopK):
    """Matryoshka; see the head of this file.

    Attributes:
        prefixes: rising numbers of features; all are added as the last. None for a sixteenth, an
            eighth, a quarter and a half.
    """

    prefixes: tuple[int, ...] | None = None

    architecture = "matryoshka_batchtopk"

    def check(self, num_concepts: int) -> None:
        """Checks the options.

        Raises:
            ValueError: a value is invalid.
        """
        super().check(num_concepts)
        sizes = self.sizes(num_concepts)
        rising = all(a < b for a, b in zip((0, *sizes), sizes, strict=False))
        if not rising or sizes[-1] != num_concepts:
            raise ValueError(
                f"prefixes are {self.prefixes}; expected rising numbers of features from 1 to "
                f"num_concepts={num_concepts}"
            )

    def sizes(self, num_concepts: int) -> tuple[int, ...]:
        """Returns the numbers of features in each prefix."""
        if self.prefixes is None:
            return tuple(sorted({-(-num_concepts // share) for share in SHARES}))
        given = tuple(int(size) for size in self.prefixes)
        return given if given and given[-1] >= num_concepts else (*given, num_concepts)

    def reconstructions(
        self, codes: Float[Array, "B K"], decoder: Float[Array, "K D"], b_dec: Float[Array, " D"]
    ) -> Float[Array, "M B D"]:
        """Returns y of every prefix."""
        sizes = self.sizes(len(decoder))
        parts = [
            product(codes[:, start:stop], decoder[start:stop], self.products)
            for start, stop in zip((0, *sizes), sizes, strict=False)
        ]
        return jnp.cumsum(jnp.stack(parts), axis=0) + b_dec
