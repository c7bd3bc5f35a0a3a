"""Histograms by hand, and thumbnails that keep their budget."""

import base64
import io

import numpy as np
from PIL import Image

from xlvlm_jax.report.figures import histogram, thumbnails


def test_histogram_by_hand():
    activations = np.array([0.0, 0.0, 0.5, 1.0, 1.9, 3.9, 4.0])
    own = np.array([True, False, False, False, True, False, True])
    result = histogram(activations, own, num_bins=4)
    assert (result.low, result.high) == (0.5, 4.0)  # zeros are left out
    assert result.counts == [2, 1, 0, 2]  # the last bin is closed
    assert result.own == [0, 1, 0, 1]
    signed = histogram(np.array([-2.0, -1.0, 1.0, 2.0]), np.ones(4, bool), num_bins=2)
    assert signed.counts == signed.own == [2, 2]


def test_histogram_of_equal_activations():
    same = np.full(5, 0.25)
    assert sum(histogram(same, same > 1).counts) == 5
    assert sum(histogram(same * 0, same > 1).counts) == 0


def test_a_weak_concept_fills_its_histogram_beside_a_strong_one():
    weak = np.random.default_rng(0).exponential(size=1000)
    own = np.zeros(1000, bool)
    assert np.count_nonzero(histogram(weak * 1e-3, own).counts) > 12
    assert histogram(weak * 2.0**-10, own).counts == histogram(weak, own).counts


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
