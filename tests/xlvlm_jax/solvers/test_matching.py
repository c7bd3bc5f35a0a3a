"""Matching of dictionaries of different sizes."""

import itertools

import numpy as np
import pytest

from xlvlm_jax.solvers import matching


@pytest.mark.parametrize("sizes", [(3, 5), (5, 3), (4, 4)])
def test_dictionaries_of_different_sizes_are_matched_in_part(sizes):
    """Compares with every one-to-one matching of the smaller into the larger."""
    random = np.random.default_rng(0)
    a, b = (random.normal(size=(size, 6)) for size in sizes)
    rows, columns, cosines = matching.match_any(a, b)
    similarity = matching.unit_rows(a) @ matching.unit_rows(b).T
    if sizes[0] > sizes[1]:
        similarity = similarity.T
    small, large = similarity.shape
    best = max(
        similarity[range(small), list(chosen)].sum()
        for chosen in itertools.permutations(range(large), small)
    )
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == small
    assert cosines.sum() == pytest.approx(best)
