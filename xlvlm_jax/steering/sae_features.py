"""Steering with features of a sparse autoencoder: add their decoder rows, or clamp their codes.

    sae        states + alpha sum_k d_k row_k
    sae-clamp  states + alpha (decode(codes') - decode(codes)),  codes' = codes but codes'_k = c_k

over the chosen features k, with d_k = mean code of target states - mean code of source states and
c_k = mean code of target states. What the dictionary does not explain of a state stays in it: only
the difference of two reconstructions is added.

SAVE (Park et al. 2025, arXiv 2512.07730) and SSL (Hua et al. 2025, arXiv 2505.16146) steer along
decoder rows like the first; which features they take is told by questions about objects. Clamping
is from Templeton et al. 2024, "Scaling Monosemanticity". N, M states, D width, K features, F chosen
features.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ports.intervene.edits import Edit, make_edit
from xlvlm_jax.features.manifest import module_of
from xlvlm_jax.features.reader import Features
from xlvlm_jax.sae.dictionary import Dictionary, Settings
from xlvlm_jax.steering import files
from xlvlm_jax.steering.fit import AnswerStates, answer_states
from xlvlm_jax.steering.site_steering import SiteSteering
from xlvlm_jax.steering.vectors import SteeringVector

Array = jax.Array | np.ndarray
ROWS = 1024  # states that are encoded at once
# The axis of the features in each parameter.
_AXES = {
    "W_enc": 1,
    **dict.fromkeys(("W_dec", "b_enc", "threshold", "b_gate", "b_mag", "r_mag"), 0),
}
# Architectures in which the code of a feature does not depend on the other features.
_ALONE = ("standard", "jumprelu", "batchtopk", "matryoshka_batchtopk", "gated")


def _clamp(
    x: jax.Array, arrays: tuple[jax.Array, jax.Array, Dictionary], alpha: jax.Array, _: Any
) -> jax.Array:
    rows, values, encoder = arrays
    codes = encoder.encode(x)[..., : len(rows)]
    chosen = dataclasses.replace(encoder, params={**encoder.params, "W_dec": rows})
    # Decoding is affine in the codes: its derivative is the change, without cancelling the rest.
    _, change = jax.jvp(lambda codes: chosen.decode(codes, x), (codes,), (values - codes,))
    return x + alpha * change


@dataclasses.dataclass(frozen=True, repr=False)
class FeatureClamp(SiteSteering):
    """Features of a sparse autoencoder and the codes that they are set to.

    Attributes:
        dictionary: the autoencoder, with the F chosen features first; without others if these do
            not matter.
        values: float32[F], the codes to set.
        features: the numbers of the features in the whole dictionary.
        site, source, where: see `SiteSteering`.
    """

    KIND = "feature clamp"
    TENSORS = ("values",)

    dictionary: Dictionary
    values: Float[Array, " F"]
    features: tuple[int, ...]
    site: str
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    where: Any = "all"

    def edits(self, alpha: Any = 1.0, where: Any = None) -> dict[str, Edit]:
        """Returns the edits that `VLM.generate` takes.

        Args:
            alpha: the share of the way from a state's own codes to the set ones.
            where: the token positions; None for those it is meant for.

        Returns:
            {site: edit}.

        Raises:
            ValueError: as for `ports.add`.
        """
        rows = self.dictionary.params["W_dec"][: len(self.values)]
        edit = make_edit(_clamp, (rows,), alpha, self.where if where is None else where)
        # Added afterwards: a dictionary that was loaded has been checked.
        return {self.site: dataclasses.replace(edit, vector=(rows, self.values, self.dictionary))}

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with the dictionary in it."""
        params = {f"dictionary.{name}": value for name, value in self.dictionary.params.items()}
        rest = {name: getattr(self, name) for name in ("features", "site", "source", "where")}
        settings = dataclasses.asdict(self.dictionary.settings)
        files.save(path, self.KIND, {"values": self.values, **params}, rest | {"sae": settings})

    @classmethod
    def load(cls, path: str | Path) -> "FeatureClamp":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file holds something else, or NaN.
        """
        tensors, rest = files.read_as(path, cls.KIND)
        files.require_numbers(path, tensors)
        with files.assembling(path):
            values, settings = tensors.pop("values"), Settings(**rest.pop("sae"))
            params = {name.removeprefix("dictionary."): tensors[name] for name in tensors}
            features = tuple(rest.pop("features"))
            return cls(Dictionary.of(params, settings), values, features, **rest)


def clamp_features(
    dictionary: Dictionary,
    features: Sequence[int],
    values: Sequence[float] | Float[Array, " F"],
    site: str,
    source: dict[str, Any] | None = None,
    where: Any = "all",
) -> FeatureClamp:
    """Returns steering that sets the codes of some features.

    Runs on the host and cannot be traced.

    Args:
        dictionary: a sparse autoencoder of the site.
        features: numbers of F features.
        values: float[F], their codes; 0 switches a feature off.
        site: the site.
        source: where it comes from, as JSON values.
        where: the token positions that it is meant for, see `ports.add`.

    Raises:
        ValueError: a feature does not exist or is repeated, the numbers of features and values
            differ, or the dictionary does not reconstruct the states it encodes, position by
            position.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import sae, steering
        >>> params = {"W_enc": np.eye(2), "W_dec": np.eye(2), "b_enc": [-1, -1], "b_dec": [0, 0]}
        >>> dictionary = sae.Dictionary.of(params, sae.Settings("standard"))
        >>> clamp = steering.clamp_features(dictionary, [1], [5.0], "layers.3")
        >>> clamp.edits()["layers.3"](np.float32([[3, 2]])).tolist()  # the code was 1
        [[3.0, 6.0]]
    """
    settings, K = dictionary.settings, len(dictionary.params["W_dec"])
    of_two = settings.is_transcoder or settings.is_crosscoder
    if of_two or settings.hook_z or settings.architecture == "temporal":
        raise ValueError(
            f"features of a {dictionary.method} can't be clamped; expected an autoencoder that "
            "reconstructs the states of one site, position by position"
        )
    chosen = [int(k) for k in features]
    values = np.asarray(values, np.float32)
    if len(set(chosen)) != len(chosen) or not all(0 <= k < K for k in chosen) or not chosen:
        raise ValueError(f"features are {chosen}; expected different numbers from 0 to {K - 1}")
    if values.shape != (len(chosen),):
        raise ValueError(
            f"values has shape {values.shape}; expected one per feature, {len(chosen)}"
        )
    alone = settings.architecture in _ALONE
    others = [] if alone else np.setdiff1d(np.arange(K), chosen).tolist()
    moved = {
        name: jnp.take(value, np.array(chosen + others), axis=_AXES[name])
        if name in _AXES
        else value
        for name, value in dictionary.params.items()
    }
    if alone:
        settings = dataclasses.replace(settings, k=None)  # of all features
    first = dataclasses.replace(dictionary, params=moved, settings=settings)
    return FeatureClamp(first, values, tuple(chosen), site, source or {}, where)


def fit_sae_vector(
    features: Features,
    site: str,
    source: Sequence[str] | None,
    target: Sequence[str] | None = None,
    *,
    dictionary: Dictionary,
    num_features: int = 8,
    feature_ids: Sequence[int] | None = None,
    where: Any = "all",
    **chosen: Any,
) -> SteeringVector:
    """Fits the part of the difference of target and source states that a few features make up.

    Runs on the host and cannot be traced.

    Args:
        features, site, source, target: as for `answer_states`.
        dictionary: a sparse autoencoder of the site.
        num_features: F, the number of features to take: those whose mean codes differ most, times
            the length of their decoder rows.
        feature_ids: the features to take instead.
        where: the token positions that the vector is meant for, stored with it.
        chosen: further arguments of `answer_states`.

    Returns:
        The vector; `source["features of the dictionary"]` holds {feature: difference of codes}.

    Raises:
        ValueError: as `answer_states`, the widths differ, or a feature does not exist.
    """
    states = answer_states(features, site, source, target, **chosen)
    ids, before, after = _chosen_features(dictionary, states, num_features, feature_ids)
    clamp = clamp_features(dictionary, ids, after, site)
    decoder = dataclasses.replace(
        clamp.dictionary,
        params={**clamp.dictionary.params, "W_dec": clamp.dictionary.params["W_dec"][: len(ids)]},
    )
    moved = jnp.asarray(after - before)
    # Where a normaliser scales each state, the mean over source states.
    some = jnp.asarray(states.source[:ROWS])
    _, change = jax.jvp(lambda codes: decoder.decode(codes, some), (0 * moved,), (moved,))
    vector = np.asarray(jnp.mean(jnp.atleast_2d(change), axis=0), np.float32)
    differences = {str(k): float(d) for k, d in zip(ids, moved, strict=True)}
    described = {"method": "sae", "features of the dictionary": differences}
    return SteeringVector(vector, module_of(site), states.described | described, where)


def fit_sae_clamp(
    features: Features,
    site: str,
    source: Sequence[str] | None,
    target: Sequence[str] | None = None,
    *,
    dictionary: Dictionary,
    num_features: int = 8,
    feature_ids: Sequence[int] | None = None,
    where: Any = "all",
    **chosen: Any,
) -> FeatureClamp:
    """Sets the codes of a few features to their means over target states.

    Runs on the host and cannot be traced.

    Args:
        features, site, source, target: as for `answer_states`.
        dictionary, num_features, feature_ids: as for `fit_sae_vector`.
        where: the token positions that it is meant for, stored with it.
        chosen: further arguments of `answer_states`.

    Returns:
        The features and their codes.

    Raises:
        ValueError: as `fit_sae_vector` and `clamp_features`.
    """
    states = answer_states(features, site, source, target, **chosen)
    ids, _, after = _chosen_features(dictionary, states, num_features, feature_ids)
    described = states.described | {"method": "sae-clamp"}
    return clamp_features(dictionary, ids, after, module_of(site), described, where)


def _chosen_features(
    dictionary: Dictionary,
    states: AnswerStates,
    num_features: int,
    feature_ids: Sequence[int] | None,
) -> tuple[list[int], Float[np.ndarray, " F"], Float[np.ndarray, " F"]]:
    """Returns the features to steer with, and their mean codes in source and in target states."""
    before, after = (_mean_codes(dictionary, rows) for rows in (states.source, states.target))
    K = len(before)
    ids = None if feature_ids is None else [int(k) for k in feature_ids]
    if ids is None:
        lengths = np.linalg.norm(np.asarray(dictionary.components), axis=1)
        if not 1 <= num_features <= K:
            raise ValueError(f"num_features is {num_features}; expected 1 to the {K} features")
        ids = np.argsort(-np.abs(after - before) * lengths, kind="stable")[:num_features].tolist()
    if not all(0 <= k < K for k in ids):
        raise ValueError(f"features are {ids}; expected different numbers from 0 to {K - 1}")
    return ids, before[ids], after[ids]


def _mean_codes(dictionary: Dictionary, states: Float[Array, "N D"]) -> Float[np.ndarray, " K"]:
    """Returns the mean code of each feature."""
    total = np.zeros(len(dictionary.params["W_dec"]))
    size = min(ROWS, 1 << (len(states) - 1).bit_length())  # few sizes, and so few programs
    for start in range(0, len(states), size):
        block = np.asarray(states[start : start + size])
        padding = [(0, size - len(block)), *[(0, 0)] * (block.ndim - 1)]
        total += np.asarray(_sum_of_codes(dictionary, np.pad(block, padding), len(block)))
    return (total / len(states)).astype(np.float32)


@jax.jit
def _sum_of_codes(dictionary: Dictionary, rows: jax.Array, count: jax.Array) -> jax.Array:
    """Returns [K], the sums over the first `count` rows."""
    codes = dictionary.encode(rows)
    return jnp.sum(jnp.where((jnp.arange(len(rows)) < count)[:, None], codes, 0), axis=0)
