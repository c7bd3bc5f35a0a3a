"""The last positions of a batch over the cache of the rest: every kind of decoder.

Families with a test of steering have this test there (`family.check_steering`).
"""

import pytest

from .. import family, helpers, qwen2_vl_helpers


@pytest.mark.parametrize("port", ["llava", "idefics2", "molmo"])
def test_the_last_positions_are_those_of_the_whole_run(vlms, port):
    vlm = vlms[port]
    family.check_tail(vlm, vlm.layers[0], helpers.make_inputs([0, 0], [9, 5]))


def test_rotary_positions_of_pictures(vlms):
    vlm = vlms["qwen2_vl"]
    inputs = qwen2_vl_helpers.make_inputs([[(1, 4, 6)], []], [6, 9])
    family.check_tail(vlm, vlm.layers[0], inputs)
