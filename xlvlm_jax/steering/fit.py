"""Fits steering vectors on features, choosing samples by their answers.

N samples, D width, K concepts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from ports.messages import few
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.data.words import word_pattern
from xlvlm_jax.features.manifest import finetuned_site, model_at, module_of
from xlvlm_jax.features.reader import Features
from xlvlm_jax.features.samples import columns, name_of
from xlvlm_jax.metrics.vqa import normalise_answer
from xlvlm_jax.steering import directions
from xlvlm_jax.steering.vectors import FineVectors, SteeringVector, fine_vectors, steering_vector
from xlvlm_jax.storage.same_model import ADAPTER, named_adapter

Array = jax.Array | np.ndarray
MATCHES = ("equals", "contains")
DIRECTIONS = ("pca", "lat", "probe")
OUTCOME = "outcome"  # in place of a field: prediction and answer, such as "yes for no"
EVERYTHING = ("*",)  # in place of words to steer from: every sample


class AnswerStates(NamedTuple):
    """The states of source and of target answers.

    Attributes:
        source: float32[N, D], states of the source answers, or source concepts.
        target: float32[M, D], states of the target answers.
        source_rows: int[n], rows of the features; n is not N if `source` are concepts.
        target_rows: int[M], rows of the target's features.
        pairs: float32[P, D], differences of the mean target and source states of each sample; None
            unless these are matched.
        described: what they are, JSON values.
    """

    source: Float[Array, "N D"]
    target: Float[Array, "M D"]
    source_rows: Int[np.ndarray, " n"]
    target_rows: Int[np.ndarray, " M"]
    pairs: Float[np.ndarray, "P D"] | None
    described: dict[str, Any]


def answer_states(
    features: Features,
    site: str,
    source: Sequence[str] | None,
    target: Sequence[str] | None = None,
    *,
    key: str = "prediction",
    match: str = "equals",
    target_features: Features | None = None,
    between_models: bool = False,
    matched: bool = False,
    source_concepts: Concepts | None = None,
) -> AnswerStates:
    """Returns the states of source and target answers, which the methods contrast.

    Runs on the host and cannot be traced.

    Args:
        features: states of the samples' answers or captions.
        site: the site whose states to use; of either model, where `features` hold those of two.
        source: words to steer from; None for all samples without a target word, EVERYTHING for all
            samples, such as all captions.
        target: words to steer to; None for all samples of the target's states, which then are not
            those of `features`.
        key: the field of a sample that holds its answer: "prediction" (the model's) or "answer"
            (the data set's); or "outcome" for both, such as "yes for no", a false yes.
        match: "equals" if the normalised answer must be one of the words, "contains" if it must
            contain one, as for captions.
        target_features: features that hold the target's states; None for `features`.
        between_models: the target's states are those of another model, such as a fine-tuned one;
            without `target_features`, of the one that `features` hold too. The vector steers the
            model of `features`.
        matched: whether only samples count that have source and target states, such as the same
            questions answered by two models.
        source_concepts: concepts that take the place of the source states.

    Returns:
        The states, and what they are.

    Raises:
        ValueError: the features lack the site, come from different models or have samples without
            `key`, no sample was answered with one of the words, no sample is matched, or source and
            target states are the same.
    """
    others = features if target_features is None else target_features
    target_site = finetuned_site(site) if between_models and others is features else site
    if not between_models:
        require_same_model(features, others, site)
    if target is None and target_features is None and not between_models:
        raise ValueError("there are no target answers; give some, or features of the target")
    of_target, of_source = (np.ones(each.num_rows, bool) for each in (others, features))
    if target is not None:
        of_target = _matching(others, target, key, match)
    if source is not None and tuple(source) != EVERYTHING:
        of_source = _matching(features, source, key, match)
    elif source is None and target is not None:
        of_source = ~_matching(features, target, key, match)
    for chosen, of, what, words in (
        (of_source, features, "source", source),
        (of_target, others, "target", target),
    ):
        if not chosen.any():
            raise ValueError(none_of(answers_of(of, key), key, what, words))
    if matched:
        names, other_names = _ids(features), _ids(others)
        begun, ended = names[of_source], other_names[of_target]
        of_source = of_source & np.isin(names, ended)
        of_target = of_target & np.isin(other_names, begun)
        if not of_source.any():
            raise ValueError(
                f"no sample has both source states in {features.path} and target states in "
                f"{others.path}, which matched states need; choose other answers, or do not match"
            )
    described = {
        **_origin(features, key, site),
        "target features": str(others.path.resolve()),
        "match": match,
        "source": None if source is None else list(source),
        "target": None if target is None else list(target),
        "source rows": int(of_source.sum()),
        "target rows": int(of_target.sum()),
    }
    if between_models:
        described["target model"] = others.manifest.get("finetuned") or others.manifest.get("model")
    begins = features.matrix(site)[of_source]
    if source_concepts is not None:
        begins = np.asarray(source_concepts.components)
        described["source concepts"] = len(begins)
    ends = others.matrix(target_site)[of_target]
    if begins.shape == ends.shape and np.array_equal(begins, ends):
        raise ValueError(
            f"the {len(ends)} source and target states at {site!r} are the same, so that nothing "
            "leads from one to the other; choose other answers, or features that differ"
        )
    pairs = None
    if matched and source_concepts is None:
        pairs = _by_sample(others, of_target, ends) - _by_sample(features, of_source, begins)
    rows = np.flatnonzero(of_source), np.flatnonzero(of_target)
    return AnswerStates(begins, ends, *rows, pairs, described)


def _by_sample(
    features: Features, chosen: Bool[np.ndarray, " R"], states: Float[np.ndarray, "N D"]
) -> Float[np.ndarray, "P D"]:
    """Returns the mean of the chosen rows' states for each sample, in the order of their IDs."""
    names = _ids(features)[chosen]
    _, sample, counts = np.unique(names, return_inverse=True, return_counts=True)
    means = np.zeros((len(counts), states.shape[1]))
    np.add.at(means, sample, states)
    return (means / counts[:, None]).astype(np.float32)


def fit_coarse(
    features: Features,
    site: str,
    source: Sequence[str] | None,
    target: Sequence[str] | None = None,
    *,
    where: Any = "all",
    **chosen: Any,
) -> SteeringVector:
    """Fits the coarse vector: mean state of target answers minus mean state of source answers.

    Runs on the host and cannot be traced.

    Args:
        features, site, source, target: as for `answer_states`.
        where: the token positions that the vector is meant for, stored with it.
        chosen: further arguments of `answer_states`.

    Returns:
        The vector.

    Raises:
        ValueError: as `answer_states`.
    """
    states = answer_states(features, site, source, target, **chosen)
    vector = steering_vector(states.source, states.target)
    described = states.described | {"method": "coarse"}
    return SteeringVector(np.asarray(vector, np.float32), module_of(site), described, where)


def fit_direction(
    features: Features,
    site: str,
    source: Sequence[str] | None,
    target: Sequence[str] | None = None,
    *,
    method: str = "lat",
    seed: int = 0,
    penalty: float = 1.0,
    where: Any = "all",
    **chosen: Any,
) -> SteeringVector:
    """Fits the vector along a direction that tells source from target answers.

    Runs on the host and cannot be traced.

    Args:
        features, site, source, target: as for `answer_states`.
        method: "pca" (with matched samples the differences are theirs, otherwise those of every
            source with every target state), "lat" or "probe", see `pca_vector`, `lat_vector` and
            `probe_vector`.
        seed: lat: random seed of the pairs.
        penalty: probe: weight of the squared norm.
        where: the token positions that the vector is meant for, stored with it.
        chosen: further arguments of `answer_states`.

    Returns:
        The vector.

    Raises:
        ValueError: the method is unknown, or as `answer_states` and the method.
    """
    if method not in DIRECTIONS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(DIRECTIONS)}")
    states = answer_states(features, site, source, target, **chosen)
    begins, ends = states.source, states.target
    if method == "pca":
        vector, options = directions.pca_vector(begins, ends, states.pairs), {}
        options["pairs"] = "all" if states.pairs is None else len(states.pairs)
    elif method == "lat":
        vector, options = directions.lat_vector(begins, ends, seed=seed), {"seed": seed}
    else:
        vector = directions.probe_vector(begins, ends, penalty=penalty)
        options = {"penalty": penalty}
    described = states.described | {"method": method, **options}
    return SteeringVector(np.asarray(vector, np.float32), module_of(site), described, where)


def fit_fine(
    features: Features,
    site: str,
    num_concepts: int,
    source: Sequence[str] | None = None,
    *,
    key: str = "prediction",
    match: str = "equals",
    pairs: Sequence[tuple[int, int]] | None = None,
    decomposition: str = "kmeans",
    seed: int = 0,
    where: Any = "all",
) -> tuple[list[SteeringVector], FineVectors]:
    """Fits the fine vectors i -> j between the centroids of k-means on the source states.

    With another decomposition they point from one of its components to another.

    Runs on the host and cannot be traced.

    Args:
        features: states of the samples' answers or captions.
        site: the site whose states to use; of either model, where `features` hold those of two.
        num_concepts: K.
        source: words that choose the samples, as for `answer_states`; None for all samples.
        key, match: as for `answer_states`.
        where: as for `fit_coarse`.
        pairs: the pairs (i, j) to return; None for every pair of different concepts.
        decomposition: a method of `decompose`.
        seed: random seed of the decomposition.

    Returns:
        The vectors, whose `source["samples"]` holds the IDs of the samples that belong to
        concept i, and the clustering they come from.

    Raises:
        ValueError: as `fit_coarse` and `decompose`, there are fewer than two concepts, or a pair
            does not name two different ones.
    """
    if num_concepts < 2:
        raise ValueError(f"num_concepts is {num_concepts}; expected at least 2, to steer between")
    chosen = np.ones(features.num_rows, bool)
    if source is not None:
        chosen = _matching(features, source, key, match)
        if not chosen.any():
            raise ValueError(none_of(answers_of(features, key), key, "source", source))
    every = [(i, j) for i in range(num_concepts) for j in range(num_concepts) if i != j]
    for pair in pairs or ():
        if tuple(pair) not in every:
            raise ValueError(
                f"the pair {pair[0]}:{pair[1]} is invalid; expected two different concepts from "
                f"0 to {num_concepts - 1}"
            )
    Z = features.matrix(site)[chosen]
    fine = fine_vectors(Z, num_concepts, key=jax.random.key(seed), method=decomposition)
    samples, names = features.sample_rows[chosen], _names(features)
    common = {
        **_origin(features, key, site),
        "method": "fine",
        "source": None if source is None else list(source),
        "match": match,
        "concepts": num_concepts,
        "decomposition": decomposition,
        "seed": seed,
    }
    vectors = []
    for i, j in every if pairs is None else pairs:
        ids = dict.fromkeys(names[row] for row in samples[fine.samples(i)])
        described = {**common, "from": i, "to": j, "samples": list(ids)}
        vector = np.asarray(fine.vectors[i, j], np.float32)
        vectors.append(SteeringVector(vector, module_of(site), described, where))
    return vectors, fine


def require_same_model(features: Features, others: Features, site: str) -> None:
    """Checks that the states of a site of two features come from the same model.

    Raises:
        ValueError: they come from different models.
    """
    models = [model_at(each.manifest, site) for each in (features, others)]
    if models[0] != models[1]:
        names = [
            f"{each.path} from {model['model']!r} ({model['fingerprint']}"
            + (f", {named_adapter(model)})" if model[ADAPTER] else ")")
            for each, model in zip((features, others), models, strict=True)
        ]
        raise ValueError(
            f"source and target states come from different models: {', '.join(names)}; extract "
            "both with the same model"
        )


def _names(features: Features) -> list[str]:
    """Returns the ID of each sample, its number if it has none."""
    (ids,) = columns(features.samples, "id")
    return [name_of(number, given) for number, given in enumerate(ids)]


def _ids(features: Features) -> np.ndarray:
    """Returns str[N], the ID of each row's sample."""
    return np.array(_names(features), str)[features.sample_rows]


def _matching(features: Features, words: Sequence[str], key: str, match: str) -> np.ndarray:
    """Returns bool[N], the rows whose sample was answered with one of the words."""
    return words_match(answers_of(features, key), words, match)[features.sample_rows]


def words_match(answers: Sequence[str], words: Sequence[str], match: str) -> np.ndarray:
    """Returns which answers equal or contain one of the words.

    Args:
        answers: normalised answers.
        words: words, normalised here.
        match: "equals" or "contains".

    Returns:
        bool[len(answers)].

    Raises:
        ValueError: `match` is neither, or a word is empty once normalised.
    """
    if match not in MATCHES:
        raise ValueError(f"match is {match!r}; expected {' or '.join(MATCHES)}")
    wanted = {normalise_answer(word) for word in words}
    if empty := [word for word in words if not normalise_answer(word)]:
        raise ValueError(
            f"the word {empty[0]!r} is empty once normalised, as articles and punctuation are; "
            "omit it, or choose other words"
        )
    if match == "equals":
        return np.array([answer in wanted for answer in answers], bool)
    pattern = word_pattern(wanted)
    return np.array([bool(pattern.search(answer)) for answer in answers], bool)


def none_of(answers: Sequence[str], key: str, what: str, words: Sequence[str] | None) -> str:
    """Returns the message that no sample was answered with one of the words."""
    named = f"{what} words {few(words)}" if words else "answers without a target word"
    distinct, numbers = np.unique(list(answers), return_counts=True)
    frequent = [str(answer) for answer in distinct[np.argsort(-numbers, kind="stable")][:5]]
    return (
        f"none of {len(answers)} samples has a {key} among the {named}; "
        f"choose frequent ones, such as {', '.join(frequent)}"
    )


def answers_of(features: Features, key: str) -> list[str]:
    """Returns the normalised answers of the samples.

    Args:
        features: the features.
        key: the field of a sample that holds its answer, or OUTCOME.

    Returns:
        An answer per sample, "" for one that failed; for OUTCOME, what the model said and what the
        data set says, such as "yes for no".

    Raises:
        ValueError: a sample does not have `key`.
    """
    if key == OUTCOME:
        both = [answers_of(features, each) for each in ("prediction", "answer")]
        return [f"{said} for {true}" for said, true in zip(*both, strict=True)]
    answers = []
    for sample in features.samples:
        if key not in sample and "error" not in sample:
            raise ValueError(
                f"{features.path}: its samples have no {key!r}; extract from questions"
            )
        answers.append(normalise_answer(str(sample.get(key, ""))))
    return answers


def _origin(features: Features, key: str, site: str) -> dict[str, Any]:
    known = {
        **model_at(features.manifest, site),
        "selection": features.manifest.get("selection"),
        "data source": features.manifest.get("source"),
    }
    return {"features": str(features.path.resolve()), "key": key, **known}
