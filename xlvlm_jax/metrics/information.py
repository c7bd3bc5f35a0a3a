"""Information: what each concept tells of each attribute, and whether it tells of one alone.

Codes become a few classes: zero, and equal shares of the samples that are not. I is the mutual
information of these classes with an attribute, less what independent ones would have in a sample of
N, (classes - 1) (values - 1) / 2 N (Miller 1955), and not below zero. H is the attribute's entropy.

    information       I / H, the share of the attribute that one concept tells, in [0, 1]
    disentanglement   1 - entropy of a concept's I / H over attributes (base: their number), mean
                      over concepts weighted by their sums: 1 if each tells of one attribute
    completeness      the same of an attribute's over concepts: 1 if one concept tells all of it

Source: Eastwood and Williams 2018, "A framework for the quantitative evaluation of disentangled
representations", with mutual information for importance, as Chen et al. 2018 (beta-TCVAE) use it.

N samples, K concepts, A attributes, V values.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from xlvlm_jax.metrics.labels import UNKNOWN, Labels

CLASSES = 4  # of codes that are not zero
EPSILON = 1e-12


def classes_of(codes: Float[np.ndarray, "N K"], count: int = CLASSES) -> Int[np.ndarray, "N K"]:
    """Returns the class of each code: 0 for zero, 1 to `count` for shares of the others by size.

    Equal codes share a class, so that there may be fewer.

    Args:
        codes: float[N, K].
        count: number of classes of nonzero codes.

    Raises:
        ValueError: count is below 1.
    """
    if count < 1:
        raise ValueError(f"codes need at least one class, got {count}")
    found = np.zeros(codes.shape, np.int64)
    for k, column in enumerate(codes.T):
        used = column != 0
        if used.any():
            edges = np.quantile(column[used], np.arange(1, count) / count)
            found[used, k] = 1 + np.searchsorted(edges, column[used], side="left")
    return found


def attribute_information(
    codes: Float[np.ndarray, "N K"], attributes: Sequence[Labels], count: int = CLASSES
) -> Float[np.ndarray, "K A"]:
    """Returns the share of each attribute that each concept tells.

    Args:
        codes: float[N, K].
        attributes: A attributes of the samples; those that are unknown are left out.
        count: number of classes of nonzero codes.

    Returns:
        float64[K, A] in [0, 1]; 0 for an attribute that does not vary, and near 0 if independent.

    Raises:
        ValueError: an attribute does not have N values, or count is below 1.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import metrics
        >>> from xlvlm_jax.metrics.labels import factorise
        >>> colours = factorise(["red", "blue"] * 50)
        >>> codes = np.tile(np.float32([[1, 3], [0, 3]]), (50, 1))
        >>> metrics.attribute_information(codes, [colours]).round(2).tolist()
        [[0.99], [0.0]]
    """
    found = classes_of(np.asarray(codes), count)
    table = np.zeros((codes.shape[1], len(attributes)))
    for a, labels in enumerate(attributes):
        if len(labels.codes) != len(codes):
            raise ValueError(
                f"an attribute has {len(labels.codes)} values for {len(codes)} samples; expected "
                "one per sample"
            )
        known = labels.codes != UNKNOWN
        kept = labels.take(known)
        entropy = _entropy(kept.counts())
        for k in range(codes.shape[1] if entropy > EPSILON else 0):
            joint = kept.counts_by(found[known, k], count + 1)
            # The chain rule: I = H(rows) + H(columns) - H(both).
            shared = _entropy(joint.sum(1)) + entropy - _entropy(joint.ravel())
            rows, columns = (np.count_nonzero(joint.any(axis)) for axis in (1, 0))
            chance = (rows - 1) * (columns - 1) / (2 * joint.sum())
            table[k, a] = min(max(shared - chance, 0.0) / entropy, 1.0)
    return table


def _entropy(counts: Int[np.ndarray, " n"]) -> float:
    """Returns the entropy of a distribution in nats, from counts."""
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(shares * np.log(shares)).sum())


def disentanglement(information: Float[np.ndarray, "K A"]) -> float:
    """Returns how far each concept tells of one attribute alone.

    Args:
        information: float[K, A], not negative, such as from `attribute_information`.

    Returns:
        a number in [0, 1]; NaN if no concept tells of any attribute.

    Raises:
        ValueError: there are fewer than two attributes, or a number is negative.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import metrics
        >>> metrics.disentanglement(np.array([[0.5, 0.0], [0.0, 0.2]]))
        1.0
        >>> metrics.disentanglement(np.array([[0.5, 0.5], [0.2, 0.2]]))
        0.0
    """
    if information.ndim != 2 or information.shape[1] < 2 or (information < 0).any():
        raise ValueError(
            f"information has shape {information.shape} and a least value of "
            f"{information.min(initial=0):.3g}; expected [K, A] of two or more, not negative"
        )
    weights = information.sum(axis=1)
    if not weights.sum() > 0:
        return float("nan")
    shares = information / np.where(weights > 0, weights, 1)[:, None]
    entropies = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=1)
    each = 1 - entropies / np.log(information.shape[1])
    return float(np.average(np.clip(each, 0, 1), weights=weights))


def completeness(information: Float[np.ndarray, "K A"]) -> float:
    """Returns how far each attribute is told by one concept alone.

    Args:
        information: float[K, A], not negative, such as from `attribute_information`.

    Returns:
        a number in [0, 1]; NaN if no concept tells of any attribute.

    Raises:
        ValueError: there are fewer than two concepts, or a number is negative.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import metrics
        >>> metrics.completeness(np.array([[0.5, 0.2], [0.0, 0.0]]))
        1.0
    """
    return disentanglement(information.T)
