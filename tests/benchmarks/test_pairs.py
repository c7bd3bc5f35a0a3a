"""Scores of maps on pictures of two objects, by hand."""

import math

import numpy as np

from benchmarks import pairs


def two_objects():
    """Two pictures of a red dog on the left and a blue cat on the right, of four cells each."""
    pixels, in_box = np.zeros((2, 2, 64)), np.zeros((2, 2, 64), bool)
    pixels[:, 0, :4] = pixels[:, 1, 4:8] = 100
    in_box[:, 0, :4] = in_box[:, 1, 4:8] = True
    red, blue = {"kind": "dog", "colour": "red"}, {"kind": "cat", "colour": "blue"}
    return pairs.Pairs([(red, blue)] * 2, [], {}, pixels, in_box)


def test_a_map_of_any_object_scores_a_half():
    made = two_objects()
    same = np.random.default_rng(0).random((2, 64))
    for name, values in (("kind", ("dog", "cat")), ("colour", ("red", "blue"))):
        found = pairs.score_pairs(dict.fromkeys(values, same), made, name)
        np.testing.assert_allclose(found, 0.5, atol=1e-12)


def test_a_map_of_its_own_object():
    made = two_objects()
    red, blue = np.zeros((2, 64)), np.zeros((2, 64))
    red[:, :4], blue[:, 4:8] = 1, 1
    red[:, 9] = 5  # beside both objects
    assert pairs.score_pairs({"red": red, "blue": blue}, made, "colour") == (1, 1)
    blue[1] = blue[1, ::-1]  # equal at both objects in one of two pictures
    assert pairs.score_pairs({"red": red, "blue": blue}, made, "colour") == (0.875, 0.875)


def test_what_objects_of_a_pair_share_has_no_score():
    made = two_objects()
    assert all(map(math.isnan, pairs.score_pairs({"beach": np.zeros((2, 64))}, made, "place")))


def test_scenes_of_a_pair_differ():
    for index in range(5):
        left, right = pairs.pair_of_scenes(index)
        assert left.kind != right.kind and left.colour != right.colour
