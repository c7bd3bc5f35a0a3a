"""What the codes say of a dictionary: how much they explain, and how few concepts they use.

N samples, K concepts, D width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from xlvlm_jax.concepts import Concepts
from xlvlm_jax.metrics.precision import as_figure, as_real, column_means, is_traced
from xlvlm_jax.solvers.loop import matmul

AnyArray = jax.Array | np.ndarray


def explained_variance(Z: Float[AnyArray, "N D"], reconstruction: Float[AnyArray, "N D"]) -> float:
    """1 - |Z - reconstruction|^2 / |Z - mean of Z|^2, at most 1.

    Negative where the mean of Z alone does better; NaN if all rows of Z are equal.
    Traces under jit, vmap and grad.
    Raises ValueError unless both have the same shape.
    """
    xp, (Z, reconstruction) = as_real(Z, reconstruction)
    if Z.shape != reconstruction.shape:
        raise ValueError(
            f"Z has shape {Z.shape}, its reconstruction {reconstruction.shape}; expected the same"
        )

    def mean_square(rows: AnyArray) -> AnyArray:
        return column_means(xp.sum(rows**2, axis=1, keepdims=True))[0]

    variance = mean_square(Z - column_means(Z))
    varies = variance > 0
    share = mean_square(Z - reconstruction) / xp.where(varies, variance, 1)
    return as_figure(xp.where(varies, 1 - share, xp.nan))


def reconstruct(
    concepts: Concepts, activations: Float[AnyArray, "N K"]
) -> Float[np.ndarray, "N D"]:
    """The rows that activations stand for: those times components, and for pca its mean added.

    For kmeans and simple, whose activations are no coefficients, each row's nearest component.
    Traces under jit, vmap and grad.
    """
    xp = jnp if is_traced(concepts.components, activations) else np
    components, activations = xp.asarray(concepts.components), xp.asarray(activations)
    if concepts.method in ("kmeans", "simple"):
        return components[activations.argmax(axis=1)]
    mean = 0 if concepts.mean is None else xp.asarray(concepts.mean)
    product = activations @ components if xp is np else matmul(activations, components)
    return product + mean


def hoyer_sparsity(activations: Float[AnyArray, "N K"]) -> float:
    """Mean over samples of (sqrt(K) - |u|_1 / |u|_2) / (sqrt(K) - 1) (Hoyer 2004, section 3.1).

    1 where each sample uses one concept, 0 where it uses all alike. Samples that use none are left
    out; NaN if none is left, or K is 1. Traces under jit, vmap and grad.
    """
    xp, (codes,) = as_real(activations)
    root = np.sqrt(codes.shape[1])
    if not len(codes) or root == 1:
        return float("nan")
    used = (codes != 0).any(axis=1)
    norms = xp.sqrt(xp.where(used, xp.sum(codes**2, axis=1), 1))
    sparsity = (root - xp.abs(codes).sum(axis=1) / norms) / (root - 1)
    both = xp.stack([xp.where(used, sparsity, 0), xp.where(used, 1.0, 0.0)], axis=1)
    total, count = column_means(both)
    return as_figure(xp.where(count > 0, total / xp.where(count > 0, count, 1), xp.nan))


def active_share(activations: Float[AnyArray, "N K"]) -> float:
    """The share of codes that are not zero, in [0, 1]. Traces under jit and vmap."""
    if is_traced(activations):
        _, (codes,) = as_real(activations)
        return jnp.mean(column_means((codes != 0).astype(codes.dtype)))
    return float(np.mean(np.asarray(activations) != 0))


def dead_concepts(activations: Float[AnyArray, "N K"]) -> Bool[np.ndarray, " K"]:
    """Which concepts are the most activated one of no sample (of equals the first is).

    A concept with codes of zero alone is among them, and so is one that never comes first: its
    words are held against no image. A sample whose codes are all zero has no most activated one.
    Traces under jit and vmap.
    """
    xp = jnp if is_traced(activations) else np
    codes = xp.asarray(activations)
    K = codes.shape[1]
    first = xp.where((codes != 0).any(axis=1), codes.argmax(axis=1), K)
    found = jnp.bincount(first, length=K + 1) if xp is jnp else np.bincount(first, minlength=K + 1)
    return found[:K] == 0
