"""Scores as plain records: means over seeds by hand, and what is written."""

import dataclasses

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


def test_all_numbers_are_means_over_seeds():
    fits = [Fit(0.6, 0.1, 0.2, 0.3, 8, precision=0.5, recall=0.7)]
    fits += [Fit(0.8, 0.3, 0.4, 0.5, 9, precision=0.7, recall=0.9)]
    rows = [
        DictionaryScores("a", "snmf", 3, bert={1: fit}, dead=dead, stability=stability)
        for fit, dead, stability in zip(fits, (1, 3), (0.5, 1.0), strict=True)
    ]
    row = mean_over_seeds(rows)
    assert dataclasses.astuple(row.bert[1]) == pytest.approx(
        (0.7, 0.2, 0.3, 0.4, 8.5, None, 0.6, 0.8)
    )
    assert (row.dead, row.stability) == (2, 0.75) and isinstance(row.dead, int)
    assert row.spread["bert top-1 precision"] == pytest.approx(0.02**0.5)


def test_per_sample_scores_are_not_part_of_the_json_values():
    row = mean_over_seeds([scores(1.0, 0.2), scores(2.0, 0.4)])
    described = row.to_dict()
    assert "arrays" not in described and described["seeds"] == 2
    again = DictionaryScores.from_dict(described)
    assert again.clip[1].mean == 1.5 and again.spread["overlap"] == pytest.approx(0.141421)


def test_attributes_are_means_over_seeds_too():
    rows = [
        DictionaryScores("a", "snmf", 3, attributes={"kind": {"concepts": a, "random": b}})
        for a, b in ((0.2, 0.1), (0.4, 0.1), (0.9, 0.4))
    ]
    row = mean_over_seeds(rows)
    assert row.attributes == {"kind": pytest.approx({"concepts": 0.5, "random": 0.2})}
    assert row.spread["attribute kind"] == pytest.approx(0.13**0.5)
    assert row.spread["attribute kind random"] == pytest.approx(0.03**0.5)
