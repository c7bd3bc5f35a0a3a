"""Histograms by hand, and thumbnails that keep their budget."""

import base64
import io

import numpy as np
from PIL import Image

from xlvlm_jax.report.figures import histogram, thumbnails


def test_histogram_by_hand():
    activations = np.array([0.0, 0.0, 0.5, 1.0, 1.9, 3.9, 4.0])
    own = np.array([True, False, False, False, True, False, True])
    result = histogram(activations, own, 0.0, 4.0, num_bins=4)
    assert result.counts == [1, 2, 0, 2]  # zeros are left out, the last bin is closed
    assert result.own == [0, 1, 0, 1]
    signed = histogram(np.array([-2.0, -1.0, 1.0, 2.0]), np.ones(4, bool), -2.0, 2.0, num_bins=2)
    assert signed.counts == signed.own == [2, 2]


def test_histogram_of_equal_activations():
    same = np.full(5, 0.25)
    assert sum(histogram(same, same > 1, 0.25, 0.25).counts) == 5
    assert sum(histogram(same * 0, same > 1, 0.0, 0.0).counts) == 0


def test_thumbnails_are_small_and_keep_their_shape(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (300, 600, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "wide.png")
    wide, gone = str(tmp_path / "wide.png"), str(tmp_path / "gone.png")
    shown = thumbnails([wide, gone, wide])
    assert [t.name for t in shown.values()] == ["p0", "p1"]
    assert shown[gone].uri is None and "gone.png: no such image file" in shown[gone].problem
    assert size(shown[wide]) == (224, 112)
    tight = thumbnails([wide], budget=len(shown[wide].uri) - 1)
    assert size(tight[wide]) == (160, 80)
    assert size(thumbnails([wide], budget=1)[wide]) == (48, 24)


def test_relative_images_are_looked_for_below_the_roots(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "here.png")
    shown = thumbnails(["here.png"], [tmp_path / "absent", tmp_path])
    assert size(shown["here.png"]) == (8, 8)


def size(thumbnail):
    kind, content = thumbnail.uri.split(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content))).size
