"""Features at the positions of image tokens, with and without a mesh."""

import jax.numpy as jnp
import numpy as np
import pytest

import ports
from ports.nn.vision_language import place_images
from ports.parallel import sharding

X, FEATURES = jnp.zeros((2, 4, 1)), jnp.arange(1.0, 5)[:, None]


@pytest.mark.parametrize("mesh", [None, ports.make_mesh(1)], ids=["plain", "mesh"])
@pytest.mark.parametrize(
    ("is_image", "valid", "expected"),
    [
        # Two features per row; one in the first row and three in the second; two per row of which
        # one is padding; and both of the first row are padding.
        ([[0, 1, 1, 0], [1, 0, 0, 1]], None, [[0, 1, 2, 0], [3, 0, 0, 4]]),
        ([[0, 1, 0, 0], [1, 1, 0, 1]], None, [[0, 1, 0, 0], [2, 3, 0, 4]]),
        ([[0, 1, 0, 0], [1, 0, 0, 0]], [0, 1, 1, 0], [[0, 2, 0, 0], [3, 0, 0, 0]]),
        ([[0, 1, 0, 0], [1, 0, 0, 0]], [0, 0, 1, 1], [[0, 3, 0, 0], [4, 0, 0, 0]]),
    ],
)
def test_features_in_order(mesh, is_image, valid, expected):
    valid = None if valid is None else jnp.array(valid, bool)
    with sharding.on(mesh):
        found = place_images(X, jnp.array(is_image, bool), FEATURES, valid)
    np.testing.assert_array_equal(found[..., 0], expected)


def test_a_number_of_features_that_rows_do_not_divide():
    with sharding.on(ports.make_mesh(1)):
        found = place_images(X, jnp.array([[1, 1, 0, 0], [0, 1, 0, 0]], bool), FEATURES[:3])
    np.testing.assert_array_equal(found[..., 0], [[1, 2, 0, 0], [0, 3, 0, 0]])
