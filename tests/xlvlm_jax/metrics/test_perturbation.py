"""Targeted perturbation: by hand, against edited states, null values, messages."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from xlvlm_jax import metrics
from xlvlm_jax.metrics.probing import Probe, fit_probe

RNG = np.random.default_rng(0)


def planted(samples=120):
    """Two values along two axes, of which half of the samples have each."""
    positive = RNG.random((samples, 2)) < 0.5
    states = positive * 2.0 - 1 + RNG.normal(size=(samples, 2)) * 0.1
    return states, positive, np.ones_like(positive)


def test_by_hand():
    # Probes read an axis each; concept 0 is the first axis, so that without it all seem negative.
    states = np.float64([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    positive = states > 0
    probes = [Probe(axis, 0.0) for axis in np.eye(2)]
    chosen = [np.array([0]), np.array([1])]
    known = np.ones((4, 2), bool)
    losses = metrics.accuracy_losses(states, states + 1, np.eye(2), chosen, probes, positive, known)
    np.testing.assert_allclose(losses, [[0.5, 0], [0, 0.5]])
    assert metrics.targeted_perturbation(losses) == 0.5


def test_against_edited_states():
    states, positive, known = planted()
    known[:30, 1] = False
    coefficients, directions = RNG.normal(size=(120, 5)), RNG.normal(size=(5, 2))
    probes = [fit_probe(states, positive[:, j]) for j in range(2)]
    chosen = [np.array([0, 3]), np.array([1])]
    losses = metrics.accuracy_losses(
        states, coefficients, directions, chosen, probes, positive, known
    )
    for i, own in enumerate(chosen):
        left = coefficients.copy()
        left[:, own] = 0
        edited = states - coefficients @ directions + left @ directions
        for j, probe in enumerate(probes):
            here = known[:, j]
            before, after = (
                balanced_accuracy_score(positive[here, j], probe.says(x[here]))
                for x in (states, edited)
            )
            assert losses[i, j] == pytest.approx(before - after)


def test_random_directions_target_nothing():
    states, positive, known = planted(400)
    probes = [fit_probe(states, positive[:, j]) for j in range(2)]
    scores = []
    for _ in range(30):
        directions = RNG.normal(size=(8, 2))
        coefficients = states @ directions.T
        chosen = [RNG.choice(8, 2, replace=False) for _ in range(2)]
        losses = metrics.accuracy_losses(
            states, coefficients, directions, chosen, probes, positive, known
        )
        scores.append(metrics.targeted_perturbation(losses))
    assert np.mean(scores) == pytest.approx(0, abs=0.1)


@pytest.mark.wrong_types
def test_messages():
    states, positive, known = planted()
    probes = [Probe(axis, 0.0) for axis in np.eye(2)]
    with pytest.raises(ValueError, match=r"1 values have concepts; expected \[N, K\]"):
        metrics.accuracy_losses(states, states, np.eye(2), [np.array([0])], probes, positive, known)
    with pytest.raises(ValueError, match=r"losses have shape \(1, 1\); expected \[V, V\]"):
        metrics.targeted_perturbation(np.ones((1, 1)))
