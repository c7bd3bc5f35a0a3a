"""The same number of codes per row for all dictionaries: by hand, by method, messages."""

import numpy as np
import pytest

from xlvlm_jax import Concepts, project, sae
from xlvlm_jax.concept_benchmark import sparsity, with_mean_l0
from xlvlm_jax.concept_benchmark.sparsity import CLOSE

RNG = np.random.default_rng(0)
ATOMS = RNG.normal(size=(12, 6)).astype(np.float32)
ROWS = RNG.normal(size=(400, 6)).astype(np.float32)


def l0(concepts, rows=ROWS):
    return np.count_nonzero(np.asarray(project(rows, concepts))) / len(rows)


def autoencoder(architecture, **more):
    params = {"W_enc": ATOMS.T, "W_dec": ATOMS, "b_enc": np.zeros(12), "b_dec": np.ones(6)}
    constants = {"k": more.pop("k")} if "k" in more else {}
    return sae.Dictionary.of(params | more, sae.Settings(architecture, **constants))


THRESHOLDS = {
    "above all": np.full(12, 50.0),
    "all positive": np.linspace(0.1, 3, 12),
    "none": np.zeros(12),
    "one missing": np.linspace(0, 5.5, 12),
}


@pytest.mark.parametrize("threshold", THRESHOLDS.values(), ids=THRESHOLDS.keys())
def test_thresholds_give_exactly_k(threshold):
    """Whatever they were; those of features keep their ratios."""
    given = Concepts.from_dictionary(autoencoder("jumprelu", threshold=threshold))
    found = with_mean_l0(given, ROWS, 3)
    assert l0(found) == 3
    changed = np.asarray(found.dictionary.params["threshold"])
    if threshold.any():
        expected = np.maximum(threshold, threshold[threshold > 0].min())
        np.testing.assert_allclose(changed / changed[0], expected / expected[0], rtol=1e-5)
    kept, before = (np.asarray(project(ROWS, each)) for each in (found, with_none(given)))
    np.testing.assert_array_equal(kept[kept != 0], before[kept != 0])


def with_none(concepts):
    """The same without thresholds."""
    dictionary = concepts.dictionary
    params = dictionary.params | {"threshold": 0 * dictionary.params["threshold"]}
    return Concepts.from_dictionary(sae.Dictionary.of(params, dictionary.settings))


def test_fewer_positive_codes_than_asked_for():
    given = Concepts.from_dictionary(autoencoder("jumprelu", threshold=np.ones(12)))
    found = with_mean_l0(given, ROWS, 12)
    assert not np.asarray(found.dictionary.params["threshold"]).any()
    assert l0(found) == l0(with_none(given)) < 12


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 40.0])
def test_a_penalty_gives_k(alpha):
    """From any that it was learnt with."""
    found = with_mean_l0(Concepts.from_components(ATOMS, alpha=alpha), ROWS, 2)
    assert l0(found) == pytest.approx(2, abs=CLOSE + 0.01)
    assert found.options["alpha"] > 0
    np.testing.assert_array_equal(found.components, ATOMS)


def test_no_penalty_where_none_gives_as_many():
    """At most six codes of a nonnegative lasso in six columns are not zero."""
    assert with_mean_l0(Concepts.from_components(ATOMS), ROWS[:20], 9).options["alpha"] == 0


def test_others_stay_as_they_are():
    for given in (
        Concepts.from_dictionary(autoencoder("topk", k=4)),
        Concepts.from_components(ATOMS, "kmeans"),
        Concepts.from_components(ATOMS[:3], "pca"),
    ):
        assert with_mean_l0(given, ROWS, 2) is given


@pytest.mark.parametrize("k", [1, 12])
def test_blocks_of_rows_do_not_count(k, monkeypatch):
    concepts = Concepts.from_dictionary(autoencoder("jumprelu", threshold=np.ones(12)))
    whole = with_mean_l0(concepts, ROWS, k)
    monkeypatch.setattr(sparsity, "DENSE", 12 * 150)
    parts = with_mean_l0(concepts, ROWS, k)
    np.testing.assert_array_equal(
        parts.dictionary.params["threshold"], whole.dictionary.params["threshold"]
    )


def test_messages():
    given = Concepts.from_components(ATOMS)
    with pytest.raises(ValueError, match="k is 13; expected 1 to the 12 concepts"):
        with_mean_l0(given, ROWS, 13)
    with pytest.raises(ValueError, match="there are no rows to count codes of"):
        with_mean_l0(given, ROWS[:0], 2)
