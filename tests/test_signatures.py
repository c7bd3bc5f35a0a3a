"""Signatures are checked in tests (see conftest), unless a test is marked `wrong_types`."""

import jaxtyping
import numpy as np
import pytest

from xlvlm_jax.metrics import monosemanticity

CODES, IMAGES = np.ones((3, 1)), np.eye(2)


def test_a_shape_that_differs_from_the_annotation_is_named():
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'images'"):
        monosemanticity(CODES, IMAGES)


def test_a_number_in_place_of_an_array_is_named():
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'activations'"):
        monosemanticity(1.0, IMAGES)


@pytest.mark.wrong_types
def test_a_marked_test_meets_our_own_message():
    with pytest.raises(ValueError, match="activations of 3 samples but 2 images"):
        monosemanticity(CODES, IMAGES)
