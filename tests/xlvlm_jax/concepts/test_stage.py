"""The stage from features to concepts, words and images on disk."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from xlvlm_jax import Concepts, Features, ground_text
from xlvlm_jax.concepts import grounding
from xlvlm_jax.concepts.scores.attributes import as_json, score_attributes
from xlvlm_jax.concepts.stage import decompose_features, ground_concepts, most_active
from xlvlm_jax.features.reader import choose_site
from xlvlm_jax.features.writer import FeaturesWriter
from xlvlm_jax.storage import atomic
from xlvlm_jax.storage.zarr_rows import StoredRows

RNG = np.random.default_rng(0)


def write(path, Z, attributes, sites=("a",), model="m") -> Features:
    """Writes features with one row per sample."""
    with FeaturesWriter(path, {"model": model, "fingerprint": model}) as writer:
        samples = [{"id": str(i), "image": f"{i}.jpg", "attributes": x} for i, x in attributes]
        index = np.arange(len(Z))
        writer.append(samples, dict.fromkeys(sites, Z), index, index, index)
        writer.close()
    return Features.open(path)


@pytest.fixture
def features(tmp_path) -> Features:
    """Returns features of two groups of rows along two axes; the colour tells the group."""
    group = np.arange(20) % 2
    Z = np.eye(4, dtype="f4")[group] * 10 + RNG.normal(size=(20, 4)).astype("f4") * 0.01
    colours = [(i, {"colour": ("red", "blue")[g], "kind": "dog"}) for i, g in enumerate(group)]
    return write(tmp_path / "features", Z, colours)


def test_concepts_that_are_the_groups_tell_the_attribute(features, tmp_path):
    concepts = decompose_features(features, tmp_path / "concepts", 2, "kmeans")
    scores = score_attributes(concepts, features)
    assert set(scores) == {"colour"}  # all rows share the kind, which then tells nothing
    assert scores["colour"].nmi == pytest.approx(1)
    assert as_json(scores)["colour"]["concepts"] == 1


@pytest.mark.parametrize(
    ("method", "options"), [("kmeans", {}), ("topk-sae", {"k": 1, "max_iter": 4})]
)
def test_activations_are_left_out(features, tmp_path, method, options):
    whole = decompose_features(features, tmp_path / "whole", 2, method, **options)
    less = decompose_features(features, tmp_path / "less", 2, method, activations=False, **options)
    assert less.activations is None and Concepts.load(tmp_path / "less").activations is None
    assert less.source["explained_variance"] == pytest.approx(whole.source["explained_variance"])
    np.testing.assert_array_equal(less.components, whole.components)
    assert score_attributes(less, features) == score_attributes(whole, features)


def test_the_most_active_of_methods_that_are_never_zero(features, tmp_path):
    """A row counts for its strongest concept."""
    activations = np.float32([[0.2, 0.1, 0.9], [0.3, 0.8, 0.2], [0.1, 0.4, 0.5], [1, -2, -3]])
    for method in ("kmeans", "pca"):
        concepts = Concepts(np.eye(3, dtype=np.float32), activations, method)
        assert most_active(concepts, 1) == [2]
    assert most_active(Concepts(np.eye(3, dtype=np.float32), activations), 1) == [0]


def test_the_directory_holds_what_is_returned(features, tmp_path):
    concepts = decompose_features(features, tmp_path / "concepts", 2, alpha=0.1)
    loaded = Concepts.load(tmp_path / "concepts")
    np.testing.assert_array_equal(loaded.components, concepts.components)
    assert loaded.source["site"] == "a"
    assert 0.9 < loaded.source["explained_variance"] <= 1


def test_explained_variance_of_pca_is_scikit_learns(tmp_path):
    from sklearn.decomposition import PCA

    Z = RNG.normal(size=(30, 6)).astype("f4")
    features = write(tmp_path / "features", Z, [(i, {}) for i in range(30)])
    concepts = decompose_features(features, tmp_path / "concepts", 3, "pca")
    expected = PCA(3).fit(Z).explained_variance_ratio_.sum()
    assert concepts.source["explained_variance"] == pytest.approx(expected, abs=1e-4)


def test_a_site_must_be_chosen_among_several(tmp_path):
    Z = np.eye(3, dtype="f4")
    features = write(tmp_path / "f", Z, [(i, {}) for i in range(3)], sites=("a", "b"))
    assert choose_site(features, "b") == "b"
    layers = [f"language_model.model.layers.{i}" for i in (3, 13)]
    decoder = write(tmp_path / "d", Z, [(i, {}) for i in range(3)], sites=layers)
    assert choose_site(decoder, "layers.3") == layers[0]
    with pytest.raises(ValueError, match=r"has the sites a, b; choose one of them with --site$"):
        choose_site(features, None)
    with pytest.raises(ValueError, match="choose one of them with --target-site, got 'c'"):
        choose_site(features, "c", "--target-site")


def test_grounding_writes_words_and_images(features, tmp_path, three_words):
    decompose_features(features, tmp_path / "concepts", 2, "kmeans")
    grounded = ground_concepts(tmp_path / "concepts", three_words, features, num_images=2)
    assert sorted(words[0] for words in grounded.words) == ["beach", "dog"]
    assert Concepts.load(tmp_path / "concepts").images == grounded.images
    for words, images in zip(grounded.words, grounded.images, strict=True):
        parity = {int(image.removesuffix(".jpg")) % 2 for image in images}
        assert parity == {0 if words[0] == "dog" else 1}


@pytest.mark.parametrize("centred", [False, True])
def test_words_of_centroids_or_of_what_tells_them_apart(tmp_path, three_words, centred):
    """What all states share, the second axis, decides the words unless they are centred."""
    shared = np.eye(3, dtype="f4")[[0, 2] * 4] + np.float32([0, 9, 0])
    features = write(tmp_path / "features", shared, [(i, {}) for i in range(8)])
    concepts = decompose_features(features, tmp_path / "concepts", 2, "kmeans")
    grounded = ground_concepts(
        tmp_path / "concepts", three_words, features, num_words=1, centred=centred
    )
    vectors = np.asarray(concepts.components)
    vectors = vectors - vectors.mean(0) if centred else vectors
    expected = ground_text(vectors, three_words.unembed, three_words.tokenizer, 1)
    assert grounded.words == expected
    assert (grounded.words[0] != grounded.words[1]) == centred
    assert Concepts.load(tmp_path / "concepts").source["centred words"] is centred


@pytest.mark.parametrize("option", [None, "--through-norm", "--no-through-norm"])
def test_words_of_a_layer_are_read_through_the_final_norm(xlvlm, vlm, tmp_path, option):
    for site, through in (("layers.2", True), ("norm", False)):
        site, run = f"language_model.model.{site}", tmp_path / site
        Z = RNG.normal(size=(8, 192)).astype("f4")
        features = write(run / "features", Z, [(i, {}) for i in range(8)], sites=(site,))
        manifest = {"fingerprint": vlm.fingerprint}
        concepts = decompose_features(features, run / "concepts", 2, "simple")
        dataclasses.replace(concepts, source=concepts.source | manifest).save(run / "concepts")
        options = (option,) if option else ()
        status, out, errors = xlvlm("ground", run / "concepts", "--model", "embedded", *options)
        assert status == 0, errors
        through = through if option is None else option == "--through-norm"
        assert ("through the final norm and the head" in out) == through
        known = Concepts.load(run / "concepts")
        assert known.through_norm is through
        read = ground_text(concepts.components, vlm.unembed, vlm.tokenizer, through_norm=through)
        assert known.words == read
        other = ground_text(
            concepts.components, vlm.unembed, vlm.tokenizer, through_norm=not through
        )
        assert known.words != other


def test_features_of_another_run_are_refused(features, tmp_path, three_words):
    decompose_features(features, tmp_path / "concepts", 2, "kmeans")
    other = write(tmp_path / "other", np.eye(4, dtype="f4"), [(i, {}) for i in range(4)])
    with pytest.raises(
        ValueError, match=r"activations of 20 rows but .* has 4; ground concepts with"
    ):
        ground_concepts(tmp_path / "concepts", three_words, other)


def test_test_features_are_projected(features, tmp_path):
    concepts = decompose_features(features, tmp_path / "concepts", 2, "kmeans")
    shutil.copytree(features.path, tmp_path / "other")
    other = Features.open(tmp_path / "other")
    assert score_attributes(concepts, other)["colour"].nmi == pytest.approx(1)


def test_streamed_concepts_come_back_from_the_disk(tmp_path, features):
    whole = decompose_features(features, tmp_path / "whole", 2, site=features.sites[0])
    decompose_features(features, tmp_path / "streamed", 2, site=features.sites[0], stream=True)
    streamed = Concepts.load(tmp_path / "streamed")
    np.testing.assert_allclose(streamed.objective, whole.objective, rtol=1e-4)
    assert streamed.activations.shape == whole.activations.shape
    described = json.loads((tmp_path / "streamed" / "concepts.json").read_text())
    assert sorted(path.name for path in (tmp_path / "streamed").iterdir()) == [
        f"activations-{described['tensors_sha256'][:12]}",
        "concepts.json",
        "concepts.safetensors",
    ]


def test_a_streamed_run_that_fails_leaves_nothing(tmp_path, features):
    with pytest.raises(ValueError, match="can't be streamed"):
        decompose_features(
            features, tmp_path / "c", 2, "simple", site=features.sites[0], stream=True
        )
    assert not (tmp_path / "c").exists()


def test_grounding_streamed_concepts_reads_tiles_and_writes_no_activations(
    tmp_path, features, three_words, monkeypatch
):
    place = tmp_path / "concepts"
    decompose_features(features, place, 2, "kmeans", stream=True)
    before = {path: path.read_bytes() for path in place.rglob("c/*/*")}
    size = (place / "concepts.safetensors").stat().st_size
    largest, read = [], StoredRows._read

    def counted(self, start, count):
        largest.append(count)
        return read(self, start, count)

    monkeypatch.setattr(StoredRows, "_read", counted)
    monkeypatch.setattr(StoredRows, "__array__", None)
    monkeypatch.setattr(grounding, "_TILE_ROWS", 3)
    found = ground_concepts(place, three_words, features, num_images=4)
    assert largest == [3] * 7  # 20 rows, once
    assert {path: path.read_bytes() for path in place.rglob("c/*/*")} == before
    assert (place / "concepts.safetensors").stat().st_size == size
    monkeypatch.undo()
    whole = np.asarray(Concepts.load(place).activations)
    expected = np.argsort(-whole, axis=0, kind="stable")[:4].T
    assert found.images == [[f"{row}.jpg" for row in rows] for rows in expected]


def test_a_death_between_leaves_no_components_with_the_activations_of_others(
    tmp_path, features, monkeypatch
):
    place = tmp_path / "concepts"
    decompose_features(features, place, 2, "kmeans", stream=True)
    old = Concepts.load(place)
    kept = np.asarray(old.activations)
    write = atomic.write

    def dies(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        decompose_features(features, place, 3, "kmeans", stream=True)
    again = Concepts.load(place)
    np.testing.assert_array_equal(again.components, old.components)
    np.testing.assert_array_equal(np.asarray(again.activations), kept)
    monkeypatch.setattr(atomic, "write", write)
    decompose_features(features, place, 3, "kmeans", stream=True)
    assert Concepts.load(place).activations.shape == (20, 3)
    assert len(list(place.glob("activations*"))) == 1
    decompose_features(features, place, 2, "kmeans")
    assert not list(place.glob("activations*"))


def test_streamed_concepts_of_earlier_versions_open(tmp_path, features):
    place = tmp_path / "concepts"
    decompose_features(features, place, 2, "kmeans", stream=True)
    kept = np.asarray(Concepts.load(place).activations)
    (folder,) = place.glob("activations-*")
    folder.rename(place / "activations")
    described = json.loads((place / "concepts.json").read_text())
    del described["activations_on_disk"]
    (place / "concepts.json").write_text(json.dumps(described))
    loaded = Concepts.load(place)
    np.testing.assert_array_equal(np.asarray(loaded.activations), kept)
    loaded.save(place)
    np.testing.assert_array_equal(np.asarray(Concepts.load(place).activations), kept)
