"""Sizes that programs are compiled for."""

import pytest

from xlvlm_jax.solvers.buckets import (
    PADDED,
    SMALL,
    bucket_of_concepts,
    bucket_of_rows,
    is_small,
    room_for,
)


@pytest.mark.parametrize(
    ("N", "D", "rows"),
    [
        (4, 192, 16),
        (16, 192, 16),
        (17, 192, 24),
        (513, 192, 768),
        (620, 192, 768),
        (768, 192, 768),
        (769, 192, 1024),
        (3000, 4096, 3072),
        (100_000, 512, 100_000),
    ],
)
def test_rows(N, D, rows):
    assert bucket_of_rows(N, D) == rows


def test_rows_are_few_sizes_of_bounded_waste():
    small = {bucket_of_rows(N, 64) for N in range(16, SMALL // 64)}
    assert len(small) < 24
    for D, waste in ((64, 1.5), (1024, 1 + 1 / 8)):
        for N in range(2000, PADDED // D, 997):
            rows = bucket_of_rows(N, D)
            assert N <= rows <= waste * N


def test_concepts():
    assert {bucket_of_concepts(K, 620, 192) for K in range(1, 17)} == {16}
    assert {bucket_of_concepts(K, 620, 192) for K in range(17, 25)} == {24}
    assert bucket_of_concepts(20, 3000, 4096) == 20  # not is_small
    assert not is_small(3000, 4096, 20)
    assert {bucket_of_concepts(K, 620, 192, 8) for K in range(17, 25)} == {24}
    # Never more than there are rows, never fewer than asked for.
    assert bucket_of_concepts(5, 7, 3) == 7
    assert bucket_of_concepts(20, 5, 3) == 20


def test_room_for_the_history():
    assert [room_for(count) for count in (0, 100, 300, 1000)] == [16, 128, 512, 1024]
