"""Batches of rows for training: epochs, resuming, windows of blocks, and rows that are refused."""

import itertools

import jax
import numpy as np
import pytest

from xlvlm_jax.solvers.sae.batches import ahead, batches, sample, take_rows, windows

Z = np.arange(46, dtype=np.float32).reshape(23, 2)
SEED = (0, 1)


class Stored:
    """Reads rows, as features on disk do."""

    def __init__(self, rows):
        self.rows, self.shape = rows, rows.shape

    def read(self, start, stop):
        return self.rows[start:stop]


def first(count, *arguments):
    return [np.asarray(b) for b in itertools.islice(batches(*arguments), count)]


@pytest.mark.parametrize("source", [Z, jax.numpy.asarray(Z), Stored(Z)])
def test_an_epoch_has_every_row_once(source):
    rows = np.concatenate(first(23, source, 4, SEED))  # four epochs
    for epoch in np.split(rows, 4):
        np.testing.assert_array_equal(np.sort(epoch[:, 0]), Z[:, 0])
    assert not np.array_equal(rows[:23], rows[23:46])


@pytest.mark.parametrize("source", [Z, Stored(Z)])
@pytest.mark.parametrize("number", [1, 5, 6, 13])
def test_a_run_goes_on_at_any_batch(source, number):
    whole = first(15, source, 4, SEED)
    np.testing.assert_array_equal(first(15 - number, source, 4, SEED, number), whole[number:])


def test_windows_mix_blocks_from_all_over():
    found = list(itertools.islice(windows(Stored(Z), SEED, 0, block=3, window=9), 3))
    assert [len(rows) for rows in found] in ([9, 9, 5], [8, 9, 6], [9, 8, 6])
    np.testing.assert_array_equal(np.sort(np.concatenate(found)[:, 0]), Z[:, 0])
    numbers = found[0][:, 0] // 2
    assert set(numbers // 3) != {0, 1, 2} and not np.all(np.diff(numbers) > 0)
    for skipped in (1, 9, 14, 23, 30):
        later = itertools.islice(windows(Stored(Z), SEED, skipped, block=3, window=9), 6)
        whole = itertools.islice(windows(Stored(Z), SEED, 0, block=3, window=9), 12)
        expected = np.concatenate(list(whole))[skipped:]
        rows = np.concatenate(list(later))
        np.testing.assert_array_equal(rows, expected[: len(rows)])


def test_a_sample_is_of_different_rows():
    for source in (Z, Stored(Z), jax.numpy.asarray(Z)):
        rows = sample(source, 9, SEED)
        assert len(rows) == len(set(rows[:, 0])) == 9
        assert len(sample(source, 99, SEED)) == 23
    np.testing.assert_array_equal(take_rows(Stored(Z), np.arange(3, 5)), Z[3:5])


def test_rows_that_are_not_finite_are_named():
    rows = Z.copy()
    rows[17, 1] = np.inf
    with pytest.raises(ValueError, match="Z has NaN or Inf in row 17, or values beyond float32"):
        first(6, Stored(rows), 4, SEED)
    short = Stored(Z)
    short.shape = (30, 2)
    with pytest.raises(ValueError, match="the source of Z gave"):
        first(9, short, 4, SEED)


def test_values_ahead_are_those_of_the_iterator():
    assert list(ahead(iter(range(5)))) == list(range(5))

    def failing():
        yield 1
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(ahead(failing()))
