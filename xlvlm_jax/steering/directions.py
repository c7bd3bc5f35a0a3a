"""Directions that tell two groups of states apart: PCA of differences, LAT, linear probe.

With s_i the source states, t_j the target states and delta = mean(t) - mean(s), each method finds a
unit direction u, and returns the part of delta along it:

    vector = <delta, u> u

so that strength 1 moves the mean source state as far along u as the mean target state, whatever the
method, and towards the target whatever the sign of u.

    pca    u maximises sum over pairs (i, j) of <t_j - s_i, u>^2
    lat    u is the first principal component of randomly paired differences, half with sign -1
    probe  u = w / |w| of a logistic regression w that tells target from source states

N, M states, P pairs, D width.
"""

import jax
import numpy as np
from jaxtyping import Float

from xlvlm_jax.concepts.decomposition import decompose
from xlvlm_jax.steering.vectors import steering_vector

Array = jax.Array | np.ndarray


def principal_direction(differences: Float[Array, "P D"]) -> Float[Array, " D"]:
    """Returns the unit vector u that maximises the sum of <difference, u>^2.

    Not centred: what all differences share counts. Runs on the host and cannot be traced.

    Args:
        differences: float[P, D].

    Returns:
        float32[D], of arbitrary sign.

    Raises:
        ValueError: there are no differences, or all are zero.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import steering
        >>> abs(steering.principal_direction(np.float32([[3, 0], [4, 0], [0, 1]]))).tolist()
        [1.0, 0.0]
    """
    rows = np.asarray(differences, np.float32)
    if rows.ndim != 2 or not rows.any():
        raise ValueError(
            f"the differences have shape {rows.shape}, of which {np.count_nonzero(rows)} entries "
            "differ from zero; expected [P, D] with two groups of states that differ"
        )
    # Together with their negatives they have mean zero, so that centring changes nothing.
    both = np.concatenate([rows, -rows])
    return decompose(both, 1, "pca", key=jax.random.key(0)).components[0]


def pca_vector(
    source: Float[Array, "N D"],
    target: Float[Array, "M D"],
    pairs: Float[Array, "P D"] | None = None,
) -> Float[Array, " D"]:
    """Returns the vector along the first principal direction of the differences, not centred.

    Without pairs, the differences are those of every source state with every target state; their
    second moments are cov(s) + cov(t) + delta delta^T, so that they need not be formed.

    Runs on the host and cannot be traced.

    Args:
        source: float[N, D], states to steer from.
        target: float[M, D], states to steer to.
        pairs: float[P, D], differences target - source of what belongs together, such as the
            states of one sample in two models.

    Returns:
        float32[D], see the head of this file.

    Raises:
        ValueError: as `steering_vector`, or the two groups have the same mean.

    Zou et al. 2023 (arXiv 2310.01405), section 3.1; Liu et al. 2023 (arXiv 2311.06668) for pairs.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import steering
        >>> source, target = np.float32([[0, -1], [0, 1]]), np.float32([[5, -1], [5, 1]])
        >>> abs(steering.pca_vector(source, target)).round(3).tolist()
        [5.0, 0.0]
    """
    delta = _apart(source, target)
    if pairs is None:
        centred = [
            (np.asarray(x, np.float32) - np.mean(x, axis=0, dtype=np.float64)) / len(x) ** 0.5
            for x in (source, target)
        ]
        pairs = np.concatenate([*centred, delta[None]])
    return along(delta, principal_direction(pairs))


def lat_vector(
    source: Float[Array, "N D"], target: Float[Array, "M D"], *, seed: int = 0
) -> Float[Array, " D"]:
    """Returns the vector of linear artificial tomography (LAT, representation reading).

    Source and target states are paired at random, the smaller group more than once; a random half
    of the differences gets the sign -1 (of an odd number, one less than the others); u is the first
    principal component of the differences (centred, as in the authors' code), or the difference, if
    there is one alone.

    Runs on the host and cannot be traced.

    Args:
        source: float[N, D], states to steer from.
        target: float[M, D], states to steer to.
        seed: random seed of the pairs and signs.

    Returns:
        float32[D], see the head of this file.

    Raises:
        ValueError: as `steering_vector`, or the two groups have the same mean.

    Zou et al. 2023, "Representation Engineering" (arXiv 2310.01405), section 3.1. There, each sign
    is drawn by itself: of few pairs all may have one, and centring then removes what they share.
    The differences are scaled to unit length in some experiments there; here never.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import steering
        >>> source, target = np.float32([[0, -1], [0, 1]] * 8), np.float32([[5, -1], [5, 1]] * 8)
        >>> abs(steering.lat_vector(source, target)).round(0).tolist()
        [5.0, 0.0]
    """
    delta = _apart(source, target)
    differences = random_differences(source, target, seed=seed)
    if len(differences) == 1:
        return delta
    return along(delta, decompose(differences, 1, "pca", key=jax.random.key(seed)).components[0])


def random_differences(
    source: Float[Array, "N D"], target: Float[Array, "M D"], *, seed: int = 0
) -> Float[np.ndarray, "P D"]:
    """Returns the differences of randomly paired states, a random half of them with the sign -1.

    Args:
        source: float[N, D].
        target: float[M, D].
        seed: random seed.

    Returns:
        float32[max(N, M), D]; each state of the larger group is in one of them.
    """
    rng = np.random.default_rng(seed)
    pairs = max(len(source), len(target))
    chosen = [np.resize(rng.permutation(len(x)), pairs) for x in (source, target)]
    # As many of each, or all but: otherwise their mean would have a part of the common difference,
    # and centring would take it off.
    signs = rng.permutation(np.resize(np.array([1, -1], np.float32), pairs))[:, None]
    return signs * (np.asarray(target)[chosen[1]] - np.asarray(source)[chosen[0]])


def probe_vector(
    source: Float[Array, "N D"], target: Float[Array, "M D"], *, penalty: float = 1.0
) -> Float[Array, " D"]:
    """Returns the vector along the normal of a linear probe.

        minimise over w, b   sum_i c_i log(1 + exp(-y_i (<w, x_i> + b))) + penalty |w|^2 / 2

    over source (y = -1) and target states (y = 1), in units of their standard deviation (over all
    entries), so that the penalty means the same at every site; c_i weighs the two groups alike.

    Runs on the host and cannot be traced.

    Args:
        source: float[N, D], states to steer from.
        target: float[M, D], states to steer to.
        penalty: weight of the squared norm.

    Returns:
        float32[D], see the head of this file.

    Raises:
        ValueError: as `steering_vector`, the penalty is not positive, all states are equal, or the
            two groups have the same mean.

    Alain and Bengio 2016 (arXiv 1610.01644) for probes; Li et al. 2023 (arXiv 2306.03341) for
    steering along their normals.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import steering
        >>> source, target = np.float32([[0, -1], [0, 1]]), np.float32([[5, -1], [5, 1]])
        >>> abs(steering.probe_vector(source, target)).round(3).tolist()
        [5.0, 0.0]
    """
    from sklearn.linear_model import LogisticRegression

    if not penalty > 0:
        raise ValueError(f"penalty is {penalty}; expected a positive number")
    delta = np.asarray(steering_vector(source, target), np.float32)
    states = np.concatenate([np.asarray(source), np.asarray(target)]).astype(np.float64)
    states -= states.mean(axis=0)
    scale = states.std()
    if not scale:
        raise ValueError("all states are equal; expected two groups that differ")
    _require_apart(delta)
    is_target = np.arange(len(states)) >= len(source)
    probe = LogisticRegression(
        C=1 / penalty, class_weight="balanced", max_iter=10_000, tol=1e-6
    ).fit(states / scale, is_target)
    normal = probe.coef_[0]
    length = np.linalg.norm(normal)
    if not length:  # the penalty outweighs what tells them apart
        raise ValueError(
            f"the normal of the probe is zero with penalty {penalty}; lower it, or choose groups "
            "that differ more"
        )
    return along(delta, (normal / length).astype(np.float32))


def _apart(source: Float[Array, "N D"], target: Float[Array, "M D"]) -> Float[np.ndarray, " D"]:
    """Returns the coarse vector; raises ValueError if it is zero."""
    delta = np.asarray(steering_vector(source, target), np.float32)
    _require_apart(delta)
    return delta


def _require_apart(delta: Float[np.ndarray, " D"]) -> None:
    if not delta.any():
        raise ValueError(
            "source and target states are equal on average, so that no direction leads from one to "
            "the other; expected two groups of states that differ"
        )


def along(delta: Float[Array, " D"], direction: Float[Array, " D"]) -> Float[Array, " D"]:
    """Returns the part of delta along a unit direction."""
    delta, direction = np.asarray(delta), np.asarray(direction)
    return np.float32(np.vdot(delta.astype(np.float64), direction)) * direction
