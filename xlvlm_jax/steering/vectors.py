"""Computes steering vectors from states, and saves and loads them; `ports.steer` applies them.

From "Analyzing Fine-tuning Representation Shift for Multimodal LLMs Steering" (Khayatan et al.,
ICCV 2025, section 5). N, M samples, D width, K concepts.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from ports.intervene.edits import Edit, add
from ports.tables import kind
from xlvlm_jax.concepts.decomposition import decompose
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.concepts.removal import concept_directions
from xlvlm_jax.features.manifest import module_of
from xlvlm_jax.metrics.most_activated import NONE
from xlvlm_jax.solvers import sums
from xlvlm_jax.steering import files
from xlvlm_jax.steering.site_steering import SiteSteering
from xlvlm_jax.storage.same_model import ADAPTER, MODEL

Array = jax.Array | np.ndarray
MANY = 1000  # concepts, more than which are not written unless they are named


def steering_vector(source: Float[Array, "N D"], target: Float[Array, "M D"]) -> Float[Array, " D"]:
    """Returns the coarse vector: mean of the target states minus mean of the source states.

    Works under jit, vmap and grad.

    Args:
        source: float[N, D], states to steer from.
        target: float[M, D], states to steer to.

    Returns:
        float32[D], with an error that does not grow with N; float64[D] for float64 states, if x64
        is enabled.

    Raises:
        ValueError: there are no states, or their widths differ.

    Examples:
        >>> import numpy as np, xlvlm_jax
        >>> source, target = np.float32([[0, 0], [2, 0]]), np.float32([[1, 5]])
        >>> xlvlm_jax.steering_vector(source, target).tolist()
        [0.0, 5.0]
    """
    source, target = jnp.asarray(source), jnp.asarray(target)
    if source.ndim != 2 or target.ndim != 2 or source.shape[1] != target.shape[1]:
        raise ValueError(
            f"source and target states have shapes {source.shape} and {target.shape}; expected "
            "[N, D] and [M, D]"
        )
    if not len(source) or not len(target):
        raise ValueError(
            f"there are {len(source)} source and {len(target)} target states; expected at least "
            "one of each"
        )
    return _difference_of_means(source, target)


@jax.jit
def _difference_of_means(source: jax.Array, target: jax.Array) -> jax.Array:
    ends, begins = sums.column_means(target), sums.column_means(source)
    # High and low parts separately, so that a common offset costs no precision.
    return (ends.high - begins.high) + (ends.low - begins.low)


class FineVectors(NamedTuple):
    """Vectors from one concept of the source states to another.

    Attributes:
        vectors: float32[K, K, D]; vectors[i, j] points from concept i to concept j.
        assignment: int[N], the concept that each source state belongs to; -1 for a state that
            activates none, as states of sparse codes may.
        concepts: the decomposition of the source states.
    """

    vectors: Array
    assignment: Int[Array, " N"]
    concepts: Concepts

    def __repr__(self) -> str:
        return f"FineVectors({kind(self.vectors)}; {self.concepts})"

    def samples(self, concept: int) -> Int[np.ndarray, " n"]:
        """Returns the source samples to steer with vectors[concept, :]."""
        return np.flatnonzero(np.asarray(self.assignment) == concept)


def fine_vectors(
    source: Float[Array, "N D"], num_concepts: int, *, key: jax.Array, method: str = "kmeans"
) -> FineVectors:
    """Returns the fine vectors: centroid_j - centroid_i of k-means on the source states.

    Works under jit (num_concepts static) and vmap, as `decompose` does.

    Args:
        source: float[N, D], states of the samples to steer.
        num_concepts: K.
        key: PRNG key of the decomposition.
        method: another decomposition, whose components take the centroids' place; a sample belongs
            to its most active one, and to none if all its activations are zero.

    Returns:
        The vectors and the clustering.

    Raises:
        ValueError: as `decompose`.

    Examples:
        >>> import jax, numpy as np, xlvlm_jax
        >>> states = np.float32([[0, 1], [0, 2], [3, 0], [5, 0]])
        >>> found = xlvlm_jax.fine_vectors(states, 2, key=jax.random.key(0))
        >>> i, j = found.assignment[0], found.assignment[2]
        >>> found.vectors[i, j].tolist()
        [4.0, -1.5]
    """
    concepts = decompose(source, num_concepts, method, key=key)
    centroids, codes = jnp.asarray(concepts.components), jnp.asarray(concepts.activations)
    return FineVectors(
        vectors=centroids[None] - centroids[:, None],
        assignment=jnp.where(jnp.any(codes != 0, axis=1), jnp.argmax(codes, axis=1), NONE),
        concepts=concepts,
    )


@dataclasses.dataclass(frozen=True, repr=False)
class SteeringVector(SiteSteering):
    """A steering vector and how to use it. Vectors of one site and model can be added and scaled.

    A vector that does not say which model it is of, such as an imported one, can be added to any.

    Attributes:
        vector: float32[D].
        site: the site whose states it is added to.
        source: how and on what it was fitted, as JSON values; "model" and "fingerprint" identify
            the checkpoint.
        where: the token positions it is meant for, see `ports.add`.

    Examples:
        >>> import numpy as np, xlvlm_jax
        >>> vector = 2.0 * xlvlm_jax.SteeringVector(np.float32([0, 1]), "layers.3")
        >>> vector.edits(alpha=3.0)["layers.3"](np.zeros((1, 2), "float32")).tolist()
        [[0.0, 6.0]]
    """

    KIND = "vector"
    TENSORS = ("vector",)

    vector: Float[Array, " D"]
    site: str
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    where: Any = "all"

    def __repr__(self) -> str:
        return f"SteeringVector({kind(self.vector)} at {self.site!r}, where={self.where!r})"

    def _repr_html_(self) -> str:
        norm = float(np.linalg.norm(np.asarray(self.vector)))
        return files.as_html(self, width=len(self.vector), norm=f"{norm:.4g}")

    def edits(self, alpha: Any = 1.0, where: Any = None) -> dict[str, Edit]:
        """Returns the edits that `VLM.generate` takes.

        Args:
            alpha: the strength, see `ports.add`.
            where: the token positions; None for those it is meant for.

        Returns:
            {site: edit}.
        """
        return {self.site: add(self.vector, alpha, self.where if where is None else where)}

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        for name, ours, theirs in (
            ("site", self.site, other.site),
            ("where", files.plain(self.where), files.plain(other.where)),
            ("width", len(self.vector), len(other.vector)),
        ):
            if ours != theirs:
                raise ValueError(
                    f"cannot add vectors of {name} {ours} and {theirs}; expected the same {name}"
                )
        sources = [self.source, other.source]
        source = {**files.common_model(sources, "add"), "sum of": sources}
        return dataclasses.replace(self, vector=self.vector + other.vector, source=source)

    def __mul__(self, factor: float) -> "SteeringVector":
        source = {**self.source, "scaled by": factor * self.source.get("scaled by", 1.0)}
        return dataclasses.replace(self, vector=np.float32(factor) * self.vector, source=source)

    __rmul__ = __mul__


def load_vectors(directory: Path) -> dict[Path, SteeringVector]:
    """Reads the vectors of a directory, such as `xlvlm steer fit --method fine` writes.

    Args:
        directory: the directory.

    Returns:
        {file: vector}, in the order of the files' names.

    Raises:
        ValueError: there are none, or a file holds something else.
    """
    paths = sorted(directory.glob("*.safetensors")) if directory.is_dir() else []
    if not paths:
        raise ValueError(
            f"{directory} holds no vectors; fit some with `xlvlm steer fit --method fine`"
        )
    return {path: SteeringVector.load(path) for path in paths}


def shift_vectors(
    shifts: Float[Array, "K D"],
    counts: Int[Array, " K"],
    site: str,
    source: Mapping[str, Any],
    where: Any = "all",
) -> dict[str, SteeringVector]:
    """Returns the shifts of concepts as vectors that steer the original model.

    Runs on the host and cannot be traced.

    Args:
        shifts: float32[K, D], such as `ShiftAnalysis.shifts`.
        counts: the number of samples that each comes from; a concept with fewer than two has none.
        site: the site whose states they are of.
        source: what the shifts come from; "model", "fingerprint" and "adapter fingerprint" say of
            which model.
        where: the token positions that the vectors are meant for, see `ports.add`.

    Returns:
        {"concept-3": vector}.

    Raises:
        ValueError: no concept has a shift.
    """
    common = {name: source[name] for name in MODEL if name in source}
    vectors = {}
    for k, (shift, rows) in enumerate(zip(np.asarray(shifts), counts, strict=True)):
        if rows >= 2:
            told = {**common, "method": "shift", "concept": k, "rows": int(rows)}
            vectors[f"concept-{k}"] = SteeringVector(shift, site, told, where)
    if not vectors:
        raise ValueError("no concept has a shift; analyse more samples with `xlvlm shift`")
    return vectors


def concept_vectors(
    concepts: Concepts,
    chosen: Sequence[int | tuple[int, int]] | None = None,
    *,
    site: str | None = None,
    where: Any = "all",
) -> dict[str, SteeringVector]:
    """Returns concepts of any dictionary as steering vectors, and vectors from one to another.

    Runs on the host and cannot be traced.

    Args:
        concepts: found by any method of `decompose`, or the features of a sparse autoencoder.
        chosen: numbers of concepts, and pairs (i, j) for the way from concept i to concept j; None
            for every concept that is not dead.
        site: the site to steer; None for that of the concepts.
        where: the token positions that the vectors are meant for, see `ports.add`.

    Returns:
        {"concept-3": the direction of concept 3, "concept-3-5": component 5 minus component 3}.
        Directions are components; of centroids, their difference from the mean centroid.

    Raises:
        ValueError: the site is unknown, there is no such concept, a pair is of one concept, or
            there are too many concepts to write every one.

    Examples:
        >>> import numpy as np, xlvlm_jax
        >>> concepts = xlvlm_jax.Concepts.from_components(np.float32([[1, 0], [0, 3]]), "snmf")
        >>> found = xlvlm_jax.steering.concept_vectors(concepts, [1, (0, 1)], site="layers.3")
        >>> {name: vector.vector.tolist() for name, vector in found.items()}
        {'concept-1': [0.0, 3.0], 'concept-0-1': [-1.0, 3.0]}
    """
    site = site or concepts.source.get("site")
    if site is None:
        raise ValueError("the concepts do not name their site; give the one to steer")
    site = module_of(site)  # that of either model
    components, count = np.asarray(concepts.components, np.float32), len(concepts.components)
    if chosen is None:
        if count > MANY:
            raise ValueError(f"there are {count} concepts; name those to steer with")
        chosen = [int(k) for k in np.flatnonzero(~concepts.dead)]
    known = {name: concepts.source[name] for name in MODEL if name in concepts.source}
    # No adapter is known too.
    common = {k: v for k, v in known.items() if v is not None or k == ADAPTER}
    common |= {"method": "concept", "decomposition": concepts.method}
    directions = concept_directions(concepts)
    vectors = {}
    for each in chosen:
        pair = each if isinstance(each, tuple) else (each,)
        if len(set(pair)) < len(pair) or not all(0 <= k < count for k in pair):
            raise ValueError(
                f"got concept {':'.join(map(str, pair))}; expected a number from 0 to {count - 1}, "
                "or two different ones"
            )
        told = {"from": pair[0], "to": pair[1]} if len(pair) > 1 else {"concept": pair[0]}
        vector = directions[pair[0]] if len(pair) < 2 else components[pair[1]] - components[pair[0]]
        name = f"concept-{'-'.join(map(str, pair))}"
        vectors[name] = SteeringVector(vector, site, common | told, where)
    return vectors
