"""Several starts: the rows on which they are compared, and which one is kept."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from xlvlm_jax.solvers.matching import matched_cosines

SAMPLE_ROWS, SAMPLE_PER_CONCEPT = 1024, 16
MARGIN = 1e-4  # relative decrease of the objective that makes a later start better than an earlier


def sample(key: PRNGKeyArray, num_samples: int, num_concepts: int) -> Int[Array, " M"]:
    """The numbers of the rows that starts are compared on, all of them where there are few."""
    return draw_rows(key, num_samples, sample_size(num_concepts))


def sample_size(num_concepts: int) -> int:
    """How many rows starts are compared on."""
    return max(SAMPLE_ROWS, SAMPLE_PER_CONCEPT * num_concepts)


def draw_rows(key: PRNGKeyArray, num_samples: int, count: int) -> Int[Array, " M"]:
    """The numbers of `count` different rows, all of them where there are no more."""
    if count >= num_samples:
        return jnp.arange(num_samples)
    return jax.lax.top_k(jax.random.uniform(key, (num_samples,)), count)[1]


def draw_weighted(
    key: PRNGKeyArray, weights: Float[Array, " N"], count: int
) -> tuple[Int[Array, " M"], Float[Array, " M"]]:
    """The numbers of `count` different rows, the heavy ones first, and what each counts for.

    Sums over these rows are those over all, on average: a row stands for the lighter ones that are
    left out, see Duffield, Lund and Thorup, "Priority sampling for estimation of arbitrary subset
    sums", 2007. All rows with their weights where there are no more.
    """
    if count >= len(weights):
        return jnp.arange(len(weights)), weights
    priorities = weights / (1 - jax.random.uniform(key, weights.shape))
    largest, numbers = jax.lax.top_k(priorities, count + 1)
    chosen = numbers[:count]
    # A row without weight has none here either.
    light = jnp.where(weights[chosen] > 0, largest[-1], 0)
    return chosen, jnp.maximum(weights[chosen], light)


def best_first(
    objective: Float[Array, " S"], components: Float[Array, "S K R"]
) -> Float[Array, "S K R"]:
    """The starts' components, those of the best start first.

    Of equally good starts the earlier is the best one, whatever rounding makes of them.
    """
    best = jnp.argmax(objective <= (1 + MARGIN) * jnp.min(objective))
    order = jnp.argsort(jnp.where(jnp.arange(len(objective)) == best, -jnp.inf, objective))
    return components[order]


def stability(starts: Float[np.ndarray, "S K R"]) -> Float[np.ndarray, " K"]:
    """How surely each component of the first start is found again: 1 by every other start.

    The mean over the other starts of the cosine with the component that is matched to it, by the
    assignment of largest total cosine (Hungarian method).
    """
    return np.mean([matched_cosines(starts[0], other) for other in starts[1:]], axis=0)
