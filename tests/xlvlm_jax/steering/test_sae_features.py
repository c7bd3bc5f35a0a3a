"""Steering with features of autoencoders: by hand, against whole reconstructions, messages."""

import numpy as np
import pytest

from xlvlm_jax import Features, evaluation, sae, steering
from xlvlm_jax.features.writer import FeaturesWriter
from xlvlm_jax.steering import sae_features

D, K = 6, 10


def dictionary(architecture: str, **settings) -> sae.Dictionary:
    rng = np.random.default_rng(0)
    params = {
        "W_enc": rng.normal(size=(D, K)),
        "W_dec": rng.normal(size=(K, D)),
        "b_enc": 0.1 * rng.normal(size=K),
        "b_dec": rng.normal(size=D),
    }
    if architecture in ("jumprelu", "batchtopk"):
        params["threshold"] = rng.uniform(0.5, 1, size=K)
    return sae.Dictionary.of(params, sae.Settings(architecture, **settings))


@pytest.fixture(scope="module")
def states() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, 7, D)).astype(np.float32)


@pytest.mark.parametrize(
    "found",
    [
        dictionary("standard"),
        dictionary("topk", k=4),
        dictionary("batchtopk", k=4, rescale_acts_by_decoder_norm=True),
        dictionary("jumprelu", normalize_activations="layer_norm", apply_b_dec_to_input=False),
    ],
    ids=lambda each: each.method,
)
def test_the_change_is_that_of_the_reconstruction(found, states, tmp_path):
    clamp = steering.clamp_features(found, [7, 2], [1.5, 0.0], "layers.3", where="image")
    codes = np.array(found.encode(states))
    assert (codes[..., [7, 2]] > 0).any()
    other = codes.copy()
    other[..., 7], other[..., 2] = 1.5, 0
    difference = np.asarray(found.decode(other, states)) - np.asarray(found.decode(codes, states))
    for alpha in (0.0, 0.5, 1.0):
        edited = clamp.edits(alpha, "all")["layers.3"](states)
        np.testing.assert_allclose(edited, states + alpha * difference, atol=2e-5)
    clamp.save(tmp_path / "clamp.safetensors")
    read = steering.load(tmp_path / "clamp.safetensors")
    assert (read.site, read.where, read.features) == ("layers.3", "image", (7, 2))
    np.testing.assert_array_equal(
        read.edits(1.0, "all")["layers.3"](states), clamp.edits(1.0, "all")["layers.3"](states)
    )


def test_only_what_is_needed_is_kept():
    alone = steering.clamp_features(dictionary("jumprelu"), [3], [1.0], "s")
    assert alone.dictionary.params["W_enc"].shape == (D, 1)
    among = steering.clamp_features(dictionary("topk", k=2), [3], [1.0], "s")
    assert among.dictionary.params["W_enc"].shape == (D, K)


@pytest.fixture
def features(tmp_path):
    """Returns features of site "s" whose codes are the states themselves, less one."""
    rows = np.float32([[2, 3, 1], [4, 3, 1], [7, 1, 1], [5, 3, 1]])
    number = np.arange(4)
    with FeaturesWriter(tmp_path / "features", {"model": "m"}) as writer:
        plain = {"image": "a.png", "image_id": "a", "prompt": "?", "references": []}
        answers = ("yes", "yes", "no", "no")
        samples = [{**plain, "id": str(i), "prediction": a} for i, a in enumerate(answers)]
        writer.append(samples, {"s": rows}, number, number, number)
        writer.close()
    return Features.open(tmp_path / "features")


@pytest.fixture
def less_one() -> sae.Dictionary:
    """Returns a dictionary with codes relu(states - 1), whose third row is twice as long."""
    params = {"W_enc": np.eye(3), "W_dec": np.diag([1.0, 1, 2]), "b_enc": -np.ones(3)}
    return sae.Dictionary.of(params | {"b_dec": np.zeros(3)}, sae.Settings("standard"))


def test_by_hand(features, less_one):
    # Mean codes: (2, 2, 0) of yes, (5, 1, 0) of no.
    answers = features, "s", ["yes"], ["no"]
    both = steering.fit_sae_vector(*answers, dictionary=less_one, num_features=2)
    np.testing.assert_allclose(both.vector, [3, -1, 0], atol=1e-6)
    assert both.source["features of the dictionary"] == {"0": 3.0, "1": -1.0}
    one = steering.fit_sae_vector(*answers, dictionary=less_one, feature_ids=[1])
    np.testing.assert_allclose(one.vector, [0, -1, 0], atol=1e-6)
    clamp = steering.fit_sae_clamp(*answers, dictionary=less_one, num_features=1)
    assert clamp.features == (0,) and clamp.values.tolist() == [5.0]
    # The code of the first feature becomes 5; the rest of the state stays.
    edited = clamp.edits()["s"](features.matrix("s"))
    np.testing.assert_allclose(edited, [[6, 3, 1], [6, 3, 1], [6, 1, 1], [6, 3, 1]])


@pytest.mark.parametrize("number", [1, 5, 8, 13])
def test_mean_codes_of_any_number_of_rows(number, monkeypatch):
    """The last block is filled up; the parameters are arguments of the program."""
    monkeypatch.setattr(sae_features, "ROWS", 4)
    rows = np.random.default_rng(2).normal(size=(number, D)).astype(np.float32)
    for found in (dictionary("standard"), dictionary("topk", k=4)):
        # A row of zeros, as it is filled up with, has codes of its own.
        assert np.any(found.encode(rows[:1] * 0))
        expected = np.asarray(found.encode(rows)).mean(axis=0)
        np.testing.assert_allclose(sae_features._mean_codes(found, rows), expected, atol=1e-5)
    before = sae_features._sum_of_codes._cache_size()
    other = dictionary("topk", k=4)
    other.params["W_enc"] = 2 * other.params["W_enc"]
    sae_features._mean_codes(other, rows)
    assert sae_features._sum_of_codes._cache_size() == before


def test_messages(features, less_one):
    with pytest.raises(ValueError, match=r"features are \[3\]; expected .* from 0 to 2"):
        steering.clamp_features(less_one, [3], [1.0], "s")
    with pytest.raises(ValueError, match=r"features are \[1, 1\]; expected different numbers"):
        steering.clamp_features(less_one, [1, 1], [1.0, 2.0], "s")
    with pytest.raises(ValueError, match="expected one per feature, 2"):
        steering.clamp_features(less_one, [0, 1], [1.0], "s")
    skip = {"W_skip": np.eye(3)}
    params = {name: np.asarray(value) for name, value in less_one.params.items()} | skip
    transcoder = sae.Dictionary.of(params, sae.Settings("skip_transcoder"))
    with pytest.raises(ValueError, match="features of a skip-transcoder can't be clamped"):
        steering.clamp_features(transcoder, [0], [1.0], "s")
    answers = features, "s", ["yes"], ["no"]
    with pytest.raises(ValueError, match="num_features is 4; expected 1 to the 3 features"):
        steering.fit_sae_vector(*answers, dictionary=less_one, num_features=4)
    with pytest.raises(ValueError, match="was learnt on states of width 6"):
        steering.fit_sae_vector(*answers, dictionary=dictionary("standard"))


def test_clamps_are_aligned_as_variants_of_one_program(states):
    """Clamps of one shape share a slot; one of another number of features has its own."""
    jumps = dictionary("jumprelu")
    clamps = [
        steering.clamp_features(jumps, ids, [1.5] * len(ids), "s") for ids in ([7], [2], [3, 4])
    ]
    variants = [clamp.edits(0.5) for clamp in clamps]
    found = evaluation.aligned(variants)
    assert [[float(edit.alpha) for edit in each["s"]] for each in found] == [
        [0.5, 0],
        [0.5, 0],
        [0, 0.5],
    ]
    for variant, (first, second) in zip(variants, (each["s"] for each in found), strict=True):
        np.testing.assert_allclose(second(first(states)), variant["s"](states), atol=1e-5)
