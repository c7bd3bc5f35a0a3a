"""Steering vectors: by hand, against scikit-learn, properties, messages."""

import jax
import numpy as np
import pytest
from sklearn.cluster import KMeans

from xlvlm_jax import steering

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
