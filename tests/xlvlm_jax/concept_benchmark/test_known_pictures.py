"""Pictures whose contents are known: by hand, against the drawing, the file, messages."""

import dataclasses

import numpy as np
import pytest

from ports.inputs import patch_layout
from xlvlm_jax.concept_benchmark import known_pictures
from xlvlm_jax.data import scenes

from .conftest import COUNTS, SITE


def test_overlaps_by_hand():
    # Two objects in a picture of 4 x 4 pixels with 2 x 2 cells.
    masks = np.zeros((2, 4, 4), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[1, 3, 1:4] = True
    found = known_pictures._overlaps(patch_layout.grid(np.arange(4), 2, 2), masks)
    assert found["pixels"].tolist() == [2, 0, 1, 2] and found["area"].tolist() == [4] * 4
    # The boxes are 0..2 x 0..2 and 1..4 x 3..4; middles are at 1 and 3.
    assert found["in_box"].tolist() == [True, False, True, True]


def test_states_and_contents_belong_together(vlm, pictures):
    test = pictures.test
    assert test.cells.shape == (COUNTS[2], 64, 192) and pictures.site == SITE
    drawn = [scenes.sample_scene("test", index) for index in range(COUNTS[2])]
    masks = [scenes.draw_with_masks(scene)[1] for scene in drawn]
    assert test.pixels.sum(1).tolist() == [int(mask.any(0).sum()) for mask in masks]
    assert (test.area.sum(1) == 112 * 112).all()
    assert test.attributes[3]["kind"] == drawn[3].kind
    # A caption of n tokens is predicted by n states, the first of which is the prompt's last.
    said = scenes.captions(drawn[5])[0]
    ids = vlm.tokenizer.encode(f" {said}", add_special_tokens=False)
    assert (test.picture == 5).sum() == len(ids)
    first = test.said[test.picture == 5][:1]
    logits = np.asarray(vlm.unembed(first, through_norm=True))
    assert logits.argmax() >= 0 and len(pictures.rows) > COUNTS[0] * known_pictures.LEARNT_CELLS


def test_rows_are_states_of_other_pictures(pictures):
    learnt = pictures.rows[: COUNTS[0] * known_pictures.LEARNT_CELLS]
    tested = pictures.test.cells.reshape(-1, 192)
    nearest = np.abs(learnt[:20, None] - tested[None, ::7]).max(-1).min()
    assert nearest > 1e-3


def test_file(vlm, clip, pictures, benchmarked, monkeypatch):
    directory = benchmarked / "seed-0"
    with monkeypatch.context() as patched:
        patched.delattr(known_pictures, "make_pictures")  # not needed
        again = known_pictures.load_or_make(directory, vlm, clip, SITE, counts=COUNTS)
    np.testing.assert_array_equal(again.rows, pictures.rows)
    np.testing.assert_array_equal(again.test.in_box, pictures.test.in_box)
    assert again.fit.attributes == pictures.fit.attributes


def test_a_damaged_file_is_named(vlm, clip, tmp_path):
    (tmp_path / known_pictures.FILE).write_bytes(b"no")
    with pytest.raises(ValueError, match=r"pictures.safetensors is damaged .*; remove it"):
        known_pictures.load_or_make(tmp_path, vlm, clip, SITE, counts=COUNTS)


@pytest.mark.wrong_types
def test_a_resampler_is_refused(vlm):
    drawn = [scenes.sample_scene("test", 0)]
    pictures = [scenes.draw(drawn[0])]
    layout = dataclasses.replace(patch_layout.grid(np.arange(64), 8, 8), latents=True)

    class Resampling:
        def __getattr__(self, name):
            return getattr(vlm, name)

        def patch_layout(self, inputs):
            return [[layout]]

    with pytest.raises(ValueError, match="latents that each see the whole picture"):
        known_pictures.caption_batch(Resampling(), drawn, pictures)


def test_cells_without_a_state_or_a_place_are_left_out():
    layout = patch_layout.grid(np.array([-1, 5, 6, 7]), 2, 2, (0, 0, 1, 0.5))
    assert known_pictures.cells_of([layout, layout]).tolist() == [1]  # the rest is padding
    whole = patch_layout.grid(np.array([-1, 5, 6, 7]), 2, 2)
    assert known_pictures.cells_of([whole]).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="states of different cells"):
        known_pictures.cells_of([layout, whole])
