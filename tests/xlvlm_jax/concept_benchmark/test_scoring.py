"""Scores of one dictionary: parts by hand, planted and random dictionaries, messages."""

import dataclasses

import numpy as np
import pytest

from xlvlm_jax import Concepts, metrics, project
from xlvlm_jax.concept_benchmark import random_dictionary, score_dictionary, scoring
from xlvlm_jax.concept_benchmark.dictionaries import remade
from xlvlm_jax.concept_benchmark.measures import MEASURES
from xlvlm_jax.data.scenes.language import FAMILIES

K = 12  # as in the tests of the stage, which share programs


def test_pooling_by_hand():
    cells = np.float32([[[1], [3]], [[0], [0]]])
    said = np.float32([[4], [6], [8]])
    assert scoring.pooled(cells, said, np.array([0, 0, 1])).tolist() == [[3.5], [4.0]]
    # A picture without words has half of its cells.
    assert scoring.pooled(cells, said, np.array([0, 0, 0])).tolist() == [[4.0], [0.0]]


def test_codes_are_cut_to_the_largest():
    concepts = Concepts.from_components(np.eye(3), "pca")
    rows = np.float32([[1, -3, 2], [5, 0, 0]])
    assert scoring.encode(concepts, rows, 2).tolist() == [[0, -3, 2], [5, 0, 0]]
    assert scoring.encode(concepts, rows, None).tolist() == rows.tolist()
    centroids = Concepts.from_components(np.eye(3), "kmeans")
    codes = scoring.encode(centroids, rows, 2)
    assert scoring.coefficients_of(centroids, codes).tolist() == [[0, 0, 1], [1, 0, 0]]
    np.testing.assert_array_equal(scoring.coefficients_of(concepts, codes), codes)
    many = np.random.default_rng(0).normal(size=(scoring.ENCODED + 9, 3)).astype(np.float32)
    np.testing.assert_allclose(scoring.encode(concepts, many, 3), many, atol=1e-6)


def test_truth_by_hand():
    tasks = [scoring.Task("mood", "happy"), scoring.Task("count", 2)]
    found = scoring.truth_of([{"mood": None, "count": 2}, {"mood": "sad", "count": 1}], tasks)
    assert found.positive.tolist() == [[False, True], [False, False]]
    assert found.known.tolist() == [[False, True], [True, True]]


def test_names_are_the_words_of_captions():
    assert "crimson" in scoring._names_of(scoring.Task("colour", "red"))
    assert FAMILIES["kind"]["pup"] == "dog" and "pup" in scoring._names_of(
        scoring.Task("kind", "dog")
    )


@pytest.fixture(scope="module")
def supervised(ground):
    """Concepts of twelve values, the differences of means, with the values' own words."""
    states = scoring.pooled(
        ground.pictures.fit.cells, ground.pictures.fit.said, ground.pictures.fit.picture
    )
    rows, some = [], range(len(ground.tasks))[-2 * K :: 2]
    for j in some:
        known, positive = ground.fit.known[:, j], ground.fit.positive[:, j]
        rows.append(states[known & positive].mean(0) - states[known & ~positive].mean(0))
    mean = ground.pictures.rows.mean(0)
    components = np.stack(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    words = [sorted(scoring._names_of(ground.tasks[j]))[:3] for j in some]
    made = Concepts.from_components(components, "pca", mean=mean)
    return dataclasses.replace(made, words=words)


@pytest.fixture(scope="module")
def scored(ground, supervised):
    random = random_dictionary(ground.pictures.rows, K, 4)
    return [score_dictionary(each, ground, name="x", kept=4) for each in (supervised, random)]


def test_every_measure_is_in_its_range(ground, scored):
    for scores in scored:
        assert set(scores.values) == {m.name for m in MEASURES} - {"stability"}
        inside = {"map_auc", "map_which", "pointing", "probing_1", "probing_5", "naming"}
        inside |= {"information", "disentanglement", "completeness", "absorption", "dead_share"}
        assert all(0 <= scores.values[name] <= 1 for name in inside), scores.values
        assert -1 <= scores.values["perturbation"] <= 1 and scores.values["splitting"] >= 1
        assert scores.values["explained_variance"] <= 1 and scores.values["loss_recovered"] <= 1
        assert set(scores.best_concept) == set(map(str, ground.tasks))
        assert len(scores.best_attribute) == scores.num_concepts
    assert scored[1].values["l0"] <= 4


def test_known_words_name_and_cause(ground, supervised, scored):
    known, random = (scores.values for scores in scored)
    assert known["naming"] > random["naming"]
    # Chosen on the pictures that the concepts were made of, each names its value.
    fit = scoring._coded(supervised, ground.pictures.fit, 4)
    named = scoring._naming(supervised, ground, fit)["naming"]
    assert named == pytest.approx(K / len(ground.tasks)) and named > random["naming"]
    assert named > scored[0].nulls["naming"] + 0.2
    assert known["causal"] > scored[0].nulls["causal"]
    assert ground.probe_accuracy > 0.7


def test_choices_are_made_both_ways(ground, supervised, scored):
    """On each half of the pictures; a score is the mean."""
    halves = [scoring._coded(supervised, part, 4) for part in ground.pictures[3:5]]
    other = ground.swapped()
    assert other.pictures.fit is ground.pictures.test
    assert other.swapped().pictures.fit is ground.pictures.fit
    ways = zip((ground, other), halves, strict=True)
    named = [scoring._naming(supervised, way, half)["naming"] for way, half in ways]
    assert named[0] != named[1]
    assert scored[0].values["naming"] == pytest.approx(np.mean(named))


def test_nulls_say_nothing(scored):
    for scores in scored:
        assert scores.nulls["information"] < 0.25
        assert scores.nulls["naming"] < 0.2
        assert 0 < scores.nulls["monosemanticity"] < 1


def test_all_states_lose_nothing(ground):
    D = ground.pictures.rows.shape[1]
    whole = Concepts.from_components(np.eye(D), "pca", mean=ground.pictures.rows.mean(0))
    fit, test = (
        scoring._coded(whole, part, None) for part in (ground.pictures.fit, ground.pictures.test)
    )
    values = scoring._fidelity(whole, ground, fit, test, None)
    assert values["explained_variance"] == pytest.approx(1, abs=1e-5)
    assert values["loss_recovered"] == pytest.approx(1, abs=1e-3)
    assert values["l0"] == D and values["dead_share"] == 0
    nothing = Concepts.from_components(0 * np.eye(D)[:2], "pca", mean=ground.pictures.rows.mean(0))
    fit, test = (
        scoring._coded(nothing, part, None) for part in (ground.pictures.fit, ground.pictures.test)
    )
    values = scoring._fidelity(nothing, ground, fit, test, None)
    assert values["loss_recovered"] == pytest.approx(0, abs=1e-4)
    assert values["explained_variance"] == pytest.approx(0, abs=0.2) and values["l0"] == 0


def test_codes_are_never_all_in_memory(ground, supervised, monkeypatch):
    """Blocks of rows do not count, and pooled codes are those of the codes as a matrix."""
    part = ground.pictures.fit
    whole = scoring._coded(supervised, part, 4)
    cells = whole.cells.toarray().reshape(*part.cells.shape[:2], -1)
    expected = scoring.pooled(cells, whole.said.toarray(), part.picture)
    np.testing.assert_allclose(whole.picture, expected, atol=1e-6)
    explained = scoring._explained(supervised, [(part.said, whole.said)])
    assert explained == pytest.approx(
        metrics.explained_variance(part.said, remade(supervised, whole.said.toarray(), part.said)),
        abs=1e-5,
    )
    monkeypatch.setattr(scoring, "DENSE", 500 * K)
    parts = scoring._coded(supervised, part, 4)
    np.testing.assert_allclose(parts.cells.toarray(), whole.cells.toarray(), atol=1e-4)
    np.testing.assert_allclose(parts.picture, whole.picture, atol=1e-4)
    again = scoring._explained(supervised, [(part.said, parts.said)])
    assert again == pytest.approx(explained, abs=1e-5)


def test_too_few_pictures(vlm, pictures):
    few = pictures.fit._replace(
        **{name: getattr(pictures.fit, name)[:1] for name in ("attributes", "cells")},
        said=pictures.fit.said[:1],
        picture=pictures.fit.picture[:1],
    )
    with pytest.raises(ValueError, match=r"in 1 and 30 pictures no value .* use more pictures"):
        scoring.prepare_ground(pictures._replace(fit=few), vlm)


def test_another_width(ground):
    narrow = dataclasses.replace(Concepts.from_components(np.eye(3)), words=[[]] * 3)
    with pytest.raises(ValueError, match="192 columns but the concepts have 3"):
        score_dictionary(narrow, ground)
    assert project(np.eye(3), narrow).shape == (3, 3)
