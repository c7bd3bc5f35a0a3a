"""Fixtures of the tests of steering: the embedded model and questions about drawn pictures."""

import pytest

from xlvlm_jax import data
from xlvlm_jax.data import scenes
from xlvlm_jax.features import ExtractionSettings, extract
from xlvlm_jax.features.selection import Selection

SITE = "language_model.model.layers.6"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Returns a directory of drawn scenes in the layouts of COCO and VQAv2."""
    directory = tmp_path_factory.mktemp("scenes")
    scenes.write(directory, train=14, seed=5)
    return directory


@pytest.fixture(scope="session")
def questions(pictures):
    """Returns twelve questions that are answered with yes, then twelve with anything else."""
    samples = data.load("vqav2", pictures, "train")
    yes = [s for s in samples if s.metadata["answer"] == "yes"]
    others = [s for s in samples if s.metadata["answer"] != "yes"]
    return yes[:12] + others[:12]


@pytest.fixture(scope="session")
def features(vlm, pictures, tmp_path_factory):
    """Returns the states of the answers to 48 questions."""
    path = tmp_path_factory.mktemp("run") / "features"
    samples = data.load("vqav2", pictures, "train")[:48]
    settings = ExtractionSettings((SITE,), Selection("before-special-tokens"), max_new_tokens=3)
    extract(vlm, samples, path, settings)
    return path


@pytest.fixture(scope="session")
def head_features(vlm, pictures, tmp_path_factory):
    """Returns what the decoder's heads put out where they predict the answers to 48 questions."""
    path = tmp_path_factory.mktemp("heads") / "features"
    samples = data.load("vqav2", pictures, "train")[:48]
    heads = ("language_model.**.heads",)
    settings = ExtractionSettings(heads, Selection("before-special-tokens"), max_new_tokens=3)
    extract(vlm, samples, path, settings)
    return path


@pytest.fixture
def stored():
    """A stand-in for `Features` that has the given samples alone."""

    class Stored:
        def __init__(self, *samples):
            common = {"image": "x.png", "image_id": "1", "prompt": "?", "references": []}
            self.samples = [{"id": str(i), **common, **s} for i, s in enumerate(samples)]

    return Stored
