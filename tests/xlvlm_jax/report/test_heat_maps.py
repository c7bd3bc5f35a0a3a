"""Colours of maps: by hand, against matplotlib, and what is transparent."""

import base64
import io

import matplotlib
import numpy as np
import pytest
from PIL import Image

from ports.inputs.patch_layout import grid_boxes
from xlvlm_jax.report.heat_maps import (
    LEVELS,
    Scale,
    gradient_css,
    levels,
    overlay,
    palette,
    shared_scale,
)


def test_one_scale_over_all_maps():
    maps = [np.array([[1.0, np.nan]]), np.array([[-2.0, 0.5]]), np.array([[np.nan]])]
    assert shared_scale(maps) == (-2, 1)
    assert shared_scale([np.array([np.nan])]) == shared_scale([]) == (0, 1)


def test_levels_by_hand():
    values = np.array([-1.0, 0.0, 0.5, 1.0, 9.0, np.nan])
    expected = [0, 0, LEVELS // 2, LEVELS - 1, LEVELS - 1, LEVELS]
    assert levels(values, Scale(0, 1)).tolist() == expected
    assert levels(values[1:], Scale(3, 3)).tolist() == [0, 0, 0, 0, LEVELS]


def test_the_colours_are_matplotlibs_and_grow_brighter():
    colours = palette()
    ends = matplotlib.colormaps["viridis"]([0.0, 1.0])[:, :3]
    np.testing.assert_array_equal(colours[[0, -1]], np.round(255 * ends))
    luminance = colours @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) > 0).all()
    assert gradient_css().startswith("#440154, ") and gradient_css().endswith(", #fde725")


def test_an_overlay_without_cells_is_transparent():
    uri = overlay(np.zeros((0, 4)), np.zeros((0, 4, 4)), (1000, 3), shared_scale([]))
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    image = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))
    assert image.shape == (1, 96, 4) and not image[..., 3].any()


@pytest.mark.parametrize("size", [(30, 20), (600, 400)])
def test_an_overlay_has_the_shape_of_its_picture_and_its_cells(size):
    values = np.array([[0.0, 1.0, np.nan]])
    uri = overlay(values, grid_boxes(1, 3), size, Scale(0, 1))
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    image = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))
    assert image.shape == (64, 96, 4) and len(uri) < 900
    assert image[10, 10].tolist() == [*palette()[0], 255]
    assert image[60, 40].tolist() == [*palette()[-1], 255]
    assert (image[:, 64:, 3] == 0).all()
