"""`xlvlm fit-lens`: a lens of samples is the function's, fill-up rows do not count, messages."""

import numpy as np
import pytest
from PIL import Image

from xlvlm_jax import data, lenses
from xlvlm_jax.data import scenes


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scenes")
    scenes.write(directory, train=3, val=0, test=0, seed=2)
    return directory


def test_it_fits_prompts_and_references(xlvlm, vlm, pictures, tmp_path):
    """Three samples in batches of two, of which the last row only fills up."""
    file = tmp_path / "of" / "lens.safetensors"
    asked = ("--split", "train", "--layer", 6, "--skip", 60, "--batch-size", 2)
    status, out, errors = xlvlm("fit-lens", "embedded", pictures, *asked, "--output", file)
    assert status == 0, errors
    assert "3 samples, 1 layer ->" in " ".join(out.split())
    found = lenses.load_jacobian_lens(file)
    assert found.num_prompts == 3 and found.source["skip"] == 60
    texts, images = [], []
    for sample in data.load("coco", pictures, "train"):
        texts.append(f"{vlm.render(sample.prompt)} {sample.references[0]}")
        images.append(Image.open(sample.image))
    expected = lenses.fit_jacobian_lens(
        vlm, [vlm.process(texts, images)], layers=[6], skip=60
    ).jacobians[6]
    np.testing.assert_allclose(found.jacobians[6], expected, atol=1e-5 * np.abs(expected).max())
    # The lens reads the layer it was fitted for.
    picture = tmp_path / "red.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    page = ("--jacobian", file, "--output", tmp_path / "lens.html", "--max-new-tokens", 2)
    status, _, errors = xlvlm("lens", "embedded", picture, *page)
    assert status == 0, errors
    assert "Jacobian lens, 3 prompts" in (tmp_path / "lens.html").read_text("utf-8")


def test_messages(xlvlm, pictures, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "plain.png")
    file = tmp_path / "lens.safetensors"
    asked = ("fit-lens", "embedded", tmp_path, "--dataset", "folder", "--output", file)
    status, _, errors = xlvlm(*asked)
    assert status == 2 and "has no reference to follow its prompt; fit on --prompts-only" in (
        " ".join(errors.split())
    )
    file.write_text("mine")
    status, _, errors = xlvlm(*asked)
    assert status == 2 and "--overwrite" in errors and file.read_text() == "mine"
