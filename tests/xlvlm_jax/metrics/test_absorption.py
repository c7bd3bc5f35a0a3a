"""Absorption: by hand, against a loop, the extremes, messages."""

import numpy as np
import pytest

from xlvlm_jax import metrics

RNG = np.random.default_rng(0)


def test_by_hand():
    # Red; red buses; blue, which points away; green, at right angles.
    directions = np.float32([[1, 0], [1, 1], [-1, 0], [0, 1]])
    codes = np.float32([[2, 0, 0, 9], [0, 3, 0, 0], [1, 3, 0, 0], [4, 1, 2, 0]])
    # Evidence 2 | 3 | 1 + 3 | 4 + 1 - 2: the last one's own is more than all of it.
    found = [
        metrics.absorption(codes, directions, np.float32([5, 0]), np.array([0]), row)
        for row in np.eye(4, dtype=bool)
    ]
    np.testing.assert_allclose(found, [0, 1, 0.75, 0])
    every = np.ones(4, bool)
    mean = metrics.absorption(codes, directions, np.float32([1, 0]), np.array([0]), every)
    assert mean == pytest.approx(np.mean(found))
    both = metrics.absorption(codes, directions, np.float32([1, 0]), np.array([0, 1]), every)
    assert both == 0


def test_against_a_loop():
    codes, directions = RNG.random((20, 9)), RNG.normal(size=(9, 6))
    probe, own = RNG.normal(size=6), np.array([2, 5])
    unit, fractions = probe / np.linalg.norm(probe), []
    for row in codes:
        mine = sum(row[k] * (directions[k] @ unit) for k in own)
        total = sum(row[k] * (directions[k] @ unit) for k in range(9))
        others = [
            row[k] * (directions[k] @ unit)
            for k in range(9)
            if k not in own and directions[k] @ unit / np.linalg.norm(directions[k]) >= 0.1
        ]
        absorbed = sum(sorted(others)[-2:])
        absorbed = 0 if mine >= total else absorbed
        mine = max(mine, 0)
        fractions.append(absorbed / (absorbed + mine) if absorbed + mine else 1)
    found = metrics.absorption(codes, directions, probe, own, np.ones(20, bool), most=2)
    assert 0 < found < 1 and found == pytest.approx(np.mean(fractions))


def test_extremes():
    codes, directions = np.zeros((3, 2)), np.eye(2)
    probe, own = np.float64([1, 0]), np.array([0])
    # Without any evidence the own concept is silent too, unless it has all there is: none.
    assert metrics.absorption(codes, directions, probe, own, np.ones(3, bool)) == 1
    assert np.isnan(metrics.absorption(codes, directions, probe, own, np.zeros(3, bool)))
    scaled = metrics.absorption(
        codes + np.float64([2, 1]), directions * 7, probe * 3, own, np.ones(3, bool)
    )
    assert scaled == 0


@pytest.mark.wrong_types
def test_messages():
    codes, directions, probe = np.ones((3, 2)), np.eye(2), np.ones(2)
    with pytest.raises(ValueError, match=r"coefficients have shape \(3, 2\).*probe \(3,\)"):
        metrics.absorption(codes, directions, np.ones(3), np.array([0]), np.ones(3, bool))
    with pytest.raises(ValueError, match="no concept of its own; expected at least one"):
        metrics.absorption(codes, directions, probe, np.array([], int), np.ones(3, bool))
