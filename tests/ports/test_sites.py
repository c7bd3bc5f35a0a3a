"""Sites and `capture`, on modules that have nothing to do with vision-language models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ports import capture, checkpoint, list_sites, llava, sites

from . import helpers


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, scale=1.0):
        return x + scale * nn.Dense(self.width, name="up")(nn.tanh(x))


class Stack(nn.Module):
    """Blocks, a norm with running statistics, and a head that is called twice."""

    @nn.compact
    def __call__(self, x, *, scale=1.0, train=False):
        for i in range(3):
            x = Block(x.shape[-1], name=f"layers_{i}")(x, scale)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        head = nn.Dense(2, name="head")
        return head(x) + head(2 * x)


X = jnp.arange(6.0).reshape(2, 3) / 6
VARIABLES = jax.jit(Stack().init)(jax.random.key(0), X)


def block(i, x, scale=1.0):
    """What block i puts out, by its formula."""
    up = VARIABLES["params"][f"layers_{i}"]["up"]
    return x + scale * (jnp.tanh(x) @ up["kernel"] + up["bias"])


class TestCapture:
    def test_returns_the_output_and_the_states(self):
        out, states = capture(Stack().apply, ["layers.0", "layers.1"])(VARIABLES, X)
        np.testing.assert_array_equal(out, Stack().apply(VARIABLES, X))
        assert list(states) == ["layers.0", "layers.1"]
        np.testing.assert_allclose(states["layers.0"], block(0, X), rtol=1e-6)
        np.testing.assert_allclose(states["layers.1"], block(1, block(0, X)), rtol=1e-6)

    def test_of_no_site_returns_no_state(self):
        assert capture(Stack().apply, [])(VARIABLES, X)[1] == {}

    @pytest.mark.parametrize("name", ["layers.1.up", "layers_1.up", "layers/1/up", "layers_1/up"])
    def test_understands_the_spelling_of_a_flax_path(self, name):
        _, states = capture(Stack().apply, [name])(VARIABLES, X)
        expected = block(1, block(0, X)) - block(0, X)
        np.testing.assert_allclose(states[name], expected, rtol=1e-5, atol=1e-6)

    def test_passes_keyword_arguments_on(self):
        _, states = capture(Stack().apply, ["layers.0"])(VARIABLES, X, scale=3.0)
        np.testing.assert_allclose(states["layers.0"], block(0, X, 3.0), rtol=1e-6)

    def test_of_a_module_that_is_called_twice_gives_both_outputs(self):
        out, states = capture(Stack().apply, ["head"])(VARIABLES, X)
        first, second = states["head"]
        np.testing.assert_array_equal(first + second, out)

    @pytest.mark.parametrize("mutable", ["batch_stats", ["batch_stats"], ("batch_stats",), True])
    def test_passes_mutable_collections_along(self, mutable):
        captured = capture(Stack().apply, ["layers.0"])
        (out, updated), states = captured(VARIABLES, X, train=True, mutable=mutable)
        expected, variables = Stack().apply(VARIABLES, X, train=True, mutable=["batch_stats"])
        np.testing.assert_array_equal(out, expected)
        assert "intermediates" not in updated
        jax.tree.map(
            np.testing.assert_array_equal, updated["batch_stats"], variables["batch_stats"]
        )
        assert set(states) == {"layers.0"}

    def test_works_on_a_function_around_apply(self):
        def double(variables, x, **kwargs):
            return Stack().apply(variables, 2 * x, **kwargs)

        _, states = capture(double, ["layers.0"])(VARIABLES, X)
        np.testing.assert_allclose(states["layers.0"], block(0, 2 * X), rtol=1e-6)

    def test_under_jit(self):
        captured = capture(Stack().apply, ["layers.2"])
        expected, got = captured(VARIABLES, X), jax.jit(captured)(VARIABLES, X)
        np.testing.assert_allclose(got[1]["layers.2"], expected[1]["layers.2"], rtol=1e-6)

    def test_under_vmap(self):
        captured = capture(Stack().apply, ["layers.2"])
        batches = jnp.stack([X, X + 1, X - 1])
        _, states = jax.vmap(captured, in_axes=(None, 0))(VARIABLES, batches)
        for x, state in zip(batches, states["layers.2"], strict=True):
            np.testing.assert_allclose(
                state, captured(VARIABLES, x)[1]["layers.2"], rtol=1e-5, atol=1e-6
            )

    def test_under_grad(self):
        captured = capture(Stack().apply, ["layers.0"])
        gradient = jax.grad(lambda x: captured(VARIABLES, x)[1]["layers.0"].sum())(X)
        expected = jax.grad(lambda x: block(0, x).sum())(X)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5)

    def test_leaves_nothing_behind(self):
        capture(Stack().apply, ["layers.0"])(VARIABLES, X)
        out = Stack().apply(VARIABLES, X)
        assert isinstance(out, jax.Array)


class TestUnknownSites:
    def test_are_named_with_the_nearest(self):
        with helpers.raises_line(ValueError, "no site matches 'layer.1'; nearest: layers.1"):
            capture(Stack().apply, ["layers.0", "layer.1"])(VARIABLES, X)

    def test_of_a_module_that_did_not_run(self):
        with helpers.raises_line(ValueError, "no site matches 'layers.3'; nearest: layers."):
            capture(Stack().apply, ["layers.3"])(VARIABLES, X)

    def test_unlike_anything(self):
        with helpers.raises_line(ValueError, "no site matches '§'; nearest: none"):
            sites.require_sites(["§"], ["layers.0"])

    def test_of_a_vlm_lead_to_the_full_name(self, small):
        message = (
            "no site matches 'language_model.layers.1'; nearest: language_model.model.layers.1"
        )
        inputs = helpers.make_inputs([0], [3])
        with helpers.raises_line(ValueError, message):
            small.vlm.forward(inputs, sites=["language_model.layers.1"])
        with helpers.raises_line(ValueError, message):
            small.vlm.generate(inputs, max_new_tokens=1, sites=["language_model.layers.1"])
        with helpers.raises_line(ValueError, message):
            capture(small.vlm.apply, ["language_model.layers.1"])(small.vlm.params, inputs)


class TestPatterns:
    KNOWN = (
        "tower.layers.0",
        "model.layers.0.mlp",
        "model.layers.0",
        "model.layers.10.mlp",
        "model.layers.10",
        "model.norm",
        "linear_1",
    )

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("model.layers.*", ["model.layers.0", "model.layers.10"]),
            ("layers.*", ["tower.layers.0", "model.layers.0", "model.layers.10"]),
            ("layers.?.mlp", ["model.layers.0.mlp"]),
            ("model/layers/1*", ["model.layers.10"]),
            ("model.layers.**", [n for n in KNOWN if n.startswith("model.layers.")]),
            ("**.mlp", ["model.layers.0.mlp", "model.layers.10.mlp"]),
            ("linear_?", ["linear_1"]),
            ("model/layers_0", ["model.layers.0"]),
            ("layers.0", []),  # a name is a whole one
            ("ayers.*", []),
            ("layer+.*", []),
        ],
    )
    def test_by_hand(self, name, meant):
        assert sites.match_sites(name, self.KNOWN) == meant

    def test_names_stay_and_patterns_become_names(self):
        found = sites.find_sites(["model/norm", "model.layers.*", "model.layers.0"], self.KNOWN)
        assert list(found.items()) == [
            ("model/norm", "model.norm"),
            ("model.layers.0", "model.layers.0"),
            ("model.layers.10", "model.layers.10"),
        ]

    def test_that_fit_nothing_lead_to_the_nearest(self):
        with helpers.raises_line(
            ValueError, "no site matches 'model.layer.*'; nearest: model.layers.0"
        ):
            sites.find_sites(["model.layer.*"], self.KNOWN)


class TestNames:
    @pytest.mark.parametrize(
        ("path", "name"),
        [
            (("language_model", "model", "layers_19"), "language_model.model.layers.19"),
            (("encoder", "layers_0", "layer_norm1"), "encoder.layers.0.layer_norm1"),
            (("multi_modal_projector", "linear_1"), "multi_modal_projector.linear_1"),
            (("visual", "blocks_3", "attn"), "visual.blocks.3.attn"),
        ],
    )
    def test_are_those_of_the_checkpoints(self, path, name):
        assert sites.site_name(path) == name

    def test_are_listed_with_their_shapes_in_the_order_of_the_computation(self):
        listed = list_sites(Stack().apply, VARIABLES, X)
        _, states = capture(Stack().apply, list(listed))(VARIABLES, X)
        # What is called twice gives a tuple.
        first = {name: jax.tree.leaves(value)[0] for name, value in states.items()}
        assert listed == {name: value.shape for name, value in first.items()}
        assert tuple(listed) == (
            *(name for i in range(3) for name in (f"layers.{i}.up", f"layers.{i}")),
            "norm",
            "head",
        )

    def test_are_listed_without_computing(self):
        abstract = jax.eval_shape(lambda: (VARIABLES, X))
        assert "layers.2" in list_sites(Stack().apply, *abstract)


def flops(module, site):
    """What the compiled program costs that returns the states of `site` alone."""
    abstract = checkpoint.abstract_params(module, llava.example_inputs(module.config))
    # Text alone: the tower's layers cost nothing here.
    ids = jax.ShapeDtypeStruct((1, 32), jnp.int32)

    def states(params, ids):
        return capture(module.apply, [site])({"params": params}, {"input_ids": ids})[1]

    return jax.jit(states).lower(abstract, ids).compile().cost_analysis()["flops"]


def test_capturing_layer_k_costs_what_k_plus_1_layers_cost():
    config = llava.Config.from_hf(helpers.llava_config(text={"num_hidden_layers": 3}))
    names = [f"language_model.model.layers.{k}" for k in range(3)]
    cost = [flops(llava.Llava(config), name) for name in names]
    for k in range(2):
        text = dataclasses.replace(config.text, num_layers=k + 1)
        cut = llava.Llava(dataclasses.replace(config, text=text))
        assert cost[k] == pytest.approx(flops(cut, names[k]), rel=1e-3)
    # Every further layer costs the same.
    steps = np.diff(cost)
    np.testing.assert_allclose(steps, steps[0], rtol=0.02)
    assert cost[0] < 1.2 * steps[0]
