"""Scores as plain records: means over seeds by hand, and what is written."""

import numpy as np
import pytest

from xlvlm_jax.concepts.scores.records import DictionaryScores, Fit, mean_over_seeds


def scores(mean, overlap, noise=None):
    fit = Fit(mean, 0.1, 0.2, 0.1, 9, noise=noise)
    arrays = {"clip top-1": np.ones(9)}
    return DictionaryScores("a", "snmf", 3, clip={1: fit}, overlap=overlap, arrays=arrays)


def test_means_over_seeds_by_hand():
    rows = [scores(1.0, 0.2, 0.5), scores(2.0, 0.4, 0.5), scores(3.0, 0.6, 0.5)]
    row = mean_over_seeds(rows)
    assert (row.clip[1].mean, row.clip[1].noise, row.clip[1].num_samples) == (2, 0.5, 9)
    assert row.overlap == pytest.approx(0.4) and row.hoyer is None and row.seeds == 3
    assert row.spread["clip top-1"] == pytest.approx(1)
    assert row.spread["overlap"] == pytest.approx(0.2)
    assert row.spread["clip top-1 random"] == pytest.approx(0) and "hoyer" not in row.spread
    assert mean_over_seeds(rows[:1]) is rows[0]


def test_per_sample_scores_are_not_part_of_the_json_values():
    row = mean_over_seeds([scores(1.0, 0.2), scores(2.0, 0.4)])
    described = row.to_dict()
    assert "arrays" not in described and described["seeds"] == 2
    again = DictionaryScores.from_dict(described)
    assert again.clip[1].mean == 1.5 and again.spread["overlap"] == pytest.approx(0.141421)
