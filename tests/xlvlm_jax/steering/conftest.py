"""What the tests of steering share: the embedded model and questions about drawn pictures."""

import pytest

from xlvlm_jax import data
from xlvlm_jax.data import scenes


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A directory of drawn scenes in the layouts of COCO and VQAv2."""
    directory = tmp_path_factory.mktemp("scenes")
    scenes.write(directory, train=14, seed=5)
    return directory


@pytest.fixture(scope="session")
def questions(pictures):
    """Twelve questions that are answered with yes, then twelve with anything else."""
    samples = data.load("vqav2", pictures, "train")
    yes = [s for s in samples if s.metadata["answer"] == "yes"]
    others = [s for s in samples if s.metadata["answer"] != "yes"]
    return yes[:12] + others[:12]
