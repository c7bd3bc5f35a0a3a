"""Edits that depend on the state: how far it lies along a vector, and what it is similar to.

B batch, T positions, K keys, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ports.intervene.edits import Edit, make_edit, unit

Array = jax.Array


def _add_adaptive(x: Array, arrays: tuple[Array, Array], alpha: Array, _: Any) -> Array:
    vector, reference = arrays
    direction = unit(vector)
    missing = jnp.sum((reference - x) * direction, axis=-1, keepdims=True)
    return x + alpha * jax.nn.relu(missing) * direction


def add_adaptive(vector: Any, reference: Any, alpha: Any = 1.0, where: Any = "all") -> Edit:
    """Moves states along a vector by as much as they fall short of a reference state.

        states + alpha max(0, <reference - states, u>) u        u = vector / |vector|

    Strength 1 moves every state that lies before the reference up to it, 0.5 half of the way;
    states beyond it stay. Works under jit, vmap and grad; its arguments may be traced.

    Args:
        vector: float[D], the direction to move in; its length does not matter.
        reference: float[D], the state to reach, such as the mean state of the wanted answers.
        alpha: the strength, a number or float[B].
        where: the positions to edit, as for `add`.

    Returns:
        The edit.

    Raises:
        ValueError: as for `add`, or vector and reference are not both [D].

    Wang et al. 2025, "Steering Away from Harm" (ASTRA, arXiv 2411.16721), whose vector points away
    from what is wanted, so that the signs are opposite, and whose reference is called calibration.

    Examples:
        >>> import jax.numpy as jnp, ports
        >>> edit = ports.add_adaptive([0.0, 2.0], reference=[9.0, 3.0])
        >>> edit(jnp.array([[1.0, 1.0], [1.0, 4.0]])).tolist()
        [[1.0, 3.0], [1.0, 4.0]]
    """
    if np.ndim(vector) != 1 or np.shape(reference) != np.shape(vector):
        raise ValueError(
            f"vector and reference have shapes {np.shape(vector)} and {np.shape(reference)}; "
            "expected [D] and [D]"
        )
    return make_edit(_add_adaptive, (jnp.asarray(vector), jnp.asarray(reference)), alpha, where)


def _add_if_similar(
    x: Array, arrays: tuple[Array, Array, Array, Array], alpha: Array, _: Any
) -> Array:
    vectors, keys, threshold, center = arrays
    found = similarities(x, keys, center)
    best = jnp.argmax(found, axis=-1)
    passes = jnp.max(found, axis=-1) >= threshold[best]
    return x + alpha * jnp.where(passes[..., None], vectors[best], 0)


def similarities(
    states: Array | np.ndarray, keys: Array | np.ndarray, center: Array | np.ndarray
) -> Array:
    """Returns the cosines between centred states and centred keys.

    Args:
        states: float[..., D].
        keys: float[K, D].
        center: float[D], taken off both.

    Returns:
        float[..., K], from -1 to 1; 0 for a state or key at the center.
    """
    left, right = (unit(jnp.asarray(x) - center) for x in (states, keys))
    # Rounding leads a little beyond 1 and -1, the least threshold, which lets every state pass.
    return jnp.clip(jnp.matmul(left, right.T, precision="highest"), -1, 1)


def add_if_similar(
    vectors: Any,
    keys: Any,
    threshold: Any = 0.0,
    *,
    center: Any = None,
    alpha: Any = 1.0,
    where: Any = "all",
) -> Edit:
    """Adds to each state the vector whose key it is most similar to, if it is similar enough.

        states + alpha [cos_k >= threshold_k] vector_k
            cos_j = <states - center, key_j - center> / norms,  k = argmax_j cos_j

    One key makes a gate (conditional steering); several are a memory that vectors are retrieved
    from. Each position decides for itself. Works under jit, vmap and grad; its arguments may be
    traced. The gate is a step, without a gradient.

    Args:
        vectors: float[K, D], or float[D] for a single one.
        keys: float[K, D] or float[D], the states to be similar to.
        threshold: the least cosine, a number or float[K]; -1 always adds.
        center: float[D], taken off states and keys, such as the mean state, without which all
            states are similar; None for zero.
        alpha: the strength, a number or float[B].
        where: the positions to edit, as for `add`.

    Returns:
        The edit.

    Raises:
        ValueError: as for `add`, or the shapes do not fit together.

    Lee et al. 2024, "Programming Refusal with Conditional Activation Steering" (CAST, arXiv
    2409.05907), where one comparison with the prompt decides for all positions; Yin et al. 2026,
    "Dynamic Multimodal Activation Steering" (arXiv 2602.21704), where questions are compared by
    their text.

    Examples:
        >>> import jax.numpy as jnp, ports
        >>> edit = ports.add_if_similar([0.0, 5.0], keys=[1.0, 0.0], threshold=0.9)
        >>> edit(jnp.array([[2.0, 0.0], [0.0, 2.0]])).tolist()
        [[2.0, 5.0], [0.0, 2.0]]
    """
    vectors, keys = (jnp.atleast_2d(jnp.asarray(rows)) for rows in (vectors, keys))
    center = jnp.zeros(keys.shape[-1:]) if center is None else jnp.asarray(center)
    threshold = jnp.asarray(threshold, float)
    fits = vectors.ndim == 2 and vectors.shape == keys.shape and center.shape == keys.shape[1:]
    if not fits or threshold.shape not in ((), keys.shape[:1]):
        raise ValueError(
            f"vectors, keys, center and threshold have shapes {vectors.shape}, {keys.shape}, "
            f"{center.shape} and {threshold.shape}; expected [K, D], [K, D], [D], and a number or "
            "[K]"
        )
    threshold = jnp.broadcast_to(threshold, keys.shape[:1])
    return make_edit(_add_if_similar, (vectors, keys, threshold, center), alpha, where)
