"""Models are distinguished by their fingerprints."""

import pytest

from ports import checkpoint
from xlvlm_jax.demo import embedded
from xlvlm_jax.storage.same_model import model_of, require_model


def test_the_description_of_a_model(vlm):
    expected = checkpoint.fingerprint(embedded.LLAVA)
    assert model_of(vlm) == {"model": embedded.LLAVA.name, "fingerprint": expected}


def test_another_model_is_named_and_an_unknown_one_passes(vlm, three_words):
    source = {"model": "other", "fingerprint": "abc"}
    with pytest.raises(ValueError, match=r"states of 'other' \(abc\); .* is another model \(\w+\)"):
        require_model(source, vlm, "states of")
    require_model(model_of(vlm), vlm, "states of")
    require_model({}, vlm, "states of")
    require_model(source, three_words, "states of")  # a model without a checkpoint
