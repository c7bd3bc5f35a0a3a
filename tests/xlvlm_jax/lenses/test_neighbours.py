"""Nearest neighbours of states: against scikit-learn, from disk, messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from xlvlm_jax import Features, lenses
from xlvlm_jax.concepts import grounding
from xlvlm_jax.features.writer import FeaturesWriter
from xlvlm_jax.lenses import neighbours


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_they_are_scikit_learns(seed, k):
    random = np.random.default_rng(seed)
    states = random.standard_normal((2, 5, 7)).astype(np.float32)
    index = random.standard_normal((40, 7)).astype(np.float32)
    found = lenses.nearest(states, index, k)
    reference = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(index)
    distances, rows = reference.kneighbors(states.reshape(-1, 7))
    np.testing.assert_array_equal(found.rows.reshape(-1, k), rows)
    np.testing.assert_allclose(found.cosine.reshape(-1, k), 1 - distances, atol=1e-5)


def test_tiles_and_blocks_do_not_count(monkeypatch):
    random = np.random.default_rng(3)
    states, index = random.standard_normal((11, 5)), random.standard_normal((50, 5))
    index[30:] = index[:20]  # ties go to the earlier row
    states, index = states.astype(np.float32), index.astype(np.float32)
    whole = lenses.nearest(states, index, 8)
    monkeypatch.setattr(grounding, "_TILE_ROWS", 7)
    monkeypatch.setattr(neighbours, "BLOCK", 4)
    parts = lenses.nearest(states, index, 8)
    np.testing.assert_array_equal(parts.rows, whole.rows)
    np.testing.assert_allclose(parts.cosine, whole.cosine, atol=1e-6)


def test_an_index_on_disk(tmp_path, three_words):
    states = np.eye(3, dtype=np.float32)
    with FeaturesWriter(tmp_path, {}) as writer:
        samples = [{"id": "a", "prediction": "a dog"}, {"id": "b", "references": ["the beach"]}]
        writer.append(
            samples, {"s": states}, np.array([0, 1, 1]), np.arange(3), np.array([0, 1, 2])
        )
        writer.close()
    features = Features.open(tmp_path)
    found = lenses.nearest(np.float32([0, 2, 1]), features.stored("s"), 2)
    assert found.rows.tolist() == [1, 2]
    assert repr(found) == "Neighbours(rows: int32[2])"
    assert neighbours.describe(features, found.rows, three_words) == {
        1: ("beach", "the beach"),
        2: ("the", "the beach"),
    }


@pytest.mark.wrong_types
def test_messages():
    with pytest.raises(ValueError, match="states are 3 wide, but the index has width 2"):
        lenses.nearest(np.ones((1, 3)), np.ones((2, 2)))
    with pytest.raises(ValueError, match="k is 3; expected 1 to 2"):
        lenses.nearest(np.ones((1, 2)), np.ones((2, 2)), 3)


def test_cosines_are_float32_on_every_backend():
    """Those of hidden states lie too close together for the precision of a TPU's default."""
    rows, best = jnp.ones((2, 3)), jnp.zeros((2, 1))
    given = (rows, rows, best, best.astype(int), jnp.int32(0), jnp.int32(2))
    with jax.default_matmul_precision("bfloat16"):
        assert "[HIGHEST, HIGHEST]" in neighbours._merged.lower(*given, k=1).as_text()
