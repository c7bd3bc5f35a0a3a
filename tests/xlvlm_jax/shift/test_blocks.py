"""Shifts read block by block equal those of rows in memory, also where float32 is too coarse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from xlvlm_jax import Concepts, decompose, project
from xlvlm_jax.shift import Pairs, analyse, blocks, ground_samples, vectors
from xlvlm_jax.storage.zarr_rows import StoredRows, create_array, wait

N, M, D, K = 300, 250, 6, 4


@pytest.fixture
def stored(tmp_path):
    """stored(name, Z) returns the rows on disk."""

    def write(name, Z):
        array = create_array(tmp_path / name, "float32", Z.shape)
        wait(array.write(Z))
        return StoredRows(tmp_path / name, len(Z))

    return write


@pytest.fixture
def drawn():
    """Returns original and fine-tuned rows, pairs in random order, and concepts of the pairs."""
    rng = np.random.default_rng(0)
    before = rng.standard_normal((N, D)).astype("f4")
    after = rng.standard_normal((N, D)).astype("f4") + 2
    pairs = Pairs(np.sort(rng.permutation(N)[:M]), rng.permutation(N)[:M], N)
    assignment = rng.integers(0, K - 1, M)
    assignment[7] = K - 1  # one sample alone
    return before, after, pairs, assignment


def test_two_samples_of_one_concept_by_hand():
    before = np.zeros((3, 2), "f4")
    after = np.array([[2, 0], [0, 4], [9, 9]], "f4")
    rows = np.arange(3)
    found = blocks.moves(before, after, Pairs(rows, rows, 3), np.array([0, 0, 1]), 2)
    np.testing.assert_allclose(found.shifts[0], [1, 2])
    assert found.counts.tolist() == [2, 1] and np.isnan(found.shifts[1]).all()
    root = 5**0.5
    expected = {
        "consistency": 0,
        "product": 0,
        "cosine_with_mean": (1 + 2) / root / 2,
        "product_with_mean": (2 + 8) / 2,
        "magnitude": root,
    }
    for name, value in expected.items():
        figure = getattr(found.spread, name)
        np.testing.assert_allclose(figure[0], value, atol=1e-6)
        assert np.isnan(figure[1])


def test_rows_that_activate_no_concept_shift_none():
    before, rows = np.zeros((5, 2), "f4"), np.arange(5)
    after = np.array([[1, 0], [3, 0], [9, 9], [0, 2], [0, 6]], "f4")
    codes = np.float32([[1, 0], [2, 0], [0, 0], [0, 1], [0, 3]])
    concepts = Concepts(np.eye(2, dtype="f4"), codes)
    assert blocks.assigned(concepts, before).tolist() == [0, 0, -1, 1, 1]
    found = analyse(before, after, Pairs(rows, rows, 5), concepts, concepts)
    assert found.counts.tolist() == [2, 2] and found.rows["common"] == 5
    np.testing.assert_allclose(found.shifts, [[2, 0], [0, 4]])


@pytest.mark.parametrize("reduce", ["mean", "median", "trimmed_mean"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_blocks_give_what_all_rows_in_memory_give(drawn, stored, monkeypatch, reduce, on_disk):
    before, after, pairs, assignment = drawn
    a, b = jnp.asarray(before)[pairs.original], jnp.asarray(after)[pairs.finetuned]
    shifts = vectors.concept_shift(a, b, assignment, K, reduce)
    spread = vectors.spread(a, b, assignment, K)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 8 * D * 32)  # the last block is not full
    monkeypatch.setattr(blocks, "CENTRED_BYTES", 8 * D * 100)  # several groups of concepts
    given = (stored("a", before), stored("b", after)) if on_disk else (before, after)
    found = blocks.moves(*given, pairs, assignment, K, reduce)
    np.testing.assert_allclose(found.shifts, shifts, rtol=1e-5, atol=1e-6)
    for name, figure in spread._asdict().items():
        np.testing.assert_allclose(getattr(found.spread, name), figure, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(found.counts, np.bincount(assignment, minlength=K))


def test_pairs_in_random_order_read_each_row_once(drawn, stored, monkeypatch):
    """Reading all rows for each block of pairs would take N^2 time."""
    before, after, pairs, assignment = drawn
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 8 * D * 16)
    expected = blocks.moves(before, after, pairs, assignment, K)
    given, read = (stored("a", before), stored("b", after)), []
    for name in ("read", "take"):
        plain = getattr(StoredRows, name)

        def counted(self, *rows, plain=plain):
            found = plain(self, *rows)
            read.append(len(found))
            return found

        monkeypatch.setattr(StoredRows, name, counted)
    found = blocks.moves(*given, pairs, assignment, K)
    np.testing.assert_allclose(found.shifts, expected.shifts, rtol=1e-6)
    assert sum(read) <= 4 * 2 * M


def test_trimmed_means_are_scipys(drawn):
    before, after, pairs, assignment = drawn
    found = blocks.moves(before, after, pairs, assignment, K, "trimmed_mean").shifts
    for k in range(K - 1):
        own = assignment == k
        a, b = before[pairs.original[own]], after[pairs.finetuned[own]]
        expected = stats.trim_mean(b, 0.1, axis=0) - stats.trim_mean(a, 0.1, axis=0)
        np.testing.assert_allclose(found[k], expected, atol=1e-6)


def test_the_shift_of_far_rows_is_exact(drawn):
    """Rows around 1e6, whose sums float32 would round to 1e3."""
    before, _, pairs, assignment = drawn
    before = np.round(before) + np.float32(2**20)
    found = blocks.moves(before, before + 1, Pairs(*[pairs.original] * 2, N), assignment, K)
    np.testing.assert_array_equal(found.shifts[:-1], 1)
    np.testing.assert_allclose(found.spread.consistency[:-1], 1, rtol=1e-6)


@pytest.mark.wrong_types
def test_an_unknown_centre_is_refused(drawn):
    before, after, pairs, assignment = drawn
    with pytest.raises(ValueError, match="reduce is 'mode'; expected 'mean', 'median' or"):
        blocks.moves(before, after, pairs, assignment, K, "mode")


def test_an_analysis_of_rows_on_disk_is_that_of_arrays(drawn, stored):
    before, after, pairs, _ = drawn
    learnt = [decompose(Z, K, "kmeans", key=jax.random.key(0)) for Z in (before, after)]
    held = analyse(before, after, pairs, *learnt)
    on_disk = stored("a", before), stored("b", after)
    found = analyse(*on_disk, pairs, *learnt)
    np.testing.assert_array_equal(found.shifts, held.shifts)
    ids = [str(row) for row in range(N)]
    images = ground_samples(found, *learnt, *on_disk, ids, ids, num_images=5).images
    nearest = np.argsort(-np.asarray(project(after, learnt[1])), axis=0, kind="stable")[:5]
    expected = [[ids[row] for row in nearest[:, k]] for k in found.matching]
    assert images["finetuned"] == expected
    assert images == ground_samples(held, *learnt, before, after, ids, ids, num_images=5).images
