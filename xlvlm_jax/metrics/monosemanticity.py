"""Monosemanticity: whether the images that activate a concept are similar.

With unit vectors e_n of the images (of CLIP, or another encoder) and the activations of a concept
scaled to [0, 1] over the samples, a_n = (u_n - min u) / (max u - min u), its score is the mean
similarity of two images, weighted by how strongly both activate it:

    sum over n < m of a_n a_m cos(e_n, e_m)  /  sum over n < m of a_n a_m

(Pach et al. 2025, "Sparse autoencoders learn monosemantic features in vision-language models",
section 3.2). The sums over pairs are computed from sums over samples, 2 sum over n < m of x_n x_m =
|sum of x_n|^2 - sum of |x_n|^2. N samples, K concepts, E width.
"""

import jax
import numpy as np
from jaxtyping import Float

from xlvlm_jax.metrics.precision import Figure, as_figure, as_real, column_means
from xlvlm_jax.solvers import sums

AnyArray = jax.Array | np.ndarray


def monosemanticity(
    activations: Float[AnyArray, "N K"], images: Float[AnyArray, "N E"]
) -> Float[AnyArray, " K"]:
    """Returns the score of each concept, in [-1, 1]; NaN if fewer than two samples activate it.

    Works under jit, vmap and grad.

    Args:
        activations: float[N, K], of any sign.
        images: float[N, E], unit vectors of the samples' images. Pass only one sample per image, or
            copies count as similar images.

    Raises:
        ValueError: they do not both have N rows.
    """
    xp, (codes, vectors) = as_real(activations, images)
    if len(codes) != len(vectors):
        raise ValueError(
            f"activations of {len(codes)} samples but {len(vectors)} images; expected one per "
            "sample"
        )
    low, high = codes.min(axis=0), codes.max(axis=0)
    weights = (codes - low) / xp.where(high > low, high - low, 1)
    N = len(codes)
    squares = N * column_means(weights**2)
    together = weights.T @ vectors if xp is np else sums.weighted(weights.T, vectors).value
    similar = xp.sum(together**2, axis=1) - squares
    pairs = (N * column_means(weights)) ** 2 - squares
    # For a single sample this is a difference of equal numbers.
    enough = pairs > (1e-9 if xp is np else 1e-5) * xp.maximum(squares, 1)
    return xp.where(enough, similar / xp.where(enough, pairs, 1), xp.nan)


def mean_similarity(images: Float[AnyArray, "N E"]) -> Figure:
    """Returns the mean cosine of two images: the score of a concept that all activate equally.

    Works under jit, vmap and grad.

    Args:
        images: float[N, E], unit vectors.

    Raises:
        ValueError: there are fewer than two images.
    """
    xp, (images,) = as_real(images)
    N = len(images)
    if N < 2:
        raise ValueError(f"similarity needs two images or more, got {N}")
    return as_figure((N * xp.sum(column_means(images) ** 2) - 1) / (N - 1))
