"""Steering vectors: by hand, against scikit-learn, properties, messages."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from sklearn.cluster import KMeans

from xlvlm_jax import Features, SteeringVector, steering
from xlvlm_jax.store import FeaturesWriter

KEY = jax.random.key(0)


def test_the_coarse_vector_by_hand():
    source, target = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[10.0, 0.0]])
    np.testing.assert_allclose(steering.steering_vector(source, target), [8, -3])
    np.testing.assert_allclose(steering.steering_vector(target, source), [-8, 3])


def test_half_precision_is_summed_in_single():
    source = np.full((5000, 2), 0.1, np.float16)
    found = steering.steering_vector(source, np.zeros((1, 2), np.float16))
    np.testing.assert_allclose(found, -source[0].astype(np.float32), rtol=1e-6)


def test_fine_vectors_lead_from_centroid_to_centroid():
    random = np.random.default_rng(0)
    centres = 20 * random.standard_normal((3, 6))
    of = np.arange(90) % 3
    source = (centres[of] + random.standard_normal((90, 6))).astype(np.float32)
    fine = steering.fine_vectors(source, 3, key=KEY)
    peer = KMeans(3, n_init=5, random_state=0).fit(source)
    order = [peer.labels_[fine.samples(k)[0]] for k in range(3)]
    theirs = peer.cluster_centers_[order]
    np.testing.assert_allclose(fine.vectors, theirs[None] - theirs[:, None], atol=1e-3)
    for concept in range(3):
        assert set(peer.labels_[fine.samples(concept)]) == {order[concept]}
        # A centroid, steered, is the other centroid.
        moved = fine.concepts.components[concept] + fine.vectors[concept]
        np.testing.assert_allclose(moved, fine.concepts.components, atol=1e-4)


def test_messages():
    with pytest.raises(ValueError, match=r"shapes \(3, 4\) and \(3, 5\)"):
        steering.steering_vector(np.ones((3, 4)), np.ones((3, 5)))
    with pytest.raises(ValueError, match="0 source and 2 target states"):
        steering.steering_vector(np.ones((0, 4)), np.ones((2, 4)))
    with pytest.raises(ValueError, match="num_concepts=9 is larger than the 3 rows"):
        steering.fine_vectors(np.ones((3, 4)), 9, key=KEY)


class TestVectorOnDisk:
    VECTOR = SteeringVector(np.array([1.0, -2.0], np.float32), "layers.3", {"method": "coarse"})

    def test_comes_back_as_it_was(self, tmp_path):
        self.VECTOR.save(tmp_path / "deep" / "v.safetensors")
        loaded = SteeringVector.load(tmp_path / "deep" / "v.safetensors")
        np.testing.assert_array_equal(loaded.vector, self.VECTOR.vector)
        assert (loaded.site, loaded.source) == (self.VECTOR.site, self.VECTOR.source)

    def test_adds_and_scales(self):
        both = 2 * self.VECTOR + self.VECTOR
        np.testing.assert_array_equal(both.vector, [3, -6])
        assert both.source["sum of"][0] == {"method": "coarse", "scaled by": 2}
        with pytest.raises(ValueError, match=r"layers\.3 .* and layers\.4 .* do not add up"):
            self.VECTOR + SteeringVector(self.VECTOR.vector, "layers.4")

    def test_becomes_an_edit(self):
        edit = self.VECTOR.edits(alpha=3.0)["layers.3"]
        np.testing.assert_allclose(edit(np.ones((1, 1, 2), np.float32)), [[[4, -5]]])

    def test_another_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="expected a steering vector"):
            SteeringVector.load(tmp_path / "v.safetensors")
        safetensors.numpy.save_file({"other": np.ones(2)}, tmp_path / "v.safetensors")
        with pytest.raises(ValueError, match="is no steering vector"):
            SteeringVector.load(tmp_path / "v.safetensors")
        (tmp_path / "v.safetensors").write_bytes(b"nothing")
        with pytest.raises(ValueError, match="is no steering vector"):
            SteeringVector.load(tmp_path / "v.safetensors")


class TestCoarseFit:
    @pytest.fixture
    def features(self, tmp_path):
        answers = ["Yes.", "no", "yes", "red", "No"]
        states = np.arange(10, dtype=np.float32).reshape(5, 2)
        number = np.arange(5)
        with FeaturesWriter(tmp_path / "features", {"model": "m"}) as writer:
            samples = [{"id": str(i), "prediction": a} for i, a in enumerate(answers)]
            writer.append(samples, {"s": states}, number, number, number)
            writer.close()
        return Features.open(tmp_path / "features")

    def test_by_hand(self, features):
        fitted = steering.fit_coarse(features, "s", ["yes"], ["no"])
        # Rows 0 and 2 against rows 1 and 4.
        np.testing.assert_array_equal(fitted.vector, [5 - 2, 6 - 3])
        assert fitted.site == "s"
        assert (fitted.source["source rows"], fitted.source["target rows"]) == (2, 2)
        assert fitted.source["model"] == "m"

    def test_messages(self, features):
        with pytest.raises(ValueError, match=r"none of 5 samples .* target words blue; frequent"):
            steering.fit_coarse(features, "s", ["yes"], ["blue"])
        with pytest.raises(ValueError, match="have no 'answer'"):
            steering.fit_coarse(features, "s", ["yes"], ["no"], key="answer")
        with pytest.raises(ValueError, match="no site 't'"):
            steering.fit_coarse(features, "t", ["yes"], ["no"])
