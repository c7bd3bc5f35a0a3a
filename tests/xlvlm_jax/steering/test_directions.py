"""Directions that tell two groups apart: by hand, against scikit-learn, properties, messages."""

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.decomposition import PCA

from xlvlm_jax import steering
from xlvlm_jax.steering import directions

METHODS = (steering.pca_vector, steering.lat_vector, steering.probe_vector)


@pytest.mark.parametrize("pairs", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("seed", range(4))
def test_what_few_pairs_share_is_the_direction_of_lat(pairs, seed):
    """If all signs came out equal, centring would leave only what the pairs differ by."""
    source = np.float32([[0.1, -0.1]]) * np.arange(pairs, dtype=np.float32)[:, None]
    target = source[::-1] + np.float32([[30, 40]])
    found = steering.lat_vector(source, target, seed=seed)
    np.testing.assert_allclose(found, [30, 40], atol=1)
    signs = np.sign(directions.random_differences(source, target, seed=seed)[:, 0])
    assert signs.sum() == pairs % 2


@pytest.fixture(scope="module")
def groups() -> tuple[np.ndarray, np.ndarray]:
    """Returns states that differ along the first axis and spread most along the second."""
    rng = np.random.default_rng(0)
    spread = np.float32([0.3, 1.5, 0.5, 0.2, 0.2])
    source, target = (spread * rng.normal(size=(n, 5)).astype(np.float32) for n in (37, 24))
    return source, target + np.float32([4, 1, 0, 0, 0])


def test_by_hand():
    # All lie on one line, so that every direction is that line: the vector is the mean difference.
    source, target = np.float32([[0, 0], [3, 4]]), np.float32([[6, 8], [9, 12]])
    for method in METHODS:
        np.testing.assert_allclose(method(source, target), [6, 8], rtol=1e-5)


def test_pairs_of_pca_are_all_or_those_given(groups):
    source, target = groups
    every = (target[None] - source[:, None]).reshape(-1, 5)
    _, _, axes = np.linalg.svd(every.astype(np.float64), full_matrices=False)
    delta = target.mean(0) - source.mean(0)
    expected = (delta @ axes[0]) * axes[0]
    np.testing.assert_allclose(steering.pca_vector(source, target), expected, atol=1e-4)
    pairs = target - source[:24]
    u = np.linalg.svd(pairs)[2][0]
    found = steering.pca_vector(source, target, pairs)
    np.testing.assert_allclose(found, (delta @ u) * u, atol=1e-4)


def test_lat_is_the_first_component_of_scikit_learn(groups):
    source, target = groups
    differences = directions.random_differences(source, target, seed=3)
    # Every state of the larger group is in one difference, either way round.
    assert len(differences) == 37
    found = np.abs(differences[:, None, None] - (target[:, None] - source)[None])
    other = np.abs(differences[:, None, None] + (target[:, None] - source)[None])
    fits = (found.max(-1) < 1e-6) | (other.max(-1) < 1e-6)
    assert fits.any((0, 1)).all() and fits.any((0, 2)).all()
    assert {*np.sign(differences[:, 0])} == {-1, 1}
    u = PCA(1, svd_solver="full").fit(differences.astype(np.float64)).components_[0]
    delta = target.mean(0) - source.mean(0)
    vector = steering.lat_vector(source, target, seed=3)
    np.testing.assert_allclose(vector, (delta @ u) * u, atol=1e-4)


@pytest.mark.parametrize("penalty", [0.1, 10.0])
def test_the_normal_of_a_probe_minimises_its_loss(groups, penalty):
    states = np.concatenate(groups).astype(np.float64)
    states = (states - states.mean(0)) / (states - states.mean(0)).std()
    y = np.repeat([-1.0, 1.0], [37, 24])
    weights = np.repeat([61 / (2 * 37), 61 / (2 * 24)], [37, 24])  # the groups count alike

    def loss(parameters):
        margins = y * (states @ parameters[:5] + parameters[5])
        norm = parameters[:5] @ parameters[:5]
        return weights @ np.logaddexp(0, -margins) + penalty * norm / 2

    normal = minimize(loss, np.zeros(6), tol=1e-10).x[:5]
    vector = steering.probe_vector(*groups, penalty=penalty)
    unit = vector / np.linalg.norm(vector)
    np.testing.assert_allclose(unit, normal / np.linalg.norm(normal), atol=1e-3)


def test_they_point_to_the_target_and_project_the_mean_difference(groups):
    source, target = groups
    delta = target.mean(0) - source.mean(0)
    for method in METHODS:
        forth, back = method(source, target), method(target, source)
        # v is the part of delta along v: |v|^2 = <v, delta>, which is positive.
        assert np.vdot(forth, forth) == pytest.approx(np.vdot(forth, delta), rel=1e-4)
        if method is not steering.lat_vector:  # its pairs are drawn anew
            np.testing.assert_allclose(forth, -np.asarray(back), atol=2e-3)
        moved = method(source + 5, target + 5)
        np.testing.assert_allclose(moved, forth, atol=2e-3)


def test_messages():
    same = np.ones((3, 2), np.float32)
    with pytest.raises(ValueError, match="two groups of states that differ"):
        steering.pca_vector(same, same)
    with pytest.raises(ValueError, match="source and target states are equal"):
        steering.lat_vector(same, same)
    with pytest.raises(ValueError, match="all states are equal"):
        steering.probe_vector(same, same)
    twice = np.float32([[0, 1], [2, 3]])
    for method in METHODS:
        with pytest.raises(ValueError, match="states are equal on average, so that no direction"):
            method(twice, twice[::-1])
    with pytest.raises(ValueError, match="penalty is 0; expected a positive number"):
        steering.probe_vector(same, same + 1, penalty=0)
    with pytest.raises(ValueError, match="at least one of each"):
        steering.lat_vector(same[:0], same)
