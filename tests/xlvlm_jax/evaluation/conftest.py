"""The embedded model, a few drawn scenes with questions and captions, and a vector for them."""

from pathlib import Path

import numpy as np
import pytest

from xlvlm_jax import SteeringVector, data
from xlvlm_jax.data import scenes
from xlvlm_jax.data.images import read_image
from xlvlm_jax.steering import steering_vector

LAYER = "language_model.model.layers.6"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("scenes")
    scenes.write(directory, train=6, val=2, test=3, seed=5)
    return directory


@pytest.fixture(scope="session")
def questions(pictures) -> list[data.Sample]:
    return data.load("vqav2", pictures, "train")


@pytest.fixture(scope="session")
def vector(vlm, questions) -> SteeringVector:
    """Returns the vector from yes to no, of the states that predicted these answers."""
    asked = [q for q in questions if q.metadata["answer"] in ("yes", "no")][:16]
    inputs = vlm.process(
        [vlm.render(q.prompt) for q in asked], [read_image(q.image) for q in asked]
    )
    # Rows are padded on the left: the last state predicts the answer.
    states = np.asarray(vlm.states(inputs, sites=[LAYER])[LAYER][:, -1])
    no = np.array([q.metadata["answer"] == "no" for q in asked])
    fitted = np.asarray(steering_vector(states[~no], states[no]))
    return SteeringVector(fitted, LAYER, {"source": ["yes"], "target": ["no"]})
