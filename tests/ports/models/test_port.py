"""A model family in one file and one line of the registry: a toy with one layer."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import traverse_util

import ports
from ports import checkpoint, loading
from ports.models.port import Port
from ports.nn import decoder, layers, rope, vision_language

SIDE, WIDTH, IMAGE = 4, 16, 30


@dataclasses.dataclass(frozen=True)
class Config:
    text: decoder.DecoderConfig
    image_tokens: tuple[int, ...]

    @classmethod
    def from_hf(cls, config: Any) -> "Config":
        text = decoder.DecoderConfig(
            vocab_size=config.vocab_size,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_layers=1,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
            rope=rope.Rope(theta=1e4),
            norm_eps=1e-6,
            hidden_act="silu",
            qkv_bias=False,
            output_bias=False,
            mlp_bias=False,
            tie_embeddings=False,
        )
        return cls(text, (config.image_token_id,))


class Toy(vision_language.VisionLanguageModel):
    """An image is one token: a linear map of its pixels."""

    config: Config
    decoder_path = ("model",)
    head_path = ("lm_head",)
    axes = decoder.AXES | {"eye": ("embed", "heads")}

    def setup(self):
        self.eye = layers.dense(WIDTH, True, self.dtype)
        self.model = decoder.Decoder(self.config.text, self.dtype)
        self.lm_head = layers.head(self.config.text.vocab_size, self.dtype)

    @property
    def text_decoder(self):
        return self.model

    def unembed(self, x):
        return self.lm_head(x)

    def embed_inputs(self, inputs):
        tokens = jnp.asarray(inputs["input_ids"])
        x = self.model.embed_tokens(tokens)
        pixels = jnp.asarray(inputs["pixel_values"])
        features = self.eye(pixels.reshape(len(pixels), -1))
        return vision_language.place_images(x, tokens == IMAGE, features)


def example_inputs(config: Config, batch: int = 1) -> dict[str, Any]:
    ids = jax.ShapeDtypeStruct((batch, 6), np.int32)
    pixels = jax.ShapeDtypeStruct((batch, 3, SIDE, SIDE), np.float32)
    return {"input_ids": ids, "attention_mask": ids, "pixel_values": pixels}


def read_config(values: dict[str, Any]) -> Any:
    return transformers.PretrainedConfig(**values)


PORT = Port(
    config=Config,
    module=Toy,
    inputs=("input_ids", "attention_mask", "pixel_values"),
    example_inputs=example_inputs,
    prepare_inputs=lambda config, arrays: dict(arrays),
    canonical_name=lambda name: name,
    read_config=read_config,
)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Returns a checkpoint of the toy, which is registered."""
    monkeypatch.setitem(loading.PORTS, "toy", PORT)
    values = {
        "model_type": "toy",
        "vocab_size": 31,
        "image_token_id": IMAGE,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    module = Toy(Config.from_hf(read_config(values)))
    params = checkpoint.abstract_params(module, example_inputs(module.config))
    random = np.random.default_rng(0)
    filled = jax.tree.map(lambda leaf: random.normal(size=leaf.shape, scale=0.3), params)
    checkpoint.save_params(filled, tmp_path)
    return tmp_path


INPUTS = {
    "input_ids": np.array([[IMAGE, 4, 5, 6], [7, IMAGE, 8, 9]]),
    "attention_mask": np.ones((2, 4), int),
    "pixel_values": np.random.default_rng(1).normal(size=(2, 3, SIDE, SIDE)).astype(np.float32),
}


def test_a_toy_loads_captures_steers_and_generates(directory):
    vlm = ports.load(directory)
    assert {"eye", "model.layers.0", "lm_head"} <= set(vlm.sites)
    out = vlm.forward(INPUTS, sites=["eye", "layers.0", "model.norm"])
    kernel, bias = (vlm.params["eye"][name] for name in ("kernel", "bias"))
    expected = INPUTS["pixel_values"].reshape(2, -1) @ kernel + bias
    np.testing.assert_allclose(out.states["eye"], expected, rtol=0, atol=1e-5)
    states = out.states["model.norm"]
    np.testing.assert_allclose(vlm.unembed(states), out.logits, rtol=0, atol=1e-5)
    first = vlm.generate(INPUTS, max_new_tokens=3).tokens
    assert (first[:, 0] == np.argmax(out.logits[:, -1], axis=-1)).all()
    steered = vlm.forward(INPUTS, edits={"layers.0": ports.add(np.ones(WIDTH), 5.0)})
    assert not np.allclose(steered.logits, out.logits, atol=1e-2)


def test_a_toy_is_placed_on_a_mesh_by_its_own_rules(directory):
    vlm = ports.load(directory, mesh=ports.make_mesh(1, 1))
    plain = ports.load(directory)
    np.testing.assert_array_equal(vlm.forward(INPUTS).logits, plain.forward(INPUTS).logits)
    flat = traverse_util.flatten_dict(vlm.params)
    assert flat["eye", "kernel"].sharding.spec == jax.sharding.PartitionSpec(None, "model")


def test_a_toy_without_a_rule_is_refused_on_a_mesh(directory, monkeypatch):
    monkeypatch.setattr(Toy, "axes", decoder.AXES)
    ports.load(directory)
    with pytest.raises(ValueError, match=r"no sharding rule for eye\.bias; add .eye. to"):
        ports.load(directory, mesh=ports.make_mesh(1, 1))


def test_a_family_without_a_layout_says_so(directory):
    with pytest.raises(ValueError, match="the layout of toy's images is not implemented"):
        ports.load(directory).patch_layout(INPUTS)


def test_every_family_lays_out_its_images():
    assert not [name for name, port in loading.PORTS.items() if port.patch_layout is None]
