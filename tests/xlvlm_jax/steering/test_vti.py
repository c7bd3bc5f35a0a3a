"""VTI: masks by hand, shifts of pictures and of answers against single runs, messages."""

import dataclasses

import numpy as np
import pytest

from ports.intervene.edits import IMAGE
from xlvlm_jax import steering
from xlvlm_jax.data.images import read_image
from xlvlm_jax.steering import vti

from .conftest import SITE

TOWER = "vision_tower.vision_model.encoder.layers.0"


def test_masks_by_hand():
    picture = np.random.default_rng(0).integers(0, 255, (48, 72, 3), np.uint8)
    masked = vti.mask_cells(picture, 0.25, np.random.default_rng(1))
    changed = (masked != picture).any(-1)
    # A quarter of the 24 x 24 cells, each of 2 x 3 pixels, has the mean colour.
    cells = changed.reshape(24, 2, 24, 3).any((1, 3))
    assert cells.sum() == 144
    mean = picture.reshape(-1, 3).mean(0).round().astype(np.uint8)
    assert (masked.reshape(24, 2, 24, 3, 3)[:, 0, :, 0][cells] == mean).all()
    assert (vti.mask_cells(picture, 1.0, np.random.default_rng(1)) == mean).all()
    np.testing.assert_array_equal(vti.mask_cells(picture, 0.0, np.random.default_rng(1)), picture)
    small = vti.mask_cells(picture[:3, :5], 1.0, np.random.default_rng(1))
    assert (small == small[0, 0]).all()


def test_the_principal_part_of_shifts():
    shifts = np.float32([[3, 0], [5, 0], [4, 1], [4, -1]])
    np.testing.assert_allclose(vti.principal_part(shifts), [4, 0], atol=1e-5)
    np.testing.assert_allclose(vti.principal_part(-shifts), [-4, 0], atol=1e-5)


@pytest.fixture(scope="module")
def fitted(vlm, questions):
    missing = dataclasses.replace(questions[0], id="gone", image=questions[0].image / "gone")
    options = {"share": 1.0, "num_masks": 2}
    samples = [questions[0], missing, questions[12]]
    return steering.fit_vti_image(vlm, samples, [SITE, TOWER], **options), samples[::2]


def test_states_of_masked_pictures(vlm, fitted):
    vectors, samples = fitted
    # With all cells masked, every version is the mean colour: one run each tells the shifts.
    rows = {SITE: [], TOWER: []}
    for sample in samples:
        picture = np.asarray(read_image(sample.image))
        plain = np.broadcast_to(picture.reshape(-1, 3).mean(0).round(), picture.shape)
        versions = [picture, plain.astype(np.uint8), picture]
        inputs = vlm.process([vlm.render(sample.prompt)] * 3, versions)
        kinds = np.asarray(vlm.places(inputs).kind)
        states = {site: np.asarray(x) for site, x in vlm.states(inputs, sites=list(rows)).items()}
        image = kinds[0] == IMAGE
        rows[SITE].append((states[SITE][1] - states[SITE][0])[image].mean(0))
        rows[TOWER].append((states[TOWER][1] - states[TOWER][0]).mean(0))
    for site, meant in ((SITE, "image"), (TOWER, "all")):
        expected = vti.principal_part(np.stack(rows[site]))
        np.testing.assert_allclose(vectors[site].vector, expected, atol=1e-4)
        assert (vectors[site].where, vectors[site].site) == (meant, site)
        assert list(vectors[site].source["skipped"]) == ["gone"]
        assert vectors[site].source["samples"] == 2


def test_a_picture_whose_states_are_not_finite_is_left_out(vlm, questions, fitted, monkeypatch):
    states, runs = type(vlm).states, []

    def overflowing(self, *args, **options):
        runs.append(None)
        found = states(self, *args, **options)
        return {SITE: found[SITE] * (np.inf if len(runs) == 1 else 1), TOWER: found[TOWER]}

    monkeypatch.setattr(type(vlm), "states", overflowing)
    samples, options = fitted[1], {"share": 1.0, "num_masks": 2}
    found = steering.fit_vti_image(vlm, samples, [SITE, TOWER], **options)
    for vector in found.values():
        assert np.isfinite(vector.vector).all() and vector.source["samples"] == 1
        assert "are not finite; load" in vector.source["skipped"][samples[0].id]
    runs.clear()
    with pytest.raises(FloatingPointError, match=f"the states of sample {samples[0].id} at .*not"):
        steering.fit_vti_image(vlm, samples, [SITE, TOWER], **options, strict=True)


def test_the_text_part_is_what_the_vectors_of_samples_share(vlm, questions):
    samples = questions[:4]
    counterparts = ["yes"] * 4, ["no"] * 4
    found = steering.fit_vti_text(vlm, samples, *counterparts, [SITE, "layers.5"], batch_size=4)
    each = steering.fit_p2s(vlm, samples, *counterparts, SITE, batch_size=4)
    u = np.linalg.svd(each.vectors)[2][0]
    expected = (each.vectors.mean(0) @ u) * u
    np.testing.assert_allclose(found[SITE].vector, expected, atol=1e-4)
    assert list(found) == [SITE, "language_model.model.layers.5"]
    assert found[SITE].source["method"] == "vti-text" and found[SITE].source["fingerprint"]


def test_messages(vlm, questions):
    with pytest.raises(ValueError, match=r"share is 0.0 and num_masks 10; expected a share in"):
        steering.fit_vti_image(vlm, questions, SITE, share=0.0)
    with pytest.raises(ValueError, match="no site"):
        steering.fit_vti_image(vlm, questions, "layer")
    gone = [dataclasses.replace(questions[0], image=questions[0].image / "gone")]
    with pytest.raises(ValueError, match="none of 1 samples can be processed"):
        steering.fit_vti_image(vlm, gone, SITE)
    with pytest.raises(OSError, match=f"sample {questions[0].id}: "):
        steering.fit_vti_image(vlm, gone, SITE, strict=True)
