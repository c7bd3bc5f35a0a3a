"""Module names in current transformers refer to the sites, which have the hub's names."""

import numpy as np
import pytest

import ports
from ports.intervene.sites import match_sites

from .. import helpers, idefics2_helpers, qwen2_vl_helpers

# Modules of PyTorch that are functions in the ports, or put out no single array.
FUNCTIONS = (".act", ".act_fn", ".activation_fn", ".rotary_emb", ".rotary_pos_emb", ".merger.mlp.1")
CONTAINERS = ("", "model", "vision_tower", "vision_model", "encoder", "layers", "blocks")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, small):
    """pairs(port) returns a small checkpoint and a batch of inputs."""
    made = {"llava": (small, helpers.make_inputs([1, 1], [4, 9]))}

    def get(port: str):
        if port == "idefics2":
            directory = tmp_path_factory.mktemp(port)
            inputs = idefics2_helpers.make_inputs([[(14, 21)], [(28, 14)]], [4, 9])
            made.setdefault(port, (idefics2_helpers.make_idefics2(directory), inputs))
        elif port == "qwen2_vl":
            directory = tmp_path_factory.mktemp(port)
            inputs = qwen2_vl_helpers.make_inputs([[(1, 4, 4)], [(1, 2, 4)]], [4, 9])
            made.setdefault(port, (qwen2_vl_helpers.make_qwen2_vl(directory), inputs))
        return made[port]

    return get


@pytest.mark.parametrize(
    ("port", "example"),
    [
        ("llava", ("model.vision_tower.encoder.layers.1.mlp.fc1", "model.language_model.norm")),
        ("idefics2", ("model.vision_model.encoder.layers.0", "model.text_model.layers.1.mlp")),
        ("qwen2_vl", ("model.visual.merger.mlp.0", "model.language_model.layers.1.self_attn")),
    ],
)
def test_every_module_is_the_site_of_its_name(pairs, port, example):
    pair, _ = pairs(port)
    names = [name for name, _ in pair.torch_model.named_modules()]
    assert set(example) < set(names)
    found = {name: match_sites(name, pair.vlm.sites, pair.vlm.hub_names) for name in names}
    assert all(len(sites) <= 1 for sites in found.values())
    # What heads put out has no module in PyTorch.
    modules = set(pair.vlm.sites) - set(pair.vlm.attention_heads)
    assert {site for sites in found.values() for site in sites} == modules
    for name, sites in found.items():
        if sites:
            assert sites[0].rpartition(".")[2] in (name.rpartition(".")[2], "model")
        else:
            is_container = name.rpartition(".")[2] in CONTAINERS or name.endswith(".merger.mlp")
            assert is_container or name.endswith(FUNCTIONS), name


@pytest.mark.parametrize(
    ("port", "name"),
    [
        ("llava", "model.language_model.layers.1"),
        ("idefics2", "model.text_model.layers.1"),
        ("qwen2_vl", "model.language_model.layers.1"),
    ],
)
def test_the_states_are_those_of_pytorchs_module(pairs, port, name):
    pair, inputs = pairs(port)
    _, states = helpers.torch_forward(pair.torch_model, inputs, lambda weight: weight)
    tokens = inputs["attention_mask"].astype(bool)
    ours = pair.vlm.forward(inputs, sites=[name]).states
    assert helpers.relative_error(ours[name], states[name], tokens) < 1e-5
    generated = pair.vlm.generate(inputs, max_new_tokens=2, sites=[name]).states
    last = np.asarray(ours[name])[:, -1]
    assert helpers.relative_error(generated[name][:, 0], last) < 1e-5


def test_a_site_by_several_names_is_several_entries(small):
    inputs = helpers.make_inputs([1], [5])
    names = ["lm_head", "language_model.lm_head", "language_model/lm_head"]
    states = small.vlm.forward(inputs, sites=names).states
    assert list(states) == names
    for name in names:
        np.testing.assert_array_equal(states[name], states["lm_head"])


def test_names_of_features_are_tried_for_every_port():
    assert set(ports.hub_names("model.language_model.layers.3")) == {
        "language_model.model.layers.3",  # LLaVA
        "model.language_model.layers.3",  # Idefics2 and Molmo, which have no such module
        "model.layers.3",  # Qwen2-VL
    }
