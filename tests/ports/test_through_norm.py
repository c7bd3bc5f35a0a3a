"""The head after the decoder's final norm, and which sites come before that norm."""

import numpy as np
import pytest
import torch

from . import helpers

EVERY_PORT = pytest.mark.parametrize("port", ["llava", "idefics2", "qwen2_vl", "molmo"])


def paths(vlm):
    """Returns the sites of the last layer, the final norm and the head."""
    decoder, layer = ".".join(vlm.module.decoder_path), vlm.module.cache_path[0].format("1")
    norm = f"{decoder}.{vlm.module.norm_name}"
    return f"{decoder}.{layer.replace('_', '.')}", norm, ".".join(vlm.module.head_path)


@EVERY_PORT
def test_the_output_of_the_last_layer_gives_the_models_logits(vlms, port):
    vlm = vlms[port]
    layer, norm, _ = paths(vlm)
    assert layer == vlm.layers[-1]
    logits, states = vlm.forward(helpers.make_inputs([0, 0], [5, 3]), sites=[layer, norm])
    read = vlm.unembed(states[layer], through_norm=True)
    assert helpers.relative_error(read, logits) < 1e-5
    assert helpers.relative_error(vlm.unembed(states[norm]), logits) < 1e-5
    assert helpers.relative_error(vlm.unembed(states[layer]), logits) > 0.1


def test_it_is_pytorchs_norm_and_head(small):
    x = np.random.default_rng(0).standard_normal((3, 60), np.float32)
    model = small.torch_model
    with torch.no_grad():
        theirs = model.lm_head(model.model.language_model.norm(torch.from_numpy(x))).numpy()
    assert helpers.relative_error(small.vlm.unembed(x, through_norm=True), theirs) < 1e-5


def test_the_length_of_a_direction_does_not_matter(small):
    x = np.random.default_rng(1).standard_normal((4, 60), np.float32)
    order = [
        np.argsort(small.vlm.unembed(scale * x, through_norm=True), axis=-1)
        for scale in np.float32([1e-2, 1, 1e4])
    ]
    np.testing.assert_array_equal(order[0], order[1])
    np.testing.assert_array_equal(order[2], order[1])
    # The norm's weight is what a direction is multiplied by.
    weight = small.vlm.params["language_model"]["model"]["norm"]["scale"]
    by_weight = small.vlm.unembed(x * np.asarray(weight))
    np.testing.assert_array_equal(np.argsort(by_weight, axis=-1), order[1])


@EVERY_PORT
def test_the_sites_before_the_norm(vlms, port):
    vlm = vlms[port]
    layer, norm, head = paths(vlm)
    assert vlm.is_before_norm(layer)
    assert all(vlm.is_before_norm(site) for site in vlm.sites if site.startswith(f"{layer}."))
    assert vlm.is_before_norm(layer.replace(".1", "_1").replace(".", "/"))
    heads = [site for site in vlm.sites if vlm.is_head(site)]
    assert heads == [site for site in vlm.sites if site == head]
    decoder = ".".join(vlm.module.decoder_path)
    tower = next(site for site in vlm.sites if not site.startswith(f"{decoder}."))
    for site in (norm, head, decoder, tower, "layer", ""):
        assert not vlm.is_before_norm(site), site


def test_todays_names_are_known(small):
    assert small.vlm.is_before_norm("model.language_model.layers.0")
    assert not small.vlm.is_before_norm("model.language_model.norm")
