"""Recovery, matching, overlap and correlation: by hand, against scipy, messages."""

import numpy as np
import pytest
from scipy.stats import pearsonr

from xlvlm_jax import shift

RANDOM = np.random.default_rng(0)
METRICS = ("cosine", "l2")


def test_matching_undoes_a_permutation():
    order = RANDOM.permutation(7)
    concepts = RANDOM.standard_normal((7, 9))
    found = shift.match(concepts, 3 * concepts[order] + 0.1 * RANDOM.standard_normal((7, 9)))
    np.testing.assert_array_equal(order[found], np.arange(7))


def test_recovery_by_hand():
    u, v = np.array([[1.0, 1.0]]), np.array([[1.0, 0.0]])
    np.testing.assert_allclose(shift.recovery(u, u, v), 0, atol=1e-6)
    np.testing.assert_allclose(shift.recovery(u, v, v), 2**0.5 - 1, rtol=1e-6)
    np.testing.assert_allclose(shift.recovery(u, (u + v) / 2, v, metric="l2"), 0.5, rtol=1e-6)


def test_what_can_not_be_recovered_is_nan():
    """By cosine a zero vector and an orthogonal one, by l2 one that is already there."""
    u, s, v = np.float32([[0, 0], [0, 1], [1, 0]]), np.ones((3, 2), "f4"), np.float32([[1, 0]] * 3)
    found = [np.isnan(shift.recovery(u, s, v, metric=metric)).tolist() for metric in METRICS]
    assert found == [[True, True, False], [False, False, True]]


def test_correlation():
    a = np.array([1.0, 2.0, 3.0, np.nan, 5.0])
    found = shift.correlation(a, np.array([2.0, 4.0, 6.0, 0.0, np.nan]))
    assert (found.r, found.count) == (pytest.approx(1), 3)
    assert np.isnan(shift.correlation(a[:2], a[:2]).r)
    assert np.isnan(shift.correlation(a, np.ones(5)).r)


def test_the_correlation_is_scipys():
    a, b = RANDOM.standard_normal((2, 20))
    found = shift.correlation(a, a + b)
    assert (found.r, found.p_value) == pytest.approx(tuple(pearsonr(a, a + b)))


def test_overlap_by_hand():
    found = [["dog", "red", "red"], [], ["a", "b"]]
    wanted = [["red", "dog", "cat"], ["dog"], ["c"]]
    np.testing.assert_allclose(shift.overlap(found, wanted, 4), [0.5, 0, 0])
    # Of the six pairs that are not each other's match, one shares a word.
    assert shift.mismatched_overlap(found, wanted, 4) == pytest.approx(1 / 4 / 6)
    assert np.isnan(shift.mismatched_overlap(found[:1], wanted[:1], 4))


def test_permuting_concepts_permutes_the_overlap():
    words = [[f"w{j}" for j in RANDOM.permutation(9)[:5]] for _ in range(12)]
    found, wanted, order = words[:6], words[6:], RANDOM.permutation(6)
    np.testing.assert_array_equal(
        shift.overlap([found[i] for i in order], [wanted[i] for i in order], 5),
        shift.overlap(found, wanted, 5)[order],
    )


@pytest.mark.wrong_types
def test_messages():
    A = np.ones((4, 7))
    with pytest.raises(ValueError, match=r"\(4, 7\) and \(3, 7\)"):
        shift.match(A, A[:3])
    with pytest.raises(ValueError, match="metric is 'angle'; expected"):
        shift.recovery(A, A, A, metric="angle")
    with pytest.raises(ValueError, match="expected the same"):
        shift.recovery(A, A, A[:3])
    with pytest.raises(ValueError, match="1 and 2 concepts; expected equally many"):
        shift.overlap([[]], [[], []], 3)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        shift.overlap([[]], [[]], 0)
