"""A sparse autoencoder of 512 features of image tokens, through all stages."""

import numpy as np
import pytest

from xlvlm_jax import Concepts, Features, data, project, steering
from xlvlm_jax.causal.record import read
from xlvlm_jax.causal.stage import require_concepts_of
from xlvlm_jax.concepts.stage import (
    decompose_features,
    ground_concepts,
    most_active,
    target_directory,
)
from xlvlm_jax.concepts.stored_maps import load_maps
from xlvlm_jax.data import scenes
from xlvlm_jax.features import ExtractionSettings, extract
from xlvlm_jax.features.selection import Selection
from xlvlm_jax.report.page import write_report

SITES = tuple(f"language_model.model.layers.{layer}" for layer in (5, 6))
K = 512
SHORT = {"max_iter": 60, "batch_size": 256, "k": 8}


@pytest.fixture(scope="module")
def run(vlm, tmp_path_factory):
    """Features of nine pictures, and grounded concepts of them."""
    root = tmp_path_factory.mktemp("run")
    scenes.write(root / "scenes", train=9, seed=5)
    samples = data.load("coco", root / "scenes", "train")[:9]
    settings = ExtractionSettings(SITES, Selection.parse("image"), "teacher-forcing", batch_size=9)
    extract(vlm, samples, root / "features", settings)
    features = Features.open(root / "features")
    decompose_features(features, root / "concepts", K, "topk-sae", site=SITES[0], **SHORT)
    ground_concepts(root / "concepts", vlm, features, num_images=3)
    return root


@pytest.fixture(scope="module")
def features(run):
    return Features.open(run / "features")


@pytest.fixture(scope="module")
def concepts(run):
    return Concepts.load(run / "concepts")


def test_pictures_activate_what_they_show(features, concepts):
    strongest = np.zeros((len(features.samples), K))
    np.maximum.at(strongest, features.sample_rows, concepts.activations)
    names = [sample["image"] for sample in features.samples]
    for k, images in enumerate(concepts.images):
        active = np.flatnonzero(strongest[:, k])
        assert len(images) == min(3, len(active))
        values = [strongest[names.index(image), k] for image in images]
        assert values == sorted(strongest[:, k], reverse=True)[: len(values)]
    assert 0 < concepts.dead.sum() < K  # some have no picture
    np.testing.assert_array_equal(
        project(features.stored(SITES[0]), concepts), concepts.activations
    )


def test_maps_are_the_activations_of_the_cells(run, features, concepts, xlvlm):
    status, _, errors = xlvlm("map", "embedded", "--concepts", run / "concepts")
    assert status == 0, errors
    stored = load_maps(run / "concepts", concepts)
    assert {k for k, _ in stored} <= set(np.flatnonzero(~concepts.dead))
    k = most_active(concepts, 1)[0]
    of_feature = {sample: cells for (number, sample), cells in stored.items() if number == k}
    for sample, cells in of_feature.items():
        expected = concepts.activations[features.sample_rows == sample, k]
        np.testing.assert_allclose(cells.values, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_some_features_are_scored_by_their_effects(run, concepts, xlvlm):
    chosen = most_active(concepts, 2)
    counts = np.count_nonzero(concepts.activations, axis=0)
    worded = [k for k in range(K) if concepts.words[k]]
    assert min(counts[chosen]) >= sorted(counts[worded])[-2]
    command = ("causal", run / "concepts", "--model", "embedded", "--num-samples", 4)
    edits = ("--add", 0.1, "--batch-size", 4, "--overwrite")
    status, out, errors = xlvlm(*command, *edits, "--num-concepts", 2)
    assert status == 0, errors
    assert "scoring 2 of 512 concepts" in out
    described = read(run / "concepts")
    assert described["settings"]["concepts"] == chosen
    scored = [k for k, own in enumerate(described["concepts"]["rest"]) if own is not None]
    assert scored == chosen
    status, _, errors = xlvlm(*command, *edits, "--concept", 512)
    assert status == 2 and "--concept is 512" in errors and "has concepts 0 to 511" in errors


def test_a_feature_steers(concepts, tmp_path):
    """Its decoder's row, saved as a vector, moves the states of its site."""
    k = most_active(concepts, 1)[0]
    vector = steering.SteeringVector(concepts.components[k], SITES[0], {"feature": k})
    vector.save(tmp_path / "feature.safetensors")
    loaded = steering.load(tmp_path / "feature.safetensors")
    ((site, edit),) = loaded.edits(alpha=5.0).items()
    assert site == SITES[0]
    states = np.ones((1, 3, 192), np.float32)
    moved = np.broadcast_to(5 * concepts.components[k], states.shape)
    np.testing.assert_allclose(edit(states) - states, moved, rtol=1e-5, atol=1e-5)


def test_the_report_shows_them_all(run, concepts):
    text = write_report(run, num_concepts=K).read_text()
    assert text.count('<article class="card"') == K
    assert len(text) < 8e6
    assert write_report(run).read_text().count('<article class="card"') == 500  # others in a table


def test_what_a_layer_does(vlm, run, features):
    """A transcoder's features are read before it and written after it."""
    sites = {"site": SITES[0], "target_site": SITES[1]}
    coder = decompose_features(
        features, run / "coder", 64, "batchtopk-transcoder", **sites, **SHORT
    )
    assert coder.source["site"] == SITES[0] and coder.written["site"] == SITES[1]
    assert coder.source["explained_variance"] > 0
    assert any(ground_concepts(run / "coder", vlm, features).words)
    assert require_concepts_of(Concepts.load(run / "coder"), vlm, None) == SITES[1]
    both = decompose_features(features, run / "both", 64, "crosscoder", **sites, max_iter=5)
    assert Concepts.load(target_directory(run / "both")).source["site"] == SITES[1]
    assert both.components.shape == (64, 192)
