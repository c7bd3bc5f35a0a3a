"""What the codes say of a dictionary: how much they explain, and how few concepts they use.

N samples, K concepts, D width.
"""

import jax
import numpy as np
from jaxtyping import Bool, Float

from xlvlm_jax.concepts import Concepts

AnyArray = jax.Array | np.ndarray


def explained_variance(Z: Float[AnyArray, "N D"], reconstruction: Float[AnyArray, "N D"]) -> float:
    """1 - |Z - reconstruction|^2 / |Z - mean of Z|^2, at most 1.

    Negative where the mean of Z alone does better; NaN if all rows of Z are equal.
    Raises ValueError unless both have the same shape.
    """
    Z, reconstruction = np.asarray(Z, np.float64), np.asarray(reconstruction, np.float64)
    if Z.shape != reconstruction.shape:
        raise ValueError(
            f"Z has shape {Z.shape}, its reconstruction {reconstruction.shape}; expected the same"
        )
    variance = np.sum((Z - Z.mean(axis=0)) ** 2)
    return float(1 - np.sum((Z - reconstruction) ** 2) / variance) if variance else float("nan")


def reconstruct(
    concepts: Concepts, activations: Float[AnyArray, "N K"]
) -> Float[np.ndarray, "N D"]:
    """The rows that activations stand for: those times components, and for pca its mean added.

    For kmeans and simple, whose activations are no coefficients, each row's nearest component.
    """
    components, activations = np.asarray(concepts.components), np.asarray(activations)
    if concepts.method in ("kmeans", "simple"):
        return components[activations.argmax(axis=1)]
    mean = 0 if concepts.mean is None else np.asarray(concepts.mean)
    return activations @ components + mean


def hoyer_sparsity(activations: Float[AnyArray, "N K"]) -> float:
    """Mean over samples of (sqrt(K) - |u|_1 / |u|_2) / (sqrt(K) - 1) (Hoyer 2004, section 3.1).

    1 where each sample uses one concept, 0 where it uses all alike. Samples that use none are left
    out; NaN if none is left, or K is 1.
    """
    codes = np.abs(np.asarray(activations, np.float64))
    codes = codes[codes.any(axis=1)]
    root = np.sqrt(codes.shape[1])
    if not len(codes) or root == 1:
        return float("nan")
    ratio = codes.sum(axis=1) / np.linalg.norm(codes, axis=1)
    return float(np.mean((root - ratio) / (root - 1)))


def active_share(activations: Float[AnyArray, "N K"]) -> float:
    """The share of codes that are not zero, in [0, 1]."""
    return float(np.mean(np.asarray(activations) != 0))


def dead_concepts(activations: Float[AnyArray, "N K"]) -> Bool[np.ndarray, " K"]:
    """Which concepts are the most activated one of no sample (of equals the first is).

    A concept with codes of zero alone is among them, and so is one that never comes first: its
    words are held against no image. A sample whose codes are all zero has no most activated one.
    """
    codes = np.asarray(activations)
    first = codes.argmax(axis=1)[codes.any(axis=1)]
    return np.bincount(first, minlength=codes.shape[1]) == 0
