"""ITI: heads that know and heads that do not, against scikit-learn, properties, messages."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from xlvlm_jax import Features, steering
from xlvlm_jax.features.writer import FeaturesWriter

SITES = ("layers.0.heads", "layers.1.heads")
COUNT, WIDTH = 3, 4
KNOWING = {("layers.0.heads", 2), ("layers.1.heads", 0)}  # the heads that tell the answers apart


@pytest.fixture
def made(tmp_path):
    """Returns features of 60 answers at two sites of three heads, and which of them are "yes"."""
    random = np.random.default_rng(0)
    yes = np.arange(60) % 3 == 0
    states = {
        site: random.standard_normal((60, COUNT * WIDTH)).astype(np.float32) for site in SITES
    }
    for site, head in KNOWING:
        states[site][yes, head * WIDTH + 1] += 6
    arguments = {"model": "m", "fingerprint": "f", "attention heads": dict.fromkeys(SITES, COUNT)}
    number = np.arange(60)
    with FeaturesWriter(tmp_path / "features", arguments) as writer:
        samples = [
            {
                "id": str(i),
                "image": f"{i}.png",
                "image_id": str(i),
                "prompt": "?",
                "references": ["a"],
                "prediction": "yes" if is_yes else "no",
            }
            for i, is_yes in enumerate(yes)
        ]
        writer.append(samples, states, number, number, number)
        writer.close()
    return Features.open(tmp_path / "features"), yes


def test_the_heads_that_know_are_found_and_shifted_by_hand(made):
    features, yes = made
    fitted = steering.fit_iti(features, SITES, ["no"], ["yes"], num_heads=2)
    assert {(site, head) for site, head, _ in fitted.source["heads"]} == KNOWING
    assert fitted.where == "predicting"
    for site, head in KNOWING:
        states = features.matrix(site).reshape(60, COUNT, WIDTH)[:, head].astype(np.float64)
        theta = states[yes].mean(0) - states[~yes].mean(0)
        theta /= np.linalg.norm(theta)
        vector = fitted.vectors[site].reshape(COUNT, WIDTH)
        np.testing.assert_allclose(vector[head], np.std(states @ theta) * theta, rtol=1e-5)
        assert not np.delete(vector, head, axis=0).any()


def test_probes_are_scikit_learns(made):
    features, yes = made
    fitted = steering.fit_iti(features, SITES, ["no"], ["yes"], num_heads=6, direction="probe")
    held_out = np.zeros(60, bool)
    for group in (np.flatnonzero(~yes), np.flatnonzero(yes)):
        count = round(0.2 * len(group))
        held_out[np.random.default_rng(0).permutation(group)[:count]] = True
    for site, head, accuracy in fitted.source["heads"]:
        states = features.matrix(site).reshape(60, COUNT, WIDTH)[:, head].astype(np.float64)
        peer = LogisticRegression(max_iter=1000).fit(states[~held_out], yes[~held_out])
        assert accuracy == pytest.approx(peer.score(states[held_out], yes[held_out]), abs=1e-4)
        theta = peer.coef_[0] / np.linalg.norm(peer.coef_)
        vector = fitted.vectors[site].reshape(COUNT, WIDTH)[head]
        np.testing.assert_allclose(vector, np.std(states @ theta) * theta, rtol=1e-4, atol=1e-6)
    accuracies = [accuracy for *_, accuracy in fitted.source["heads"]]
    assert accuracies == sorted(accuracies, reverse=True) and len(accuracies) == 6


def test_the_other_way_round_is_the_opposite(made):
    features, _ = made
    there = steering.fit_iti(features, SITES, ["no"], ["yes"], num_heads=2)
    back = steering.fit_iti(features, SITES, ["yes"], ["no"], num_heads=2)
    for site in SITES:
        np.testing.assert_allclose(back.vectors[site], -there.vectors[site], rtol=1e-5)


def test_messages(made):
    features, _ = made
    words = features, SITES, ["no"], ["yes"]
    with pytest.raises(ValueError, match="direction is 'pca'; expected mean or probe"):
        steering.fit_iti(*words, direction="pca")
    with pytest.raises(ValueError, match=r"num_heads is 0 and validation 0\.2; expected at l"):
        steering.fit_iti(*words, num_heads=0)
    with pytest.raises(ValueError, match="have width 12, not a multiple of 5 heads"):
        steering.fit_iti(*words, heads_per_site=5)
    features.manifest["attention heads"].pop(SITES[1])
    with pytest.raises(ValueError, match=r"number of heads at layers.1.heads; expected one of lay"):
        steering.fit_iti(*words)
