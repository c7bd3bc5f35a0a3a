"""A few drawn pictures with the embedded model's states, shared by the tests of this folder."""

import pytest

from xlvlm_jax.concept_benchmark import known_pictures
from xlvlm_jax.concept_benchmark.scoring import prepare_ground

SITE = "language_model.model.layers.7"  # few programs run after it
COUNTS = (30, 30, 30)  # of one size, for one program


@pytest.fixture(scope="session")
def benchmarked(tmp_path_factory):
    """Returns a directory in which the pictures of seed 0 are kept."""
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="session")
def pictures(vlm, clip, benchmarked):
    """Returns the pictures, at a late layer."""
    return known_pictures.load_or_make(benchmarked / "seed-0", vlm, clip, SITE, counts=COUNTS)


@pytest.fixture(scope="session")
def ground(vlm, pictures):
    """Returns what dictionaries are scored on."""
    return prepare_ground(pictures, vlm, num_asked=4)
