"""Features of drawn scenes whose states tell the kind of object, and the CLIP pair for scores."""

import json

import numpy as np
import pytest

from xlvlm_jax.data import scenes
from xlvlm_jax.features.reader import Features
from xlvlm_jax.features.writer import FeaturesWriter

SITE = "language_model.model.norm"
WIDTH = 192  # of the embedded model


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Returns (image, attributes) of some scenes."""
    root = tmp_path_factory.mktemp("scenes")
    scenes.write(root, train=40)
    attributes = json.loads((root / "attributes.json").read_text())
    images = sorted((root / "train2014").glob("*.jpg"))
    return [(image, attributes[str(int(image.stem[-12:]))]) for image in images]


@pytest.fixture(scope="session")
def kinds(pictures):
    """Returns the kinds of objects, in the order of their axes in the states."""
    return sorted({truth["kind"] for _, truth in pictures})


@pytest.fixture(scope="session")
def write_features(pictures, kinds, tmp_path_factory):
    """write_features(**changes to the manifest) writes features whose state is the kind's axis."""

    def write(site=SITE, captions=True, **manifest):
        axes = [kinds.index(truth["kind"]) for _, truth in pictures]
        states = 5 * np.eye(WIDTH, dtype=np.float32)[axes]
        states += np.random.default_rng(0).normal(0, 0.01, states.shape).astype(np.float32)
        samples = [
            {
                "id": str(number),
                "image": str(image),
                "references": [f"a {truth['colour']} {truth['kind']}"] if captions else [],
                "attributes": truth,
            }
            for number, (image, truth) in enumerate(pictures)
        ]
        path = tmp_path_factory.mktemp("run") / "features"
        with FeaturesWriter(path, {"model": "m", **manifest}) as writer:
            rows = np.arange(len(samples))
            writer.append(samples, {site: states}, rows, rows, rows)
            writer.close()
        return Features.open(path)

    return write


@pytest.fixture(scope="session")
def features(write_features):
    return write_features()
