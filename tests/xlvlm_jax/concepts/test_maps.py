"""Concept maps: by hand, against `project`, and the colour of a drawn picture's cells."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import xlvlm_jax
from ports.inputs.patch_layout import PatchLayout, grid, grid_boxes
from xlvlm_jax.concepts import maps as module
from xlvlm_jax.concepts.maps import (
    concept_maps,
    concept_maps_by_row,
    gradient_maps,
    paint,
    vector_maps,
    word_maps,
    word_tokens,
)

CONCEPTS = xlvlm_jax.Concepts.from_components(np.eye(3), alpha=1.0)
STATES = np.random.default_rng(0).normal(size=(3, 7, 3)).astype(np.float32)


def test_rows_of_one_two_and_no_pictures():
    layouts = [[grid(np.arange(1, 7), 2, 3)], [grid([0], 1, 1), grid([2, 3, 4, 5], 4, 1)], []]
    maps = concept_maps(STATES, CONCEPTS, layouts)
    assert [[m.shape for m in row] for row in maps] == [[(3, 2, 3)], [(3, 1, 1), (3, 4, 1)], []]
    whole = np.maximum(STATES - 1, 0)  # codes of unit atoms with alpha 1
    np.testing.assert_allclose(maps[0][0][:, 1, 2], whole[0, 6], rtol=1e-6)
    np.testing.assert_allclose(maps[1][1][:, 3, 0], whole[1, 5], rtol=1e-6)


@pytest.mark.parametrize("values", [1, 30, 2**24])
def test_row_by_row_are_the_same_maps(values, monkeypatch):
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", values)
    layouts = [[grid(np.arange(1, 5), 2, 2)], [grid([0], 1, 1), grid([2], 1, 1)], [grid([3], 1, 1)]]
    rows = list(concept_maps_by_row(STATES, CONCEPTS, layouts))
    expected = concept_maps(STATES, CONCEPTS, layouts)
    assert [len(row) for row in rows] == [1, 2, 1]
    for row, other in zip(rows, expected, strict=True):
        for one, same in zip(row, other, strict=True):
            np.testing.assert_allclose(one, same, rtol=1e-6)


@pytest.mark.parametrize("method", ["kmeans", "pca", "snmf"])
def test_cells_are_the_values_of_project(method):
    concepts = xlvlm_jax.Concepts(np.float32([[1, 0, 0], [0, 0.6, 0.8]]), method=method)
    (row,) = concept_maps(STATES[:1], concepts, [[grid(np.arange(6), 3, 2)]])
    expected = np.asarray(xlvlm_jax.project(STATES[0, :6], concepts))
    np.testing.assert_allclose(row[0].reshape(2, -1).T, expected, rtol=1e-6, atol=1e-7)


def test_a_cell_without_a_state():
    positions = np.array([[0, -1]])
    (row,) = concept_maps(STATES[:1], CONCEPTS, [[PatchLayout(positions, grid_boxes(1, 2))]])
    assert np.isnan(row[0][:, 0, 1]).all() and np.isfinite(row[0][:, 0, 0]).all()


@pytest.mark.parametrize("values", [1, 2**24])
def test_pictures_so_long_that_no_cell_is_left(values, monkeypatch):
    """They take nothing from the others in their batch, and do not fail alone."""
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", values)
    wide = PatchLayout(np.zeros((0, 4), int), np.zeros((0, 4, 4)))
    tall = PatchLayout(np.zeros((4, 0), int), np.zeros((4, 0, 4)))
    layouts = [[wide], [grid(np.arange(1, 7), 2, 3)], [tall]]
    vectors = np.eye(3, dtype=np.float32)
    kinds = {
        "concepts": lambda rows, some: concept_maps(STATES[rows], CONCEPTS, some),
        "by row": lambda rows, some: list(concept_maps_by_row(STATES[rows], CONCEPTS, some)),
        "words": lambda rows, some: word_maps(STATES[rows], lambda x: x, [[0], [1], [2]], some),
        "vectors": lambda rows, some: vector_maps(STATES[rows], vectors, some),
        "gradients": lambda rows, some: gradient_maps(STATES[rows], some),
    }
    for name, drawn in kinds.items():
        (of_wide,), (usual,), (of_tall,) = drawn(slice(3), layouts)
        K = len(usual)
        assert (of_wide.shape, of_tall.shape) == ((K, 0, 4), (K, 4, 0)), name
        np.testing.assert_allclose(usual, drawn(slice(1, 2), layouts[1:2])[0][0], rtol=1e-6)
        assert drawn(slice(1), layouts[:1])[0][0].shape == (K, 0, 4), name
    assert np.isnan(paint(of_wide, wide.boxes, 3, 9)).all()


@pytest.mark.parametrize(
    ("states", "layouts", "message"),
    [
        (STATES, [[], []], r"states have shape \(3, 7, 3\) for layouts of 2 rows"),
        (STATES, [[], [], []], "no prompt has a picture; maps need image tokens"),
        (STATES[:1], [[grid([7], 1, 1)]], "position 7, but the states have 7 positions"),
        (STATES[:1, :, :2], [[grid([1], 1, 1)]], "2 columns but the concepts have 3"),
        (STATES[:1] * np.nan, [[grid([1], 1, 1)]], "NaN"),
    ],
)
def test_what_does_not_fit(states, layouts, message):
    with pytest.raises(ValueError, match=message):
        concept_maps(states, CONCEPTS, layouts)


class TestWordMaps:
    def test_as_the_head_reads_each_cell(self, vlm):
        states = np.random.default_rng(1).normal(size=(1, 40, 192)).astype(np.float32)
        tokens = [word_tokens(vlm.tokenizer, word) for word in ("dog", "red")]
        layouts = [[grid(np.arange(2, 38), 6, 6)]]
        (row,) = word_maps(states, vlm.unembed, tokens, layouts, through_norm=True)
        logits = np.asarray(vlm.unembed(states[0], through_norm=True), np.float64)
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        for k, ids in enumerate(tokens):
            expected = np.log(shares[2:38][:, ids].sum(-1)).reshape(6, 6)
            np.testing.assert_allclose(row[0][k], expected, rtol=1e-4, atol=1e-4)

    def test_many_cells_in_parts(self, monkeypatch):
        monkeypatch.setattr("xlvlm_jax.concepts.maps._AT_ONCE", 16)
        states = np.random.default_rng(2).normal(size=(1, 50, 3)).astype(np.float32)
        sizes = []

        def unembed(x):
            sizes.append(len(x))
            return x

        (row,) = word_maps(states, unembed, [[2]], [[grid(np.arange(50), 5, 10)]])
        expected = states[0, :, 2] - np.log(np.exp(states[0]).sum(-1))
        np.testing.assert_allclose(row[0].reshape(-1), expected, rtol=1e-5)
        assert sizes == [16] * 4

    def test_an_unknown_word(self, vlm):
        assert word_tokens(vlm.tokenizer, "dog") == word_tokens(vlm.tokenizer, " dog ")
        # "zebra" begins with the token "z", which is another word.
        for word in ("éø", "zebra", " "):
            with pytest.raises(ValueError, match=f"no token of the model spells '{word.strip()}'"):
                word_tokens(vlm.tokenizer, word)
        with pytest.raises(ValueError, match="expected one or more token ids per word, got"):
            word_maps(STATES, lambda x: x, [[]], [[], [], [grid([1], 1, 1)]])


class TestVectorMaps:
    def test_cosines_do_not_depend_on_lengths(self):
        vectors = np.float32([[1, 2, 2], [0, 0, -3]])
        layouts = [[grid(np.arange(6), 2, 3)]]
        (row,) = vector_maps(STATES[:1], vectors, layouts)
        state = STATES[0, 4]
        expected = state @ vectors[0] / (3 * np.linalg.norm(state))
        assert row[0][0, 1, 1] == pytest.approx(expected, rel=1e-5)
        (again,) = vector_maps(7 * STATES[:1], 0.1 * vectors, layouts)
        np.testing.assert_allclose(again[0], row[0], rtol=1e-5)

    def test_a_zero_state(self):
        (row,) = vector_maps(0 * STATES[:1], np.ones((1, 3), np.float32), [[grid([0], 1, 1)]])
        assert row[0].tolist() == [[[0.0]]]

    @pytest.mark.wrong_types
    @pytest.mark.parametrize(
        ("vectors", "message"),
        [
            (np.ones((1, 2), np.float32), "vectors are 2 wide and the states 3; use vectors of"),
            (np.zeros((1, 3), np.float32), "finite and none of them zero"),
            (np.float32([[np.nan, 0, 1]]), "finite and none of them zero"),
        ],
    )
    def test_messages(self, vectors, message):
        with pytest.raises(ValueError, match=message):
            vector_maps(STATES[:1], vectors, [[grid([0], 1, 1)]])


@pytest.mark.wrong_types
def test_gradients_and_states_of_other_sites():
    with pytest.raises(ValueError, match=r"states have shape \(3, 7, 2\) and gradients \(3, 7, 3"):
        gradient_maps(STATES, [[], [], [grid([1], 1, 1)]], STATES[..., :2])


class TestPaint:
    def test_overlapping_boxes_are_averaged(self):
        boxes = np.array([[[0, 0, 0.75, 1], [0.25, 0, 1, 1]]])
        painted = paint(np.float32([[[2, 4]]]), boxes, 2, 4)
        np.testing.assert_allclose(painted, [[[2, 3, 3, 4]] * 2])

    def test_cells_without_area_or_value_are_left_out(self):
        boxes = np.array([[[0, 0, 0.5, 1], [0.5, 0, 1, 1], [0.5, 0, 0.5, 1]]])
        painted = paint(np.float32([[[1, np.nan, 9]]]), boxes, 1, 2)
        np.testing.assert_array_equal(painted, [[[1, np.nan]]])

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 40), st.integers(1, 40))
    def test_every_pixel_once(self, rows, columns, height, width):
        values = np.arange(rows * columns, dtype=np.float32).reshape(1, rows, columns)
        painted = paint(values, grid_boxes(rows, columns), height, width)
        y, x = (np.indices((height, width)) + 0.5) / np.array([height, width])[:, None, None]
        expected = values[0][(y * rows).astype(int), (x * columns).astype(int)]
        # A middle on an edge may fall to either side.
        edge = np.isclose(y * rows % 1, 0) | np.isclose(x * columns % 1, 0)
        edge |= np.isclose(y * rows % 1, 1) | np.isclose(x * columns % 1, 1)
        np.testing.assert_array_equal(np.where(edge, 0, painted[0]), np.where(edge, 0, expected))

    @pytest.mark.wrong_types
    def test_another_grid(self):
        with pytest.raises(ValueError, match=r"maps have shape \(1, 2, 2\) and boxes \(1, 2, 4\)"):
            paint(np.zeros((1, 2, 2)), grid_boxes(1, 2), 4, 4)


def test_a_red_square_on_blue(vlm):
    """The direction from blue to red, learnt from plain pictures, is where the square is."""
    square = Image.new("RGB", (96, 96), "blue")
    ImageDraw.Draw(square).rectangle((48, 0, 95, 47), fill="red")
    pictures = [Image.new("RGB", (96, 96), colour) for colour in ("red", "blue")] + [square]
    inputs = vlm.process([vlm.render("what?")] * 3, pictures)
    layouts = vlm.patch_layout(inputs)
    site = "multi_modal_projector"
    states = np.asarray(vlm.forward(inputs, sites=site).states[site])
    features = np.zeros((3, inputs["input_ids"].shape[1], states.shape[-1]), np.float32)
    for row, (picture,) in enumerate(layouts):
        features[row, picture.positions.reshape(-1)] = states[row]
    red, blue = (features[i, layouts[i][0].positions].mean((0, 1)) for i in (0, 1))
    nearest = xlvlm_jax.Concepts(np.stack([red, blue]), method="kmeans")
    is_red, is_blue = concept_maps(features, nearest, layouts)[2][0]
    painted = paint((is_red - is_blue)[None], layouts[2][0].boxes, 96, 96)[0]
    assert painted[8:40, 56:88].mean() > 0 > painted[56:88, 8:40].mean()
