"""Monosemanticity: by hand, against the definition, properties, messages."""

import numpy as np
import pytest
import torch

from xlvlm_jax import metrics

RNG = np.random.default_rng(0)


def units(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_monosemanticity_by_hand():
    images = np.float32([[1, 0], [1, 0], [0, 1]])
    # The first is active in the two images that are alike. The second in two that are not. The
    # third in all: scaled to 0, 1/2, 1 only the last two count. The fourth in one alone.
    codes = np.float32([[1, 2, 1, 0], [1, 0, 2, 0], [0, 2, 3, 7]])
    scores = metrics.monosemanticity(codes, images)
    np.testing.assert_allclose(scores, [1, 0, 0, np.nan], atol=1e-9)
    assert metrics.mean_similarity(images) == pytest.approx(1 / 3)


def test_monosemanticity_against_the_sum_over_pairs():
    codes, images = RNG.normal(size=(12, 5)), units(RNG.normal(size=(12, 4)))
    scaled = (codes - codes.min(0)) / (codes.max(0) - codes.min(0))
    e = torch.tensor(images)
    cosines = torch.nn.functional.cosine_similarity(e[:, None], e[None], dim=-1).numpy()
    first, second = np.triu_indices(12, 1)
    weights = scaled[first] * scaled[second]
    expected = (weights * cosines[first, second, None]).sum(0) / weights.sum(0)
    np.testing.assert_allclose(metrics.monosemanticity(codes, images), expected, rtol=1e-6)
    assert metrics.mean_similarity(images) == pytest.approx(cosines[first, second].mean())


def test_shift_scale_and_order_of_samples_do_not_matter():
    codes, images = RNG.normal(size=(12, 5)), units(RNG.normal(size=(12, 4)))
    order = RNG.permutation(12)
    again = metrics.monosemanticity(3 * codes[order] + 7, images[order])
    np.testing.assert_allclose(again, metrics.monosemanticity(codes, images), rtol=1e-6)


def test_a_concept_that_all_activate_alike_has_no_score():
    assert np.isnan(metrics.monosemanticity(np.ones((3, 1)), np.eye(3))).all()


@pytest.mark.wrong_types
def test_messages():
    with pytest.raises(ValueError, match="activations of 3 samples but 2 images; expected one per"):
        metrics.monosemanticity(np.ones((3, 1)), np.eye(2))
    with pytest.raises(ValueError, match="similarity needs two images or more, got 1"):
        metrics.mean_similarity(np.eye(2)[:1])
