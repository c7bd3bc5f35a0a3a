"""Recovery: how close shifted concepts come to the fine-tuned model's own.

    recovery    (cos(v, u + s) - cos(v, u)) / cos(v, u), v the fine-tuned concept matched to u

K concepts, D width. All values of a concept without a shift are NaN.
"""

import collections
from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

Array = jax.Array | np.ndarray


def recovery(
    original: Float[Array, "K D"],
    shifted: Float[Array, "K D"],
    destination: Float[Array, "K D"],
    metric: Literal["cosine", "l2"] = "cosine",
) -> Float[Array, " K"]:
    """Returns how much closer shifted concepts are to the fine-tuned ones than original ones.

    Works under jit (metric static), vmap and grad.

    Args:
        original, shifted: float[K, D], concepts before (u) and after (s) the shift.
        destination: float[K, D], the fine-tuned model's own concepts (v), matched to `original`
            (`destination[match(...)]`).
        metric: "cosine": (cos(v, s) - cos(v, u)) / cos(v, u); "l2": (|v - u| - |v - s|) / |v - u|,
            which is 1 if the shifted concept equals the fine-tuned one.

    Returns:
        float32[K]; NaN where nothing can be recovered: the cosine of v and u is 0 or one of the
        vectors is, or (l2) v equals u.

    Raises:
        ValueError: the metric is unknown, or the shapes differ.
    """
    u, s, v = map(jnp.asarray, (original, shifted, destination))
    u, s, v = (each.astype(jnp.result_type(u, s, v, jnp.float32)) for each in (u, s, v))
    if not u.shape == s.shape == v.shape:
        raise ValueError(
            f"concepts have shapes {u.shape}, {s.shape} and {v.shape}; expected the same [K, D]"
        )
    if metric == "cosine":
        before, after = _cosine(v, u), _cosine(v, s)
        return _ratio(after - before, before)
    if metric == "l2":
        before = jnp.linalg.norm(v - u, axis=1)
        return _ratio(before - jnp.linalg.norm(v - s, axis=1), before)
    raise ValueError(f"metric is {metric!r}; expected 'cosine' or 'l2'")


def overlap(
    found: Sequence[Sequence[Hashable]], wanted: Sequence[Sequence[Hashable]], size: int
) -> Float[np.ndarray, " K"]:
    """Returns the number of items that `found[k]` and `wanted[k]` share, divided by `size`.

    Runs on the host and cannot be traced.

    For the words of original (or shifted) concepts and their fine-tuned match this is T-Overlap;
    for images, the overlap of the most activating samples.

    Args:
        found, wanted: K lists of items each.
        size: the number of items requested, 15 words in the paper; a concept with fewer items
            can't reach 1.

    Returns:
        float64[K].

    Raises:
        ValueError: the numbers of concepts differ, or `size` is below 1.
    """
    if len(found) != len(wanted):
        raise ValueError(f"{len(found)} and {len(wanted)} concepts; expected equally many")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    return np.array([len({*a} & {*b}) / size for a, b in zip(found, wanted, strict=True)])


def mismatched_overlap(
    found: Sequence[Sequence[Hashable]], wanted: Sequence[Sequence[Hashable]], size: int
) -> float:
    """Returns the mean `overlap` of concepts that are not each other's match.

    Runs on the host and cannot be traced.

    This is the baseline for `overlap`: words that all concepts share, because all samples do,
    overlap whatever the shift is.

    Args:
        found, wanted, size: as for `overlap`.

    Returns:
        The mean; NaN for fewer than two concepts.
    """
    # Counts of items give all pairs at once: of thousands of concepts there are millions.
    ours, theirs = (
        collections.Counter(item for items in lists for item in {*items})
        for lists in (found, wanted)
    )
    shared = sum(count * theirs[item] for item, count in ours.items())
    matched = sum(len({*a} & {*b}) for a, b in zip(found, wanted, strict=False))
    pairs = len(found) * len(wanted) - min(len(found), len(wanted))
    return (shared - matched) / size / pairs if pairs else float("nan")


class Correlation(NamedTuple):
    """Pearson's correlation of two figures over the concepts that have both.

    Attributes:
        r: from -1 to 1.
        p_value: of a two-sided test that r is 0.
        count: number of concepts (in place of the method `tuple.count`).
    """

    r: float
    p_value: float
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]


def correlation(a: Float[Array, " K"], b: Float[Array, " K"]) -> Correlation:
    """Computes Pearson's r and its p-value.

    Runs on the host and cannot be traced.

    Args:
        a, b: float[K]; concepts where either is not finite are left out.

    Returns:
        r and p, NaN for fewer than three concepts or a constant figure, and the concepts counted.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 3 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
        return Correlation(float("nan"), float("nan"), int(both.sum()))
    from scipy.stats import pearsonr  # takes a second to import

    result: Any = pearsonr(a[both], b[both])
    return Correlation(float(result.statistic), float(result.pvalue), int(both.sum()))


def _ratio(gained: jax.Array, before: jax.Array) -> jax.Array:
    return jnp.where(before != 0, gained / jnp.where(before != 0, before, 1), jnp.nan)


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    norms = jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1)
    return jnp.sum(a * b, axis=1) / norms
