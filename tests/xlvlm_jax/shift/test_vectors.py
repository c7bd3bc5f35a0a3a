"""Shift vectors: by hand, against numpy and scipy, properties, messages."""

import jax
import ml_dtypes
import numpy as np
import pytest
from scipy.stats import trim_mean

from xlvlm_jax import shift

RANDOM = np.random.default_rng(0)
A = RANDOM.standard_normal((60, 7)).astype(np.float32)
B = (A + RANDOM.standard_normal((60, 7)) + 2).astype(np.float32)
# Concept 3 has one sample, concept 4 none.
OF = np.append(RANDOM.integers(0, 3, 59), 3)
K = 5


def test_by_hand():
    a = np.array([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0]])
    b = np.array([[1.0, 0.0], [2.0, 1.0], [9.0, 9.0]])
    of = shift.assign(np.array([[0.9, 0.1], [0.8, 0.0], [0.1, 0.3]]))
    assert of.tolist() == [0, 0, 1]
    assert shift.counts(of, 3).tolist() == [2, 1, 0]
    moved = shift.concept_shift(a, b, of, 2)
    np.testing.assert_allclose(moved, [[0.5, 0.5], [np.nan, np.nan]])
    figures = shift.spread(a, b, of, 2)
    np.testing.assert_allclose(figures.consistency, [0, np.nan], atol=1e-6)
    np.testing.assert_allclose(figures.product, [0, np.nan], atol=1e-6)
    np.testing.assert_allclose(figures.magnitude, [0.5**0.5, np.nan], rtol=1e-6)
    np.testing.assert_allclose(figures.cosine_with_mean, [0.5**0.5, np.nan], rtol=1e-6)
    np.testing.assert_allclose(figures.product_with_mean, [0.5, np.nan], rtol=1e-6)
    np.testing.assert_allclose(
        shift.shifted(np.ones((2, 2)), moved, alpha=2), [[2, 2], [np.nan, np.nan]]
    )


def test_assignment_by_similarity_and_norms():
    concepts = np.float32([[1, 0], [0, 10]])
    states = np.float32([[3, 1], [1, 3], [2, 2.5], [0, 0]])
    assert shift.nearest(states, concepts, "cosine").tolist() == [0, 1, 1, 0]
    assert shift.nearest(states, concepts, "l2").tolist() == [0, 0, 0, 0]
    far, centres = A + 1000, B[:K] + 1000
    distance = np.linalg.norm(np.float64(far)[:, None] - np.float64(centres)[None], axis=2)
    np.testing.assert_array_equal(shift.nearest(far, centres, "l2"), distance.argmin(axis=1))
    moved = np.float32([[3, 0], [np.nan, np.nan], [0, 4]])
    np.testing.assert_allclose(
        shift.normalised(moved), [[0.6, 0], [np.nan, np.nan], [0, 0.8]], rtol=1e-6
    )
    unit = shift.shifted(np.float32([[0, 4], [0, 1], [0, 0]]), moved, unit_norm=True)
    np.testing.assert_allclose(unit, [[0.6, 0.8], [np.nan, np.nan], [0, 1]], rtol=1e-6)


@pytest.mark.wrong_types
def test_an_unknown_similarity():
    with pytest.raises(ValueError, match="assigned by 'norm'; expected 'cosine' or 'l2'"):
        shift.nearest(A, B[:K], "norm")


@pytest.mark.parametrize("reduce", ["mean", "median", "trimmed_mean"])
def test_the_shift_is_that_of_numpy_and_scipy(reduce):
    centre = {
        "mean": lambda x: x.mean(0),
        "median": lambda x: np.median(x, axis=0),
        "trimmed_mean": lambda x: trim_mean(x, 0.1),
    }[reduce]
    ours = jax.jit(shift.concept_shift, static_argnums=(3, 4))(A, B, OF, K, reduce)
    for concept in range(3):
        theirs = centre(B[concept == OF]) - centre(A[concept == OF])
        np.testing.assert_allclose(ours[concept], theirs, rtol=1e-5, atol=1e-6)
    assert np.isnan(ours[3:]).all()


def test_the_spread_is_the_mean_over_pairs():
    figures = shift.spread(A, B, OF, K)
    np.testing.assert_array_equal(shift.consistency(A, B, OF, K), figures.consistency)
    for concept in range(3):
        moves = (B - A)[concept == OF]
        units = moves / np.linalg.norm(moves, axis=1, keepdims=True)
        mean = moves.mean(0)
        pairs = ~np.eye(len(moves), dtype=bool)
        expected = {
            "consistency": (units @ units.T)[pairs].mean(),
            "product": (moves @ moves.T)[pairs].mean(),
            "cosine_with_mean": (units @ mean / np.linalg.norm(mean)).mean(),
            "product_with_mean": (moves @ mean).mean(),
            "magnitude": np.linalg.norm(mean),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(figures, name)[concept], value, rtol=1e-4)
    assert np.isnan(np.stack(figures)[:, 3:]).all()


def test_equal_shifts_are_consistent_and_hit():
    """If all samples move alike, consistency is 1 and the shifted concept is the new one."""
    step = np.arange(7, dtype=np.float32)
    assert np.allclose(shift.consistency(A, A + step, OF, K)[:3], 1, atol=1e-4)
    concepts = A[:3]
    moved = shift.shifted(concepts, shift.concept_shift(A, A + step, OF, K)[:3])
    np.testing.assert_allclose(moved, concepts + step, atol=1e-5)
    np.testing.assert_allclose(
        shift.recovery(concepts, moved, concepts + step, metric="l2"), 1, atol=1e-5
    )


def states(N, offset):
    """Returns two models' states with an offset, of concepts that move by 0, 10 and 1000."""
    rng = np.random.default_rng(0)
    a = (rng.standard_normal((N, 2), np.float32) + offset).astype(np.float32)
    of = rng.integers(0, 3, N).astype(np.int32)
    steps = np.array([[0, 1], [10, -10], [1000, 0]], np.float32)
    b = (a + steps[of] + rng.standard_normal((N, 2), np.float32)).astype(np.float32)
    return a, b, of


@pytest.mark.parametrize("offset", [pytest.param(0, marks=pytest.mark.slow), 10_000])
def test_figures_of_two_million_rows_are_those_in_float64(offset):
    a, b, of = states(2_000_000, np.float32(offset))
    moves = b.astype(np.float64) - a
    shifts = np.asarray(shift.concept_shift(a, b, of, 3))
    figures = shift.spread(a, b, of, 3)
    for k in range(3):
        own = moves[of == k]
        mean, deviation, count = own.mean(0), own.std(0), len(own)
        # What float32 holds of a mean, and 1e-6 of the deviation.
        assert (np.abs(shifts[k] - mean) <= 1e-6 * deviation + 1e-7 * np.abs(mean)).all()
        norms = np.linalg.norm(own, axis=1)
        units = own / norms[:, None]

        def over_pairs(rows, count=count):
            return ((rows.sum(0) ** 2).sum() - (rows**2).sum()) / count / (count - 1)

        expected = {
            "consistency": over_pairs(units),
            "product": over_pairs(own),
            "cosine_with_mean": (units @ mean).mean() / np.linalg.norm(mean),
            "product_with_mean": (own @ mean).mean(),
            "magnitude": np.linalg.norm(mean),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(figures, name)[k], value, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("reduce", ["median", "trimmed_mean"])
def test_centres_of_many_rows_are_those_in_float64(reduce):
    a, b, of = states(100_000, np.float32(10_000))
    centre = {"median": lambda x: np.median(x, axis=0), "trimmed_mean": lambda x: trim_mean(x, 0.1)}
    shifts = np.asarray(shift.concept_shift(a, b, of, 3, reduce))
    for k in range(3):
        theirs = centre[reduce](b[of == k].astype(np.float64))
        theirs = theirs - centre[reduce](a[of == k].astype(np.float64))
        np.testing.assert_allclose(shifts[k], theirs, rtol=1e-7, atol=1e-6)


@pytest.mark.wrong_types
def test_messages():
    with pytest.raises(ValueError, match=r"shapes \(60, 7\) and \(59, 7\).*expected \[N, D\]"):
        shift.concept_shift(A, B[1:], OF, K)
    with pytest.raises(ValueError, match="reduce is 'mode'; expected 'mean'"):
        shift.concept_shift(A, B, OF, K, "mode")


@pytest.mark.parametrize("reduce", ["mean", "median", "trimmed_mean"])
@pytest.mark.parametrize("traced", [False, True])
def test_samples_without_a_concept_count_for_none(reduce, traced):
    """The first of 12 have none, before the rest; under a trace, so has a number beyond K - 1."""
    of, some = np.where(np.arange(60) < 12, -1, OF % 3), slice(12, None)
    if traced:
        of[:6] = 4
    figures = [shift.counts, lambda of, K: shift.concept_shift(A, B, of, K, reduce)]
    figures += [lambda of, K: np.stack(shift.spread(A, B, of, K)) if not traced else 0]
    found = [jax.jit(f, static_argnums=1)(of, 3) if traced else f(of, 3) for f in figures]
    assert found[0].tolist() == np.bincount(of[some], minlength=3).tolist()
    rest = shift.concept_shift(A[some], B[some], of[some], 3, reduce)
    np.testing.assert_allclose(found[1], rest, rtol=1e-5, atol=1e-6)
    if not traced:
        rest = np.stack(shift.spread(A[some], B[some], of[some], 3))
        np.testing.assert_allclose(found[2], rest, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [-2, K])
def test_a_concept_that_is_not_there_is_refused(wrong):
    of = np.append(OF[1:], wrong)
    for figure in (shift.concept_shift, shift.spread):
        with pytest.raises(ValueError, match=f"concept {wrong}; expected 0 to 4, or -1 for none"):
            figure(A, B, of, K)
    with pytest.raises(ValueError, match=f"concept {wrong}; expected"):
        shift.counts(of, K)


def test_zeros_stay_where_there_is_no_direction():
    nothing = np.zeros((2, 3), "f4")
    assert not shift.normalised(nothing).any()
    assert not shift.shifted(nothing, nothing, unit_norm=True).any()


@pytest.mark.parametrize("reduce", ["mean", "median", "trimmed_mean"])
def test_many_bfloat16_rows_are_summed_in_float32(reduce):
    # numpy's own mean of them in bfloat16 stops growing at 256 rows, and says 0.73 for 1.49.
    rows = (1 + np.random.default_rng(5).random((2, 700, 3))).astype(ml_dtypes.bfloat16)
    of = np.arange(700) % 2
    narrow = shift.concept_shift(0 * rows[0], rows[1], of, 2, reduce=reduce)
    wide = shift.concept_shift(0 * rows[0].astype("f4"), rows[1].astype("f4"), of, 2, reduce=reduce)
    np.testing.assert_array_equal(narrow, wide)
    assert np.all(narrow > 1.3)
