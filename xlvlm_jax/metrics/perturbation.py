"""Targeted perturbation: does removing a value's concepts hide this value alone?

For each value i of attributes the coefficients of its concepts are set to zero, which takes
sum over k of u_nk d_k off the states; probes for all values j are read from what is left. With the
loss of accuracy L_ij of probe j,

    score = mean of L_ii - mean of L_ij over all j != i

It is 0 if all probes suffer alike, or none does.

Source: Karvonen et al. 2025, "SAEBench" (arXiv 2503.09532), targeted probe perturbation, after
Marks et al. 2024, "Sparse feature circuits" (arXiv 2403.19647).

N samples, K concepts, D width, V values.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from xlvlm_jax.metrics.probing import Probe, balanced_accuracy


def accuracy_losses(
    states: Float[np.ndarray, "N D"],
    coefficients: Float[np.ndarray, "N K"],
    directions: Float[np.ndarray, "K D"],
    chosen: Sequence[Int[np.ndarray, " _"]],
    probes: Sequence[Probe],
    positive: Bool[np.ndarray, "N V"],
    known: Bool[np.ndarray, "N V"],
) -> Float[np.ndarray, "V V"]:
    """Returns how much balanced accuracy each probe loses when a value's concepts are removed.

    Args:
        states: float[N, D].
        coefficients: float[N, K].
        directions: float[K, D].
        chosen: for each of V values its concepts.
        probes: a probe of states for each value.
        positive: bool[N, V], which samples have each value.
        known: bool[N, V], which samples have a value of its attribute.

    Returns:
        float64[V, V]: row i, column j: the loss of probe j without the concepts of value i.

    Raises:
        ValueError: shapes do not fit together.
    """
    V, N = len(probes), len(states)
    shapes = coefficients.shape, directions.shape, positive.shape, known.shape
    expected = (N, len(directions)), (coefficients.shape[1], states.shape[1]), (N, V), (N, V)
    if shapes != expected or len(chosen) != V:
        raise ValueError(
            f"coefficients, directions and labels of {V} values of states {states.shape} have "
            f"shapes {', '.join(map(str, shapes))}, and {len(chosen)} values have concepts; "
            "expected [N, K], [K, D], [N, V] twice, and V"
        )
    weights = np.stack([probe.weights for probe in probes], axis=1)
    logits = np.asarray(states, np.float64) @ weights + [probe.bias for probe in probes]
    read = np.asarray(directions, np.float64) @ weights  # [K, V]

    def accuracies(logits: np.ndarray) -> np.ndarray:
        rows = (known[:, j] for j in range(V))
        return np.array(
            [
                balanced_accuracy(positive[here, j], logits[here, j] > 0)
                for j, here in enumerate(rows)
            ]
        )

    before = accuracies(logits)
    removed = (np.asarray(coefficients[:, own], np.float64) @ read[own] for own in chosen)
    return np.stack([before - accuracies(logits - part) for part in removed])


def targeted_perturbation(losses: Float[np.ndarray, "V V"]) -> float:
    """Returns the mean loss of the targeted probes less the mean loss of all others.

    Args:
        losses: float[V, V], as from `accuracy_losses`.

    Returns:
        a number in [-1, 1]; 0 if no probe is targeted.

    Raises:
        ValueError: losses are not a square matrix of two values or more.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import metrics
        >>> metrics.targeted_perturbation(np.array([[0.5, 0.1], [0.0, 0.3]])).__round__(2)
        0.35
    """
    if losses.ndim != 2 or losses.shape[0] != losses.shape[1] or len(losses) < 2:
        raise ValueError(
            f"losses have shape {losses.shape}; expected [V, V], a probe per value, two or more"
        )
    own = np.eye(len(losses), dtype=bool)
    return float(losses[own].mean() - losses[~own].mean())
