"""Rotary embedding: by hand, and against transformers for every kind of scaling."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from ports.nn import rope

from .. import helpers

# Contexts of 40 and 64 positions, so that frequencies lie on both sides of every bound.
SCALINGS = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 40,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 40},
    "yarn, all said": {
        "factor": 4.0,
        "original_max_position_embeddings": 40,
        "beta_fast": 8,
        "beta_slow": 0.5,
        "mscale": 0.7,
        "mscale_all_dim": 0.3,
        "truncate": False,
    },
    "yarn, magnitude": {
        "factor": 2.0,
        "original_max_position_embeddings": 40,
        "attention_factor": 1.5,
    },
}


def configuration(name: str) -> transformers.LlamaConfig:
    kind = name.split(",")[0]
    parameters = {"rope_type": kind, "rope_theta": 500.0, **SCALINGS[name]}
    return transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=64,
        rope_parameters=parameters,
    )


def test_angles_by_hand():
    # Heads of four: frequencies 1 and 100 ** -(2 / 4) = 0.1.
    cos, sin = rope.angles(rope.Rope(theta=100.0), jnp.array([[0, 3]]), head_dim=4)
    np.testing.assert_allclose(cos[0, 0], 1)
    np.testing.assert_allclose(sin[0, 1], np.sin([3, 0.3, 3, 0.3]), rtol=1e-6)


def test_scaled_frequencies_by_hand():
    # 16 positions: frequency 1 makes 2.5 turns, and 0.1 a quarter of one.
    scaled = {"theta": 100.0, "factor": 2.0, "length": 16}
    linear = rope.frequencies(rope.Rope(kind="linear", **scaled), 4)
    np.testing.assert_allclose(linear, [0.5, 0.05], rtol=1e-6)
    llama3 = rope.frequencies(rope.Rope(kind="llama3", slow=1, fast=2, **scaled), 4)
    np.testing.assert_allclose(llama3, [1, 0.05], rtol=1e-6)
    # Up to 16 positions nothing changes; with 32, the base is 100 x (2 x 2 - 1)^(4 / 2) = 900.
    dynamic = rope.Rope(kind="dynamic", **scaled)
    np.testing.assert_allclose(rope.frequencies(dynamic, 4, 16), [1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(rope.frequencies(dynamic, 4, 32), [1, 1 / 30], rtol=1e-6)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [50, 90])
def test_every_scaling_equals_transformers(name, length):
    config = configuration(name)
    positions = np.stack([np.arange(length), np.maximum(np.arange(length) - 7, 0)])
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions))
    ours = rope.Rope.from_hf(config.rope_parameters, 32, config.max_position_embeddings)
    assert ours.kind == name.split(",")[0]
    for got, there in zip(rope.angles(ours, jnp.asarray(positions), 32), expected, strict=True):
        np.testing.assert_allclose(got, there, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("head_dim", "theta"), [(80, 1e4), (128, 5e5), (256, 1e6)])
def test_frequencies_are_rounded_as_pytorchs_are(head_dim, theta):
    """All but those where the two libraries' powers differ in their last bit."""
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    expected = LlamaRotaryEmbedding(config).inv_freq.numpy()
    ours = rope.frequencies(rope.Rope(theta), head_dim)
    np.testing.assert_allclose(ours, expected, rtol=1.2e-7)
    assert (ours == expected).mean() > 0.95


def test_interleaved_components_equal_transformers():
    parameters = {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [6, 5, 5]}
    config = transformers.Qwen3VLTextConfig(
        hidden_size=64, num_attention_heads=2, head_dim=32, rope_parameters=parameters
    )
    positions = np.random.default_rng(0).integers(0, 50, (2, 9, 3))
    torchs = torch.from_numpy(np.moveaxis(positions, -1, 0).copy())
    expected = Qwen3VLTextRotaryEmbedding(config)(torch.zeros(1), torchs)
    ours = rope.Rope.from_hf(parameters, 32, interleaved=True)
    for got, there in zip(rope.angles(ours, jnp.asarray(positions), 32), expected, strict=True):
        np.testing.assert_allclose(got, there, rtol=0, atol=2e-6)


def test_equal_components_are_one_position():
    ours = rope.Rope(500.0, sections=(2, 1, 1))
    positions = jnp.arange(6)[None]
    for one, three in zip(
        rope.angles(ours, positions, 8),
        rope.angles(ours, jnp.stack([positions] * 3, axis=-1), 8),
        strict=True,
    ):
        np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize(
    ("parameters", "parts"),
    [
        ({"rope_type": "longrope"}, ("rope_type 'longrope'", "default, linear, dynamic, llama3")),
        ({"rope_type": "llama3", "factor": 8.0}, ("'llama3' without low_freq_factor, high_freq",)),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor",)),
        ({"mrope_section": [3, 4]}, ("mrope_section [3, 4] adds up to 7; expected", "width, 8")),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused(parameters, parts):
    with helpers.raises_line(ValueError, *parts):
        rope.Rope.from_hf({"rope_theta": 1e4, **parameters}, 16)
