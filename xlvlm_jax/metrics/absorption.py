"""Feature absorption: does another concept speak where an attribute's own stays silent?

A concept for "red" is absorbed where a concept for "red bus" takes its place, so that it no longer
fires on all that is red. With a probe p for the value (of unit length), what concept i adds to the
evidence for it in sample n is u_ni (d_i . p), the coefficient times the direction's part along p.
With the value's own concepts (see `probing.split_concepts`), the fraction of a sample is

    absorbed / (absorbed + own)

where absorbed is the sum over at most A other concepts of the largest positive evidence whose
directions have a cosine of at least c with p. It is 0 if the own concepts bring all the evidence
there is. Only samples with the value that the probe classifies right count.

Source: Chanin et al. 2024, "A is for absorption" (arXiv 2409.14507); the fraction is that of
Karvonen et al. 2025, "SAEBench" (arXiv 2503.09532).

N samples, K concepts, D width.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from xlvlm_jax.solvers.matching import unit_rows

COSINE, MOST = 0.1, 3


def absorption(
    coefficients: Float[np.ndarray, "N K"],
    directions: Float[np.ndarray, "K D"],
    probe: Float[np.ndarray, " D"],
    own: Int[np.ndarray, " k"],
    counted: Bool[np.ndarray, " N"],
    *,
    cosine: float = COSINE,
    most: int = MOST,
) -> float:
    """Returns the mean fraction of a value's evidence that concepts other than its own bring.

    Args:
        coefficients: float[N, K], what states are sums of directions with.
        directions: float[K, D].
        probe: float[D], the normal of a linear probe for the value.
        own: int[k], the value's own concepts.
        counted: bool[N], samples that have the value and that the probe classifies right.
        cosine: least cosine of an absorbing concept with the probe.
        most: maximum number of absorbing concepts per sample.

    Returns:
        a number in [0, 1], 0 where nothing is absorbed; NaN if no sample counts. A sample without
        any evidence counts as 1: its own concepts are silent.

    Raises:
        ValueError: shapes do not fit together, or there is no own concept.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import metrics
        >>> codes = np.float32([[2, 0], [0, 2]])  # red; a red bus, by a concept of its own
        >>> directions = np.float32([[1, 0], [1, 1]])
        >>> red, both = np.float32([1, 0]), np.array([True, True])
        >>> metrics.absorption(codes, directions, red, np.array([0]), both)
        0.5
    """
    K, D = directions.shape
    if coefficients.shape[1] != K or probe.shape != (D,) or len(counted) != len(coefficients):
        raise ValueError(
            f"coefficients have shape {coefficients.shape}, directions {directions.shape}, the "
            f"probe {probe.shape} and {len(counted)} samples may count; expected [N, K], [K, D], "
            "[D] and N"
        )
    if not len(own):
        raise ValueError("a value has no concept of its own; expected at least one")
    if not counted.any():
        return float("nan")
    along = np.asarray(directions, np.float64) @ unit_rows(probe[None])[0]
    aligned = (unit_rows(directions) @ unit_rows(probe[None])[0]) >= cosine
    evidence = np.asarray(coefficients, np.float64)[counted] * along
    mine = evidence[:, own].sum(axis=1)
    others = np.where(aligned, np.maximum(evidence, 0), 0)
    others[:, own] = 0
    absorbed = np.sort(others, axis=1)[:, ::-1][:, :most].sum(axis=1)
    absorbed = np.where(mine >= evidence.sum(axis=1), 0, absorbed)
    mine = np.maximum(mine, 0)
    total = absorbed + mine
    return float(np.where(total > 0, absorbed / np.where(total > 0, total, 1), 1.0).mean())
