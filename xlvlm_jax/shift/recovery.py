"""Recovery: how near shifted concepts come to the fine-tuned model's own.

    recovery    (cos(v, u + s) - cos(v, u)) / cos(v, u), v the fine-tuned concept matched to u

K concepts, D width. A concept without a shift has figures of NaN.
"""

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
    """How much nearer the shifted concepts are to the fine-tuned ones than the original were.

    Traces under jit (metric static), vmap and grad.

    Args:
        original, shifted: concepts before and after the shift.
        destination: the fine-tuned model's own concepts, matched (`destination[match(...)]`).
        metric: "cosine": (cos(v, s) - cos(v, u)) / cos(v, u); "l2": (|v - u| - |v - s|) / |v - u|,
            which is 1 where the shift hits.

    Raises ValueError for another metric or shapes that differ.
    """
    u, s, v = map(jnp.asarray, (original, shifted, destination))
    u, s, v = (each.astype(jnp.result_type(u, s, v, jnp.float32)) for each in (u, s, v))
    if not u.shape == s.shape == v.shape:
        raise ValueError(
            f"concepts have shapes {u.shape}, {s.shape} and {v.shape}; expected the same [K, D]"
        )
    if metric == "cosine":
        before, after = _cosine(v, u), _cosine(v, s)
        return (after - before) / before
    if metric == "l2":
        before = jnp.linalg.norm(v - u, axis=1)
        return (before - jnp.linalg.norm(v - s, axis=1)) / before
    raise ValueError(f"metric is {metric!r}; expected 'cosine' or 'l2'")


def overlap(
    found: Sequence[Sequence[Hashable]], wanted: Sequence[Sequence[Hashable]], size: int
) -> Float[np.ndarray, " K"]:
    """The share of `wanted[k]` that is in `found[k]`: their common items / size.

    Runs on the host: it does not trace.

    With the words of original (or shifted) and of matched fine-tuned concepts it is T-Overlap, with
    `size` the number of words that were asked for (15 in the paper; a concept that keeps fewer
    words can't reach 1); with images, the overlap of the most activating samples.

    Raises ValueError for other numbers of concepts or a size below 1.
    """
    if len(found) != len(wanted):
        raise ValueError(f"{len(found)} and {len(wanted)} concepts; expected as many of both")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    return np.array([len({*a} & {*b}) / size for a, b in zip(found, wanted, strict=True)])


def mismatched_overlap(
    found: Sequence[Sequence[Hashable]], wanted: Sequence[Sequence[Hashable]], size: int
) -> float:
    """What `overlap` gives for concepts that are not each other's match, on average.

    Runs on the host: it does not trace.

    Words that all concepts share, because all samples do, overlap whatever a shift does: this is
    how much. Needs two concepts or more (else NaN).
    """
    others = [
        len({*a} & {*b}) / size for i, a in enumerate(found) for j, b in enumerate(wanted) if i != j
    ]
    return float(np.mean(others)) if others else float("nan")


class Correlation(NamedTuple):
    """Pearson's correlation of two figures over the concepts that have both."""

    r: float
    p_value: float
    # The field that its name promises, in place of a tuple's method.
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]


def correlation(a: Float[Array, " K"], b: Float[Array, " K"]) -> Correlation:
    """Pearson's r and its p-value, without concepts where either is NaN; NaN for fewer than 3.

    Runs on the host: it does not trace.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 3 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
        return Correlation(float("nan"), float("nan"), int(both.sum()))
    from scipy.stats import pearsonr  # which takes a second to import

    result: Any = pearsonr(a[both], b[both])
    return Correlation(float(result.statistic), float(result.pvalue), int(both.sum()))


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    norms = jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1)
    return jnp.sum(a * b, axis=1) / norms
