"""A small run directory: drawn scenes, made-up states, and given concepts."""

import json
from pathlib import Path

import numpy as np
import pytest

from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.data import scenes
from xlvlm_jax.features.writer import FeaturesWriter

SITE = "language_model.model.norm"
NUM_SAMPLES = 24


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> list[tuple[Path, dict]]:
    """Returns (image, attributes) of some scenes."""
    root = tmp_path_factory.mktemp("scenes")
    scenes.write(root, train=NUM_SAMPLES)
    attributes = json.loads((root / "attributes.json").read_text())
    images = sorted((root / "train2014").glob("*.jpg"))
    return [(image, attributes[str(int(image.stem[-12:]))]) for image in images]


@pytest.fixture
def samples(pictures) -> list[dict]:
    return [
        {
            "id": f"sample-{i}",
            "image": str(image),
            "prompt": "Describe the image.",
            "prediction": f"caption {i}: a {truth['colour']} {truth['kind']}",
            "attributes": truth,
        }
        for i, (image, truth) in enumerate(pictures)
    ]


@pytest.fixture
def activations() -> np.ndarray:
    """Returns activations of 3 concepts with 6, 14 and 3 rows; the last row activates none."""
    assigned = np.array([0] * 6 + [1] * 14 + [2] * 3)
    rng = np.random.default_rng(0)
    codes = rng.uniform(0.1, 0.9, (NUM_SAMPLES, 3)).astype(np.float32)
    codes[np.arange(NUM_SAMPLES - 1), assigned] += 1
    codes[-1] = 0
    return codes


@pytest.fixture
def write_run(tmp_path, samples):
    """write_run(activations, name=..., words=...) writes features/ and a directory of concepts."""

    def write(codes, samples=samples, words=None, name="concepts", source=None) -> Path:
        run = tmp_path / "run"
        K = codes.shape[1]
        if not (run / "features").exists():
            manifest = {
                "model": "tiny",
                "selection": {"mode": "token-of-interest", "argument": "dog"},
            }
            with FeaturesWriter(run / "features", manifest) as writer:
                rows = np.arange(len(samples))
                states = {SITE: np.zeros((len(rows), 4), np.float32)}
                writer.append(samples, states, rows, rows * 0, rows * 0)
                writer.close()
        Concepts(
            np.zeros((K, 4), np.float32),
            codes,
            objective=123.4,
            iterations=7,
            words=words or [[f"word{k}", f"other{k}"] for k in range(K)],
            source={"site": SITE, "explained_variance": 0.71} if source is None else source,
        ).save(run / name)
        return run

    return write
