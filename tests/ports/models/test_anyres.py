"""Pictures in tiles: by hand, and against what transformers and PyTorch choose."""

import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next import modeling_llava_next

from ports.models import anyres
from ports.models.anyres import Features

CANVASES = ((28, 56), (56, 28), (56, 56), (28, 84), (84, 28))
SIZES = st.tuples(st.integers(1, 300), st.integers(1, 300))


@settings(max_examples=200, deadline=None)
@given(SIZES)
def test_the_canvas_is_transformers(size):
    ours = anyres.best_canvas(size, CANVASES)
    assert ours == select_best_resolution(size, [list(canvas) for canvas in CANVASES])


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(1, 4), st.integers(1, 4), st.integers(1, 9))
def test_the_part_that_is_shown_is_transformers(size, rows, columns, side):
    index = anyres.tile_index((rows, columns), side, 0)
    kept = modeling_llava_next.unpad_image(torch.from_numpy(index[None]), size)[0].numpy()
    np.testing.assert_array_equal(index[anyres.shown_part(size, index.shape)], kept)


def test_tiles_by_hand():
    """Two tiles of 2 x 2 patches side by side, after a whole picture of four patches."""
    assert anyres.tile_index((1, 2), 2, 4).tolist() == [[4, 5, 8, 9], [6, 7, 10, 11]]


@pytest.mark.parametrize("shape", [(3, 7), (5, 5), (8, 8), (9, 4), (1, 1)])
def test_resampling_is_pytorchs(shape):
    table = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    index, weight = anyres.resampled(np.arange(64).reshape(8, 8), *shape)
    ours = anyres.gather(table, index, weight)
    grid = torch.from_numpy(table.reshape(1, 8, 8, 3)).movedim(-1, 1)
    theirs = torch.nn.functional.interpolate(grid, shape, mode="bilinear")[0].movedim(0, -1)
    np.testing.assert_allclose(ours, theirs.reshape(-1, 3), rtol=1e-5, atol=1e-6)


def test_rows_end_in_a_vector():
    features = anyres.with_ends(Features.of_rows(np.array([[5, 6], [7, 8]])), 2, end=9)
    assert features.rows[:, 0].tolist() == [5, 6, 9, 7, 8, 9]
    assert features.weights.sum(axis=1).tolist() == [1] * 6


def test_a_grid_without_rows_or_columns():
    none = Features.of_rows(np.zeros((0, 5), int))
    assert len(anyres.with_ends(none, 0, end=9).rows) == 0
    assert anyres.with_ends(none, 3, end=9).rows[:, 0].tolist() == [9, 9, 9]


def test_features_beyond_the_last_have_no_weight():
    features = Features.of_rows(np.arange(20)).padded()
    assert len(features.rows) == 32 and not features.weights[20:].any()


# Of a tile's 30 pixels, two cells of 14 cover 28.
VISION = types.SimpleNamespace(side=2, patch_size=14, image_size=30)


def test_boxes_are_the_pixels_that_cells_see():
    """A picture of 10 x 40 on two tiles side by side: resized to 15 x 60, from row 7 on."""
    layout = anyres.layout_of((10, 40), (1, 2), VISION, (2, 4), np.arange(4 + 2 * 5))
    assert layout.positions.tolist() == [[4, 5, 6, 7], [9, 10, 11, 12]]
    columns = np.array([[0, 14], [14, 28], [30, 44], [44, 58]]) / 60
    np.testing.assert_allclose(layout.boxes[0][:, [0, 2]], columns)
    np.testing.assert_allclose(layout.boxes[:, 3][:, [1, 3]], [[0, 7 / 15], [7 / 15, 1]])
    np.testing.assert_allclose(layout.whole.boxes[1, 1], np.array([14, 14, 28, 28]) / 30)


def test_boxes_of_an_odd_number_of_pixels():
    """30 x 19 pixels on one tile of 30 x 30: five columns of padding before, six after."""
    layout = anyres.layout_of((30, 19), (1, 1), VISION, (2, 2), np.arange(4 + 2 * 3))
    found = layout.boxes[0][:, [0, 2]]
    np.testing.assert_allclose(found, np.array([[0, 14 - 5], [14 - 5, 19]]) / 19)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (2, [[0, 28], [30, 58]]),
        (3, [[0, 14 + 14 / 3], [14 + 14 / 3, 30 + 28 / 3], [30 + 28 / 3, 58]]),
        (4, [[0, 14], [14, 28], [30, 44], [44, 58]]),
    ],
)
def test_edges_of_cells_that_are_resized(count, expected):
    np.testing.assert_allclose(anyres.cell_edges(2, VISION, slice(0, 4), count), expected)
