"""Several starts: the rows on which they are compared, and which one is kept."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Float, Int, PRNGKeyArray

from xlvlm_jax.solvers.collectives import ONE_DEVICE, Rows
from xlvlm_jax.solvers.matching import match, unit_rows

SAMPLE_ROWS, SAMPLE_PER_CONCEPT = 1024, 16
NEARBY = 1e-3  # of the rows' spread: offsets this short have no direction
MARGIN = 1e-4  # a later start is better only if its objective is lower by this relative margin


def sample(
    key: PRNGKeyArray,
    num_samples: Int[Array, ""] | int,
    num_concepts: int,
    M: int | None = None,
    rows: Rows = ONE_DEVICE,
) -> Int[Array, " S"]:
    """Returns the numbers of the rows on which starts are compared; see `draw_rows`."""
    return draw_rows(key, num_samples, sample_size(num_concepts), M, rows)


def sample_size(num_concepts: int) -> int:
    """Returns how many rows starts are compared on."""
    return max(SAMPLE_ROWS, SAMPLE_PER_CONCEPT * num_concepts)


def uniforms(key: PRNGKeyArray, numbers: Int[Array, " M"]) -> Float[Array, " M"]:
    """Returns the elements with these numbers of `jax.random.uniform(key, (N,), float32)`.

    Each is computed from its number alone, so that a device draws for its own rows and no others.

    Args:
        key: random key. One of another kind than JAX's default gives other numbers than
            `jax.random.uniform`.
        numbers: int[M], less than 2^31.
    """
    words = jax.random.key_data(key).reshape(-1)
    counters = numbers.astype(jnp.uint32)
    high, low = jnp.split(
        threefry_2x32((words[0], words[1]), jnp.concatenate([jnp.zeros_like(counters), counters])),
        2,
    )
    # 23 random bits behind the point of a number from 1 to 2.
    bits = ((high ^ low) >> 9) | jnp.float32(1).view(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits, jnp.float32) - 1


def draw_rows(
    key: PRNGKeyArray,
    num_samples: Int[Array, ""] | int,
    count: int,
    M: int | None = None,
    rows: Rows = ONE_DEVICE,
) -> Int[Array, " S"]:
    """Returns the numbers of `count` distinct rows, or of all rows if there are no more.

    They are the same however the rows are spread.

    Args:
        key: random key.
        num_samples: number of leading rows to draw from.
        count: how many to draw.
        M: number of rows on this device, those that pad Z included; None if none does. Rows that
            pad Z come last, after all others, if `num_samples` is less than `count`.
        rows: where the rows are.
    """
    if M is None:
        assert isinstance(num_samples, int), "a traced number of samples needs the number of rows"
        M = num_samples
    if count >= rows.count(M):
        return jnp.arange(rows.count(M))
    numbers = rows.numbers(M)
    drawn = uniforms(key, numbers)
    drawn = jnp.where(num_samples > count, drawn, -numbers.astype(drawn.dtype))
    return rows.largest(jnp.where(numbers < num_samples, drawn, -jnp.inf), count)


def draw_weighted(
    key: PRNGKeyArray,
    weights: Float[Array, " M"],
    count: int,
    num_samples: Int[Array, ""] | int | None = None,
    rows: Rows = ONE_DEVICE,
) -> tuple[Int[Array, " S"], Float[Array, " S"]]:
    """Draws rows in proportion to their weights.

    Sums over these rows estimate sums over all rows without bias: each row also represents lighter
    rows that are left out.

    Args:
        key: random key.
        weights: float[M], of the rows on this device.
        count: number of distinct rows.
        num_samples: number of leading rows to draw from; None for all. The others have weight zero.
        rows: where the rows are.

    Returns:
        the numbers of the rows, heaviest priority first, and the weight of each; all rows with
        their own weights if there are no more than `count`.

    Source: Duffield, Lund and Thorup, "Priority sampling for estimation of arbitrary subset sums",
    2007.
    """
    whole, numbers = rows.count(len(weights)), rows.numbers(len(weights))
    if count >= whole:
        return jnp.arange(whole), rows.take(weights, jnp.arange(whole))
    priorities, all_count = weights / (1 - uniforms(key, numbers)), False
    if num_samples is not None:
        all_count = num_samples <= count
        priorities = jnp.where(numbers < num_samples, priorities, -1)
        priorities = jnp.where(all_count, -numbers.astype(priorities.dtype), priorities)
    largest = rows.largest(priorities, count + 1)
    chosen, next_one = largest[:-1], rows.take(priorities, largest[-1:])[0]
    own = rows.take(weights, chosen)
    # A row of zero weight keeps zero weight.
    light = jnp.where((own > 0) & jnp.logical_not(all_count), next_one, 0)
    return chosen, jnp.maximum(own, light)


def best_first(
    objective: Float[Array, " S"], components: Float[Array, "S K R"]
) -> Float[Array, "S K R"]:
    """Returns the starts' components, those of the best start first.

    Among equally good starts the earliest is the best, whatever their rounding.
    """
    best = jnp.argmax(objective <= (1 + MARGIN) * jnp.min(objective))
    order = jnp.argsort(jnp.where(jnp.arange(len(objective)) == best, -jnp.inf, objective))
    return components[order]


def stability(
    starts: Float[np.ndarray, "S K R"], radius: float | None = None
) -> Float[np.ndarray, " K"]:
    """Returns how reliably each component of the first start is found again: 1 if by every start.

    The mean over the other starts of the cosine with the matched component (Hungarian method).

    Args:
        starts: the components of each start.
        radius: for components that are offsets from a mean: the root mean square distance of the
            rows to their nearest one. Offsets that are far shorter than the rows are spread, such
            as the only one of K = 1, have no direction and are the same. None for directions.
    """
    first = np.asarray(starts[0], np.float64)
    nearby = -1.0
    if radius is not None:
        longest = np.linalg.norm(np.asarray(starts, np.float64), axis=2).max(initial=0)
        nearby = NEARBY * np.hypot(longest, radius)
    found = []
    for other in np.asarray(starts[1:], np.float64):
        matched = other[match(first, other)]
        cosines = np.sum(unit_rows(first) * unit_rows(matched), axis=1)
        lengths = (np.linalg.norm(each, axis=1) for each in (first, matched))
        found.append(np.where(np.maximum(*lengths) <= nearby, 1, cosines))
    return np.mean(found, axis=0).astype(starts.dtype)
