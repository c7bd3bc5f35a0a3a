"""Pictures of red squares, and centroids of red and blue cells."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from xlvlm_jax import Concepts
from xlvlm_jax.data import prompts
from xlvlm_jax.storage.same_model import model_of

SITE = "language_model.model.layers.1"


@pytest.fixture(scope="session")
def squares(tmp_path_factory):
    """A red square on blue: at the top right, at the bottom left, and nowhere."""
    root = tmp_path_factory.mktemp("pictures")
    for name, corner in (("top", (56, 0)), ("under", (0, 56)), ("without", None)):
        picture = Image.new("RGB", (112, 112), "blue")
        if corner:
            box = (*corner, corner[0] + 55, corner[1] + 55)
            ImageDraw.Draw(picture).rectangle(box, fill="red")
        picture.save(root / f"{name}.png")
    return root


@pytest.fixture(scope="session")
def red_and_blue(vlm):
    """Centroids of red and blue cells."""
    plain = [Image.new("RGB", (112, 112), colour) for colour in ("red", "blue")]
    inputs = vlm.process([vlm.render(prompts.CAPTION)] * 2, plain)
    states = np.asarray(vlm.states(inputs, sites=[SITE])[SITE])
    cells = [row[0].positions for row in vlm.patch_layout(inputs)]
    means = [states[i, where].mean((0, 1)) for i, where in enumerate(cells)]
    source = {"site": SITE, **model_of(vlm)}
    words = [["red"], ["blue", "sea"]]
    return Concepts(np.stack(means), method="kmeans", source=source, words=words)
