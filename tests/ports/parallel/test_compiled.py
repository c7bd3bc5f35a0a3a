"""Programs of a model: products as precise as its dtype, and the mesh."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import ports
from ports.intervene import lora
from ports.parallel import compiled, sharding
from xlvlm_jax.finetune import FinetuneSettings, training
from xlvlm_jax.steering import l2s

# The tests' own setting, which would decide for every product.
pytestmark = pytest.mark.usefixtures("backends_own_precision")


@pytest.fixture
def backends_own_precision(monkeypatch):
    with jax.default_matmul_precision(None):
        yield


def rounded(lowered):
    """Returns the products of float32 whose factors a TPU would round."""
    lines = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert lines
    is_float32 = [re.search(r"\(tensor<[\dx]*f32>", line) for line in lines]
    return [
        line
        for line, found in zip(lines, is_float32, strict=True)
        if found and "precision = [HIGHEST, HIGHEST]" not in line
    ]


@compiled.program(static=["times"], donate=["y"])
def scaled(model, params, x, y, times):
    return times * model.apply(params, x) + y


def test_products_are_as_precise_as_the_dtype():
    x = jnp.ones((2, 3))
    params = nn.Dense(2).init(jax.random.key(0), x)
    for dtype in (jnp.float32, jnp.bfloat16):
        model = nn.Dense(2, dtype=dtype)
        text = scaled.lower(model, params, x, jnp.zeros((2, 2)), 2).as_text()
        assert ("HIGHEST" in text) == (dtype == jnp.float32)
    with jax.default_matmul_precision("bfloat16"):
        assert "HIGHEST" not in scaled.lower(model, params, x, jnp.zeros((2, 2)), 2).as_text()


def test_names_that_are_static_and_donated_and_the_mesh():
    model, x = nn.Dense(2, dtype=jnp.float32), jnp.ones((2, 3))
    params, y = model.init(jax.random.key(0), x), jnp.ones((2, 2))
    expected = 3 * model.apply(params, x) + 1
    np.testing.assert_allclose(scaled(model, params, x, y, 3), expected, rtol=1e-6)
    assert y.is_deleted()
    seen = []

    @compiled.program()
    def look(model):
        seen.append(sharding.is_on_mesh())
        return 0

    look(model), look(model, mesh=ports.make_mesh(1)), look(model)
    assert seen == [False, True]


def test_every_pass_of_a_model_of_float32(vlm):
    """Forward pass, generation, paired pass and a step of training of the embedded model."""
    shapes = vlm.example_inputs()
    inputs = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
    ids = np.full(inputs["input_ids"].shape, vlm.image_tokens[0] - 1)
    ids[:, 4:-4] = vlm.image_tokens[0]
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)} | {
        name: np.asarray(value) for name, value in inputs.items() if name.startswith("pixel")
    }
    site = vlm.find_site("layers.0")
    assert not rounded(vlm.lower(inputs, sites=[site]))
    assert not rounded(vlm.lower(inputs, sites=[site], max_new_tokens=2))
    trainer = training.Trainer(vlm, FinetuneSettings(steps=1, batch_size=1), 1)
    lowered = training.train_step.lower(
        vlm.module, trainer.settings, 1, 4, trainer.begin(), trainer._frozen,
        vlm.place(inputs), jnp.array([4]), True,
    )  # fmt: skip
    assert not rounded(lowered)


def test_products_of_float32_beside_a_model():
    x = jnp.ones((2, 3, 4))
    maps = jnp.ones((2, 4)), jnp.ones((4, 2))
    assert not rounded(jax.jit(lambda x: ports.add_mapped(*maps)(x)).lower(x))
    half = nn.Dense(4, dtype=jnp.bfloat16, name="dense")
    adapter = ports.Adapter({"": lora.Factors(jnp.ones((4, 1)), jnp.ones((1, 4)))}, {"": 1.0})
    params = nn.Sequential([half]).init(jax.random.key(0), x)
    site = next(iter(lora.linear_layers(params["params"])))
    adapter = ports.Adapter({site: adapter.factors[""]}, {site: 1.0})
    adapted = ports.adapted(nn.Sequential([half]).apply)
    assert not rounded(jax.jit(adapted).lower(params, adapter, x))
    side = x, jnp.ones((2, 3)), jnp.ones((2, 3), bool)
    bert_score = importlib.import_module("xlvlm_jax.metrics.bert_score")  # also a function's name
    assert not rounded(bert_score._match.lower(side, side))
    network = l2s.ShiftNetwork(3, 4)
    weights = network.init(jax.random.key(0), x[0])["params"]
    assert not rounded(l2s._error.lower(network, weights, x[0], x[0]))
