"""Concepts in the files of XL-VLMs: against torch and scikit-learn, and messages."""

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from xlvlm_jax import Concepts, project
from xlvlm_jax.concepts.pth import export_concepts, import_concepts

torch = pytest.importorskip("torch")


def test_concepts_that_torch_saved_with_an_estimator(tmp_path):
    Z = np.random.default_rng(0).normal(size=(12, 3))
    model = KMeans(2, n_init=1, random_state=0).fit(Z)
    saved = {
        "concepts": torch.tensor(model.cluster_centers_),
        "activations": torch.tensor(1 / (1 + model.transform(Z))),
        "decomposition_method": "kmeans",
        "text_grounding": [["dog"], ["cat", "cat"]],
        "image_grounding_paths": [["a.jpg"], ["b.jpg"]],
        "analysis_model": model,  # passed over
    }
    torch.save(saved, tmp_path / "c.pth")
    read = import_concepts(tmp_path / "c.pth", site="layers.1")
    np.testing.assert_allclose(read.components, model.cluster_centers_, rtol=1e-6)
    np.testing.assert_allclose(read.activations, saved["activations"], rtol=1e-6)
    assert (read.method, read.words[1], read.source["site"]) == (
        *("kmeans", ["cat", "cat"], "layers.1"),
    )
    read.save(tmp_path / "concepts")
    np.testing.assert_array_equal(Concepts.load(tmp_path / "concepts").components, read.components)


def test_the_mean_of_a_pca_is_read_and_kept(tmp_path):
    Z = np.random.default_rng(0).normal((9, 5, 7), size=(12, 3))
    model = PCA(2).fit(Z)
    saved = {"concepts": torch.tensor(model.components_), "decomposition_method": "pca"}
    torch.save(saved | {"analysis_model": model}, tmp_path / "c.pth")
    read = import_concepts(tmp_path / "c.pth")
    np.testing.assert_allclose(project(np.float32(Z), read), model.transform(Z), atol=1e-5)
    export_concepts(read, tmp_path / "again.pth")
    np.testing.assert_array_equal(import_concepts(tmp_path / "again.pth").mean, read.mean)
    torch.save(saved, tmp_path / "without.pth")
    with pytest.warns(UserWarning, match=r"has no mean of its PCA: project would subtract nothing"):
        assert import_concepts(tmp_path / "without.pth").mean is None
    torch.save(saved | {"mean": torch.ones(4)}, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"the mean has shape \(4,\); expected \(3,\)"):
        import_concepts(tmp_path / "wrong.pth")


def test_concepts_that_torch_reads(tmp_path):
    concepts = Concepts.from_components(
        np.float32([[1, 0], [0, 2]]), "pca", mean=np.float32([1, 2])
    )
    export_concepts(concepts, tmp_path / "c.pth")
    read = torch.load(tmp_path / "c.pth", weights_only=True)
    assert read["concepts"].tolist() == [[1, 0], [0, 2]]
    assert read["decomposition_method"] == "pca" and "activations" not in read
    np.testing.assert_array_equal(
        import_concepts(tmp_path / "c.pth").components, concepts.components
    )


def test_a_file_without_concepts(tmp_path):
    torch.save({"hidden_states": []}, tmp_path / "h.pth")
    with pytest.raises(ValueError, match=r"has no 'concepts' of shape \[K, D\]"):
        import_concepts(tmp_path / "h.pth")
    torch.save({"concepts": torch.ones(2, 3), "activations": torch.ones(4, 5)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"'activations' have shape \(4, 5\) for 2 concepts"):
        import_concepts(tmp_path / "w.pth")
