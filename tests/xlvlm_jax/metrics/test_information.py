"""Information of concepts on attributes: by hand, against scikit-learn, null values, messages."""

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from xlvlm_jax import metrics
from xlvlm_jax.metrics import information as module
from xlvlm_jax.metrics.labels import factorise

RNG = np.random.default_rng(0)


def test_classes_by_hand():
    codes = np.float32([[0], [1], [2], [3], [4], [0], [-1]])
    assert module.classes_of(codes, 2)[:, 0].tolist() == [0, 1, 1, 2, 2, 0, 1]
    assert module.classes_of(np.ones((3, 1), np.float32), 4)[:, 0].tolist() == [1, 1, 1]


def test_information_by_hand():
    # Halves: one bit, of which 1 / 2N nats are expected by chance.
    colours = factorise(["red", "blue"] * 4)
    codes = np.tile(np.float32([[2, 1, 0], [0, 1, 0]]), (4, 1))
    found = metrics.attribute_information(codes, [colours])
    np.testing.assert_allclose(found, [[1 - 1 / (16 * np.log(2))], [0], [0]], rtol=1e-12)


def test_information_against_scikit_learn():
    codes = np.maximum(RNG.normal(size=(300, 4)), 0)
    values = (codes[:, 1] > 0.3).astype(int) + (RNG.random(300) < 0.3)
    classes = module.classes_of(codes)
    labels = factorise([*values[:250], *[None] * 50])
    found = metrics.attribute_information(codes, [labels])
    entropy = mutual_info_score(values[:250], values[:250])
    for k in range(4):
        shared = mutual_info_score(values[:250], classes[:250, k])
        chance = (len(set(classes[:250, k])) - 1) * (len(set(values[:250])) - 1) / 500
        assert found[k, 0] == pytest.approx(max(shared - chance, 0) / entropy)


def test_independent_codes_tell_nothing():
    codes, labels = RNG.normal(size=(2000, 20)), factorise(RNG.integers(0, 8, 2000).tolist())
    assert metrics.attribute_information(codes, [labels]).max() < 0.01


def test_disentanglement_by_hand():
    # Weights 3 and 1; the first tells of one attribute alone, the second of both alike.
    information = np.array([[3, 0], [0.5, 0.5]])
    assert metrics.disentanglement(information) == pytest.approx(3 / 4)
    shares = np.array([3, 0.5]) / 3.5
    first = 1 + (shares * np.log2(shares)).sum()
    assert metrics.completeness(information) == pytest.approx((3.5 * first + 0.5) / 4)
    assert np.isnan(metrics.disentanglement(np.zeros((2, 2))))


def test_order_does_not_matter():
    information = RNG.random((6, 3))
    moved = information[RNG.permutation(6)][:, RNG.permutation(3)]
    assert metrics.disentanglement(moved) == pytest.approx(metrics.disentanglement(information))
    assert metrics.completeness(moved) == pytest.approx(metrics.completeness(information))


@pytest.mark.wrong_types
def test_messages():
    labels = factorise(["a", "b"])
    with pytest.raises(ValueError, match="has 2 values for 3 samples; expected one per sample"):
        metrics.attribute_information(np.ones((3, 1), np.float32), [labels])
    with pytest.raises(ValueError, match="at least one class, got 0"):
        module.classes_of(np.ones((2, 1), np.float32), 0)
    with pytest.raises(ValueError, match=r"shape \(2, 1\).*expected \[K, A\] of two or more"):
        metrics.disentanglement(np.ones((2, 1)))
    with pytest.raises(ValueError, match="a least value of -1"):
        metrics.disentanglement(-np.eye(2))
