"""Features of two made-up models on the same samples, whose states move in a known way."""

from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from ports import VLM
from xlvlm_jax import Concepts, Features
from xlvlm_jax.features.writer import FeaturesWriter

SITE = "norm"
WORDS = ("dog", "beach", "red", "happy", "forest", "the", "of", "snow")


# Of the final norm: the weight, of which the last of the words has most.
NORM = np.array([1, 1, 1, 1, 1, 1, 1, 100])


class Head:
    """A language-model head and a tokenizer of eight words, one per coordinate."""

    __class__ = VLM  # as far as isinstance sees
    directory = fingerprint = None
    attention_heads = MappingProxyType({})

    def unembed(self, x, through_norm=False):
        return np.asarray(x) * (NORM if through_norm else 1)

    def is_head(self, site):
        return False

    def is_before_norm(self, site):
        return site == "layers.3"

    @property
    def tokenizer(self):
        return self

    def __len__(self):
        return len(WORDS)

    def decode(self, ids):
        return WORDS[ids[0]]


@pytest.fixture
def head() -> Head:
    return Head()


@pytest.fixture
def write(tmp_path):
    """write(name, Z, ids=..., manifest={}, **fields) writes features with one row per id."""

    def write_features(name, Z, *, samples=None, rows=None, sites=(SITE,), **manifest) -> Features:
        count = len(Z)
        samples = samples or [{"id": f"s{i}", "image": f"{i}.jpg"} for i in range(count)]
        rows = np.arange(count) if rows is None else np.asarray(rows)
        with FeaturesWriter(tmp_path / name, manifest) as writer:
            states = {site: np.asarray(Z, np.float32) for site in sites}
            writer.append(samples, states, rows, rows * 0, rows * 0)
            writer.close()
        return Features.open(tmp_path / name)

    return write_features


@pytest.fixture
def states() -> tuple[np.ndarray, np.ndarray]:
    """Returns [30, 8] before and after: three groups along axes 0 to 2; group k moves along k + 1.

    The third group does not move.
    """
    random = np.random.default_rng(0)
    group = np.repeat(np.arange(3), 10)
    before = 6 * np.eye(8)[group] + random.normal(size=(30, 8)) * 0.1
    after = before + 5 * np.eye(8)[group + 1] * (group < 2)[:, None]
    return before.astype("f4"), after.astype("f4")


def learnt(Z, num_concepts=3) -> Concepts:
    import jax

    from xlvlm_jax import decompose

    return decompose(Z, num_concepts, "kmeans", key=jax.random.key(0))


@pytest.fixture
def concepts_of():
    return learnt


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path
