"""Steering that depends on the state: by as much as it lacks, only where it is like another, or
with the vector of what it is most like.

From "Steering Away from Harm" (ASTRA, Wang et al. 2025), "Programming Refusal with Conditional
Activation Steering" (CAST, Lee et al. 2024) and "Dynamic Multimodal Activation Steering" (DMAS, Yin
et al. 2026); what differs from them is said where it does. With s_i the source states, t_j the
target states and o_k the other states of the features:

    adaptive     u along mean(t) - mean(s), up to the mean target state     ports.add_adaptive
    conditional  mean(t) - mean(s), where states are like source states     ports.add_if_similar
    memory       the mean difference within the cluster of the state        ports.add_if_similar

N, M states, K keys, D width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from ports.intervene.adaptive_edits import add_adaptive, add_if_similar, similarities
from ports.intervene.edits import Edit
from xlvlm_jax.concepts.decomposition import decompose
from xlvlm_jax.features.manifest import module_of
from xlvlm_jax.features.reader import Features
from xlvlm_jax.steering.fit import answer_states
from xlvlm_jax.steering.site_steering import SiteSteering
from xlvlm_jax.steering.vectors import steering_vector

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True, repr=False)
class AdaptiveVector(SiteSteering):
    """A vector that moves each state by as much as it falls short of a reference.

    Attributes:
        vector: float32[D].
        reference: float32[D], the state to reach along the vector.
        site, source, where: see `SiteSteering`.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import steering
        >>> short = steering.AdaptiveVector(np.float32([0, 2]), np.float32([9, 3]), "layers.3")
        >>> short.edits()["layers.3"](np.float32([[1, 1], [1, 4]])).tolist()
        [[1.0, 3.0], [1.0, 4.0]]
    """

    KIND = "adaptive vector"
    TENSORS = ("vector", "reference")

    vector: Float[Array, " D"]
    reference: Float[Array, " D"]
    site: str
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    where: Any = "all"

    def edits(self, alpha: Any = 1.0, where: Any = None) -> dict[str, Edit]:
        """Returns the edits that `VLM.generate` takes, see `ports.add_adaptive`.

        Args:
            alpha: the strength, as a share of what a state lacks.
            where: the token positions; None for those it is meant for.

        Returns:
            {site: edit}.

        Raises:
            ValueError: as for `ports.add_adaptive`.
        """
        where = self.where if where is None else where
        return {self.site: add_adaptive(self.vector, self.reference, alpha, where)}


@dataclasses.dataclass(frozen=True, repr=False)
class VectorMemory(SiteSteering):
    """Vectors by keys: each state gets the vector of the key that it is most similar to.

    Attributes:
        vectors: float32[K, D].
        keys: float32[K, D].
        threshold: float32[K], the least cosine for which a vector is added.
        center: float32[D], taken off states and keys.
        site, source, where: see `SiteSteering`.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import steering
        >>> vectors, keys = np.float32([[0, 5], [7, 0]]), np.float32([[1, 0], [0, 1]])
        >>> memory = steering.VectorMemory(vectors, keys, np.float32([0, 0]), keys[0] * 0, "norm")
        >>> memory.edits()["norm"](np.float32([[2, 0], [1, 3]])).tolist()
        [[2.0, 5.0], [8.0, 3.0]]
    """

    KIND = "vector memory"
    TENSORS = ("vectors", "keys", "threshold", "center")

    vectors: Float[Array, "K D"]
    keys: Float[Array, "K D"]
    threshold: Float[Array, " K"]
    center: Float[Array, " D"]
    site: str
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    where: Any = "all"

    def edits(self, alpha: Any = 1.0, where: Any = None) -> dict[str, Edit]:
        """Returns the edits that `VLM.generate` takes, see `ports.add_if_similar`.

        Args:
            alpha: the strength.
            where: the token positions; None for those it is meant for.

        Returns:
            {site: edit}.

        Raises:
            ValueError: as for `ports.add_if_similar`.
        """
        where = self.where if where is None else where
        options: dict[str, Any] = {"center": self.center, "alpha": alpha, "where": where}
        return {self.site: add_if_similar(self.vectors, self.keys, self.threshold, **options)}


def fit_adaptive(
    features: Features,
    site: str,
    source: Sequence[str] | None,
    target: Sequence[str] | None = None,
    *,
    where: Any = "all",
    **chosen: Any,
) -> AdaptiveVector:
    """Fits the coarse vector, to be added up to the mean target state (ASTRA).

    ASTRA finds its vector by masking parts of adversarial pictures; here it is mean(t) - mean(s).
    Its reference is the mean over ordinary questions; here it is mean(t).

    Runs on the host and cannot be traced.

    Args:
        features, site, source, target: as for `answer_states`.
        where: the token positions that it is meant for, stored with it.
        chosen: further arguments of `answer_states`.

    Returns:
        The vector and its reference.

    Raises:
        ValueError: as `answer_states`.
    """
    states = answer_states(features, site, source, target, **chosen)
    vector = np.asarray(steering_vector(states.source, states.target))
    reference = _mean(states.target)
    described = states.described | {"method": "adaptive"}
    return AdaptiveVector(vector, reference, module_of(site), described, where)


def fit_conditional(
    features: Features,
    site: str,
    source: Sequence[str] | None,
    target: Sequence[str] | None = None,
    *,
    threshold: float | None = None,
    where: Any = "all",
    **chosen: Any,
) -> VectorMemory:
    """Fits the coarse vector with a gate: it is added only to states that are like source states.

    The gate compares a state with the mean source state by their cosine, both seen from the mean of
    all states. CAST takes the cosine of a state and its projection on the first principal direction
    of differences instead, at one position for the whole answer; here every position decides.

    Runs on the host and cannot be traced.

    Args:
        features, site, source, target: as for `answer_states`.
        threshold: the least cosine; None for the one that best separates source states from all
            others of the features (largest mean of the two shares that are right).
        where: the token positions that it is meant for, stored with it.
        chosen: further arguments of `answer_states`.

    Returns:
        A memory with one key; `source["gate accuracy"]` is the mean of the two shares.

    Raises:
        ValueError: as `answer_states`, the features hold source states only, or the threshold is
            not a cosine.
    """
    if threshold is not None:
        _require_cosine(threshold)
    states = answer_states(features, site, source, target, **chosen)
    every = features.matrix(site)
    is_source = np.isin(np.arange(len(every)), states.source_rows)
    if is_source.all():
        raise ValueError(
            f"all {len(every)} states at {site!r} are source states; expected others too, which "
            "the gate keeps out: name the source answers"
        )
    center = _mean(every)
    key = _mean(every[is_source])[None]
    found = np.asarray(similarities(every, key, center))[:, 0]
    best = best_threshold(found, is_source) if threshold is None else threshold
    passes = found >= best
    accuracy = (np.mean(passes[is_source]) + np.mean(~passes[~is_source])) / 2
    vector = np.asarray(steering_vector(states.source, states.target))
    told = {"method": "conditional", "threshold": float(best), "gate accuracy": float(accuracy)}
    least = np.full(1, best, np.float32)
    at, described = module_of(site), states.described | told
    return VectorMemory(vector[None], key, least, center, at, described, where)


def best_threshold(values: Float[np.ndarray, " N"], wanted: Bool[np.ndarray, " N"]) -> float:
    """Returns the threshold that separates two groups best.

    Args:
        values: float[N], cosines.
        wanted: bool[N], the group whose values are to be at least the threshold.

    Returns:
        The threshold, midway between two values, for which the mean of the two groups' shares on
        the right side is largest; the smallest one if several are as good. -1, which every cosine
        passes, if none keeps more of the others out than it loses.
    """
    order = np.argsort(values, kind="stable")
    rises, is_wanted = values[order].astype(np.float64), wanted[order]
    # If the threshold lies just above the i-th value: the shares that are below it.
    lost = np.cumsum(is_wanted) / max(is_wanted.sum(), 1)
    kept_out = np.cumsum(~is_wanted) / max((~is_wanted).sum(), 1)
    # Equal values are on the same side.
    between = rises[1:] > rises[:-1]
    gains = np.where(between, (kept_out - lost)[:-1], -np.inf)
    if not between.any() or gains.max() <= 0:
        return -1.0  # nothing is kept out
    best = int(np.argmax(gains))
    return float((rises[best] + rises[best + 1]) / 2)


def fit_memory(
    features: Features,
    site: str,
    source: Sequence[str] | None,
    target: Sequence[str] | None = None,
    *,
    num_keys: int = 8,
    threshold: float = -1.0,
    seed: int = 0,
    where: Any = "all",
    **chosen: Any,
) -> VectorMemory:
    """Fits a memory of vectors: within each cluster of states, the difference of the means.

    Source and target states are clustered together by k-means; the keys are the centroids, and
    similarity is the cosine seen from the mean of both. A cluster without source or without target
    states gets the coarse vector. DMAS clusters questions by an embedding of their text, contrasts
    true and false answers within each cluster, and steers attention heads; clustering the states
    themselves needs no second model.

    Runs on the host and cannot be traced.

    Args:
        features, site, source, target: as for `answer_states`.
        num_keys: K, number of clusters.
        threshold: the least cosine for which a vector is added; -1 always adds.
        seed: random seed of the clusters.
        where: the token positions that it is meant for, stored with it.
        chosen: further arguments of `answer_states`.

    Returns:
        The memory; `source["states per key"]` holds the numbers of source and target states.

    Raises:
        ValueError: as `answer_states`, there are fewer states than clusters, or the threshold is
            not a cosine.
    """
    _require_cosine(threshold)
    states = answer_states(features, site, source, target, **chosen)
    both = np.concatenate([states.source, states.target])
    if not 1 <= num_keys <= len(both):
        raise ValueError(
            f"num_keys is {num_keys}; expected 1 to {len(both)}, the number of source and target "
            "states"
        )
    is_target = np.arange(len(both)) >= len(states.source)
    found = decompose(both, num_keys, "kmeans", key=jax.random.key(seed))
    cluster = np.asarray(found.activations).argmax(axis=1)
    coarse = np.asarray(steering_vector(states.source, states.target))
    vectors, counts = np.tile(coarse, (num_keys, 1)), []
    for k in range(num_keys):
        groups = both[(cluster == k) & ~is_target], both[(cluster == k) & is_target]
        counts.append([len(group) for group in groups])
        if all(counts[-1]):
            vectors[k] = np.asarray(steering_vector(*groups))
    told = {"method": "memory", "seed": seed, "states per key": counts}
    return VectorMemory(
        vectors,
        np.asarray(found.components, np.float32),
        np.full(num_keys, threshold, np.float32),
        _mean(both),
        module_of(site),
        states.described | told,
        where,
    )


def _require_cosine(threshold: float) -> None:
    if not -1 <= threshold <= 1:  # NaN, too, would let no state pass
        raise ValueError(f"threshold is {threshold}; expected a cosine, from -1 to 1")


def _mean(states: Float[Array, "N D"]) -> Float[np.ndarray, " D"]:
    return np.asarray(np.mean(np.asarray(states), axis=0, dtype=np.float64), np.float32)
