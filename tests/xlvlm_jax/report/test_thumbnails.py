"""Histograms by hand, and thumbnails within their budget."""

import base64
import io

import numpy as np
from PIL import Image

from xlvlm_jax.report.thumbnails import histogram, thumbnails


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


def test_a_few_large_activations_do_not_push_all_others_into_one_bin():
    """Activations are k-means', 1 / (1 + distance), far from all centroids except for one row."""
    far = 1 / (1 + np.random.default_rng(0).uniform(100, 2000, 1000))
    result = histogram(np.append(far, 1.0), np.arange(1001) == 1000)
    assert result.logarithmic and (result.low, result.high) == (far.min(), 1.0)
    assert np.count_nonzero(result.counts) > 8 and sum(result.counts) == 1001
    assert result.own == [0] * 23 + [1]
    by_hand = histogram(np.array([1.0] * 20 + [2, 4, 1024]), np.zeros(23, bool), num_bins=5)
    assert by_hand.counts == [21, 1, 0, 0, 1]  # edges 1, 4, 16, 64, 256, 1024: 4 is in the second
    assert not histogram(np.append(-far, 1.0), np.zeros(1001, bool)).logarithmic


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
    assert thumbnails([wide], budget=1) == {}


def test_the_last_pictures_are_left_out_if_legible_ones_exceed_the_budget(tmp_path):
    """With 5 pictures for each of 256 concepts, none is smaller than 96 pixels."""
    random = np.random.default_rng(0)
    names = [str(tmp_path / f"{i}.png") for i in range(12)]
    for name in names:
        Image.fromarray(random.integers(0, 255, (96, 96, 3), np.uint8)).save(name)
    whole = sum(len(thumbnail.uri) for thumbnail in thumbnails(names).values())
    shown = thumbnails(names, budget=whole // 2)
    assert 4 <= len(shown) <= 6 and list(shown) == names[: len(shown)]
    assert {size(thumbnail) for thumbnail in shown.values()} == {(96, 96)}
    assert sum(len(thumbnail.uri) for thumbnail in shown.values()) <= whole // 2


def test_relative_images_are_searched_below_the_roots(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "here.png")
    shown = thumbnails(["here.png"], [tmp_path / "absent", tmp_path])
    assert size(shown["here.png"]) == (8, 8)


def size(thumbnail):
    kind, content = thumbnail.uri.split(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content))).size
