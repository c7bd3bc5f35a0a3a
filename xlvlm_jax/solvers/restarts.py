"""Several starts: the rows on which they are compared, and which one is kept."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from xlvlm_jax.solvers.matching import matched_cosines

SAMPLE_ROWS, SAMPLE_PER_CONCEPT = 1024, 16
MARGIN = 1e-4  # a later start is better only if its objective is lower by this relative margin


def sample(
    key: PRNGKeyArray, num_samples: Int[Array, ""] | int, num_concepts: int, rows: int | None = None
) -> Int[Array, " M"]:
    """Returns the numbers of the rows on which starts are compared; see `draw_rows`."""
    return draw_rows(key, num_samples, sample_size(num_concepts), rows)


def sample_size(num_concepts: int) -> int:
    """Returns how many rows starts are compared on."""
    return max(SAMPLE_ROWS, SAMPLE_PER_CONCEPT * num_concepts)


def draw_rows(
    key: PRNGKeyArray, num_samples: Int[Array, ""] | int, count: int, rows: int | None = None
) -> Int[Array, " M"]:
    """Returns the numbers of `count` distinct rows, or of all rows if there are no more.

    Args:
        key: random key.
        num_samples: number of leading rows to draw from.
        count: how many to draw.
        rows: number of rows, those that pad Z included; None if none does. Rows that pad Z come
            last, after all others, if `num_samples` is less than `count`.
    """
    if rows is None:
        assert isinstance(num_samples, int), "a traced number of samples needs the number of rows"
        rows = num_samples
    numbers = jnp.arange(rows)
    if count >= rows:
        return numbers
    # An element's random number does not depend on how many are drawn.
    drawn = jax.random.uniform(key, (rows,))
    drawn = jnp.where(num_samples > count, drawn, -numbers.astype(drawn.dtype))
    return jax.lax.top_k(jnp.where(numbers < num_samples, drawn, -jnp.inf), count)[1]


def draw_weighted(
    key: PRNGKeyArray,
    weights: Float[Array, " N"],
    count: int,
    num_samples: Int[Array, ""] | int | None = None,
) -> tuple[Int[Array, " M"], Float[Array, " M"]]:
    """Draws rows in proportion to their weights.

    Sums over these rows estimate sums over all rows without bias: each row also represents lighter
    rows that are left out.

    Args:
        key: random key.
        weights: float[N].
        count: number of distinct rows.
        num_samples: number of leading rows to draw from; None for all. The others have weight zero.

    Returns:
        the numbers of the rows, heaviest priority first, and the weight of each; all rows with
        their own weights if there are no more than `count`.

    Source: Duffield, Lund and Thorup, "Priority sampling for estimation of arbitrary subset sums",
    2007.
    """
    if count >= len(weights):
        return jnp.arange(len(weights)), weights
    priorities = weights / (1 - jax.random.uniform(key, weights.shape))
    rows, all_count = jnp.arange(len(weights)), False
    if num_samples is not None:
        all_count = num_samples <= count
        priorities = jnp.where(rows < num_samples, priorities, -1)
        priorities = jnp.where(all_count, -rows.astype(priorities.dtype), priorities)
    largest, numbers = jax.lax.top_k(priorities, count + 1)
    chosen = numbers[:count]
    # A row of zero weight keeps zero weight.
    light = jnp.where((weights[chosen] > 0) & jnp.logical_not(all_count), largest[-1], 0)
    return chosen, jnp.maximum(weights[chosen], light)


def best_first(
    objective: Float[Array, " S"], components: Float[Array, "S K R"]
) -> Float[Array, "S K R"]:
    """Returns the starts' components, those of the best start first.

    Among equally good starts the earliest is the best, whatever their rounding.
    """
    best = jnp.argmax(objective <= (1 + MARGIN) * jnp.min(objective))
    order = jnp.argsort(jnp.where(jnp.arange(len(objective)) == best, -jnp.inf, objective))
    return components[order]


def stability(starts: Float[np.ndarray, "S K R"]) -> Float[np.ndarray, " K"]:
    """Returns how reliably each component of the first start is found again: 1 if by every start.

    The mean over the other starts of the cosine with the matched component (Hungarian method).
    """
    return np.mean([matched_cosines(starts[0], other) for other in starts[1:]], axis=0)
