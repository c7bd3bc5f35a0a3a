"""Sliders as edits: always the same program, and what each slider alone would do."""

import dataclasses

import jax
import numpy as np
import pytest

from ports.intervene.edits import GENERATED, IMAGE, LAST_PROMPT, PADDING, TEXT, Places, add
from xlvlm_jax import steering
from xlvlm_jax.playground.edits import edits_of, settings_of, summed
from xlvlm_jax.playground.settings import WHERE, Slider

from .conftest import NORM

LAYER = "language_model.model.layers.3"
KINDS = np.array([[PADDING, IMAGE, TEXT, LAST_PROMPT, GENERATED]])
PLACES = Places(kind=KINDS, index=np.arange(5)[None] - 1, slot=np.arange(5)[None])


def settings(answers, *sliders):
    return settings_of(answers.vlm, answers.items, sliders)


def states_after(edits, states):
    for edit in edits:
        states = edit(states, PLACES)
    return np.asarray(states)


@pytest.mark.parametrize("where", WHERE)
def test_two_sliders_do_what_two_edits_do(answers, where):
    found = settings(
        answers,
        Slider("concepts/0", 2.0, where, LAYER),
        Slider("vectors/yes-no", -0.5, "image", LAYER),
    )
    edits = edits_of(answers.vlm, {}, found, answers.sites)
    states = np.random.default_rng(0).standard_normal((1, 5, 192)).astype(np.float32)
    items = answers.items
    expected = states_after(
        [
            add(items["concepts/0"].vector, 2.0, where),
            add(items["vectors/yes-no"].vector, -0.5, "image"),
        ],
        states,
    )
    np.testing.assert_allclose(states_after(edits[LAYER], states), expected, atol=1e-5)
    np.testing.assert_array_equal(states_after(edits[NORM], states), states)


def test_sliders_do_not_change_the_structure(answers):
    def structure(*sliders):
        edits = edits_of(answers.vlm, {}, settings(answers, *sliders), answers.sites)
        return jax.tree.structure(edits), [np.shape(leaf) for leaf in jax.tree.leaves(edits)]

    none = structure()
    assert structure(Slider("concepts/0", 1.0, None, None)) == none
    both = Slider("concepts/1", 3.0, "image", LAYER), Slider("vectors/yes-no", 1.0, None, None)
    assert structure(*both) == none


def test_positions_without_a_name_are_kept(answers):
    item = answers.items["vectors/yes-no"]
    moved = dataclasses.replace(item, where={"from": 2})
    (found,) = settings_of(answers.vlm, {"m": moved}, [Slider("m", 1.0, None, None)])
    states = np.zeros((1, 5, 192), np.float32)
    after = states_after(edits_of(answers.vlm, {}, [found], answers.sites)[NORM], states)
    assert np.abs(after[0]).max(axis=1).astype(bool).tolist() == [False] * 3 + [True] * 2


def test_a_map_steers_at_its_own_site_alone(answers, tmp_path):
    fitted = steering.LowRankMap(np.eye(1, 192), 2 * np.eye(192, 1), LAYER)
    item = dataclasses.replace(answers.items["vectors/yes-no"], steering=fitted, site=LAYER)
    (found,) = settings_of(answers.vlm, {"m": item}, [Slider("m", 3.0, "image", None)])
    states = np.ones((1, 5, 192), np.float32)
    after = states_after(edits_of(answers.vlm, {}, [found], answers.sites)[LAYER], states)
    assert after[0, :, 0].tolist() == [1, 7, 1, 1, 1] and (after[0, :, 1:] == 1).all()
    with pytest.raises(ValueError, match="steers only at its own site"):
        settings_of(answers.vlm, {"m": item}, [Slider("m", 1.0, None, NORM)])
    with pytest.raises(ValueError, match="is not a vector"):
        summed(answers.vlm, [found])


def test_the_sum_is_saved_with_its_parts(answers, vlm, tmp_path):
    found = settings(
        answers,
        Slider("concepts/0", 2.0, "text", LAYER),
        Slider("concepts/1", -1.0, "text", LAYER),
    )
    summed(vlm, found).save(tmp_path / "v.safetensors")
    vector = steering.SteeringVector.load(tmp_path / "v.safetensors")
    items = answers.items
    expected = 2 * items["concepts/0"].vector - items["concepts/1"].vector
    np.testing.assert_allclose(vector.vector, expected, atol=1e-5)
    assert (vector.site, vector.where) == (LAYER, "text")
    assert vector.source["fingerprint"] == vlm.fingerprint
    assert vector.source["sum of"][1] == {"of": "concepts/1", "strength": -1.0}


@pytest.mark.parametrize(
    ("sliders", "said"),
    [
        ([], "all sliders are at zero"),
        (
            [Slider("concepts/0", 1.0, None, None), Slider("concepts/1", 1.0, "image", None)],
            "one site for one set of positions",
        ),
    ],
)
def test_what_is_not_one_vector_is_not_saved(answers, vlm, sliders, said):
    with pytest.raises(ValueError, match=said):
        summed(vlm, settings(answers, *sliders))


def test_unknown_items_and_sites_are_refused(answers):
    with pytest.raises(LookupError, match="no concept or vector 'x' here; reload"):
        settings(answers, Slider("x", 1.0, None, None))
    with pytest.raises(ValueError, match="no site"):
        settings(answers, Slider("concepts/0", 1.0, None, "layers.99"))
    with pytest.raises(ValueError, match="has width 192; the states at"):
        settings(answers, Slider("concepts/0", 1.0, None, answers.vlm.head))
