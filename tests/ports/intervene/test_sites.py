"""Sites and `capture`, on modules unrelated to vision-language models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ports import capture, checkpoint, list_sites
from ports.intervene.sites import find_sites, match_sites, require_sites
from ports.models import llava
from ports.names import site_name

from .. import helpers


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
    """Returns the output of block i by its formula."""
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

    def test_leaves_no_trace(self):
        capture(Stack().apply, ["layers.0"])(VARIABLES, X)
        out = Stack().apply(VARIABLES, X)
        assert isinstance(out, jax.Array)


class Carrying(nn.Module):
    """A block as `nn.scan` takes it: (carry, None)."""

    @nn.compact
    def __call__(self, x, _):
        return Block(x.shape[-1], name="block")(x), None


def lifted(transform, **options):
    """Returns a module whose part "inner" is a block inside a transform."""

    class Lifted(nn.Module):
        @nn.compact
        def __call__(self, x):
            if transform is nn.scan:
                inner = nn.scan(Carrying, split_rngs={"params": True}, length=3, **options)
                x, _ = inner(name="inner")(x, None)
            else:
                x = transform(Block, **options)(x.shape[-1], name="inner")(x)
            return nn.Dense(2, name="head")(x)

    return Lifted()


SCANNED = lifted(nn.scan, variable_axes={"params": 0, "intermediates": 0})
MAPPED = {"variable_axes": {"params": None, "intermediates": 0}, "split_rngs": {"params": False}}


def by_hand(params, x):
    return x + jnp.tanh(x) @ params["up"]["kernel"] + params["up"]["bias"]


class TestLifted:
    def test_below_a_scan_states_are_stacked(self):
        variables = SCANNED.init(jax.random.key(0), X)
        sites = ["inner", "inner.block.up"]
        out, states = jax.jit(capture(SCANNED.apply, sites))(variables, X)
        np.testing.assert_allclose(out, SCANNED.apply(variables, X), rtol=1e-6)
        x, expected = X, []
        for i in range(3):
            params = jax.tree.map(lambda leaf, i=i: leaf[i], variables["params"]["inner"]["block"])
            expected.append(by_hand(params, x))
            ups = expected[-1] - x
            np.testing.assert_allclose(states["inner.block.up"][i], ups, rtol=1e-5, atol=1e-6)
            x = expected[-1]
        np.testing.assert_allclose(states["inner"], jnp.stack(expected), rtol=1e-5)

    def test_below_a_vmap_states_are_stacked(self):
        module = lifted(nn.vmap, **MAPPED)
        variables = module.init(jax.random.key(0), X)
        _, states = capture(module.apply, "inner")(variables, X)
        expected = by_hand(variables["params"]["inner"], X)
        np.testing.assert_allclose(states["inner"], expected, rtol=1e-5)

    @pytest.mark.parametrize(
        ("transform", "options"),
        [
            (nn.scan, {"variable_axes": {"params": 0}}),
            (nn.vmap, {"variable_axes": {"params": None}, "split_rngs": {"params": False}}),
            (nn.jit, {"variables": "params"}),
        ],
        ids=["scan", "vmap", "jit"],
    )
    @pytest.mark.parametrize("below", ["", ".block", ".block.up", ".up"])
    def test_the_remedy_for_dropped_states_is_named(self, transform, options, below):
        if ("block" in below) != (transform is nn.scan) and below:
            return
        module = lifted(transform, **options)
        variables = module.init(jax.random.key(0), X)
        parts = (f"'inner{below}'", "variable_axes={'intermediates': 0}", "nn.scan")
        with helpers.raises_line(ValueError, *parts):
            capture(module.apply, ["inner" + below])(variables, X)

    def test_states_that_a_loop_drops_are_refused(self):
        class Looping(nn.Module):
            @nn.compact
            def __call__(self, x):
                block = Block(x.shape[-1], name="block")
                x = block(x)
                step = (lambda _, c: c[0] < 3), (lambda m, c: (c[0] + 1, m(c[1])))
                return nn.while_loop(*step, block, (0, x))[1]

        variables = Looping().init(jax.random.key(0), X)
        with helpers.raises_line(ValueError, "'block'", "nn.while_loop keeps nothing"):
            capture(Looping().apply, ["block"])(variables, X)

    @pytest.mark.parametrize("transform", [nn.remat, nn.jit], ids=["remat", "jit"])
    def test_below_other_transforms(self, transform):
        module = lifted(transform)
        variables = module.init(jax.random.key(0), X)
        expected = by_hand(variables["params"]["inner"], X)
        for site in ("inner", "inner.up"):  # one after the other: what is compiled is not kept
            _, states = capture(module.apply, [site])(variables, X)
            given = expected - (X if site == "inner.up" else 0)
            np.testing.assert_allclose(states[site], given, rtol=1e-5, atol=1e-6)

    def test_below_mapped_variables(self):
        module = lifted(
            nn.map_variables,
            mapped_collections="params",
            trans_in_fn=lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree),
        )
        params = lifted(nn.remat).init(jax.random.key(0), X)["params"]
        _, states = capture(module.apply, ["inner"])({"params": params}, X)
        doubled = jax.tree.map(lambda leaf: 2 * leaf, params["inner"])
        np.testing.assert_allclose(states["inner"], by_hand(doubled, X), rtol=1e-5)


class Coder(nn.Module):
    """A module that is called by its methods, one of which sows."""

    def setup(self):
        self.up = nn.Dense(4)

    def encode(self, x):
        self.sow("intermediates", "sown", x + 1)
        return {"code": self.up(x), "input": x}

    def _private(self, x):
        return 3 * x

    def scale(self, x):
        return self._private(x), None


class Calling(nn.Module):
    @nn.compact
    def __call__(self, x):
        coder = Coder(name="coder")
        return coder.encode(x)["code"], coder.scale(x)[0]


class TestWhatModulesOutput:
    VARIABLES = Calling().init(jax.random.key(0), X)

    def test_of_a_method(self):
        sites = ["coder.encode", "coder.scale", "coder._private", "coder.up"]
        out, states = capture(Calling().apply, sites)(self.VARIABLES, X)
        np.testing.assert_array_equal(states["coder.encode"]["code"], out[0])
        np.testing.assert_array_equal(states["coder.encode"]["input"], X)
        np.testing.assert_array_equal(states["coder.up"], out[0])
        for site in ("coder.scale", "coder._private"):
            np.testing.assert_array_equal(states[site], 3 * X)
        with helpers.raises_line(ValueError, "no site matches 'coder'; nearest: coder."):
            capture(Calling().apply, "coder")(self.VARIABLES, X)

    def test_when_a_method_is_applied(self):
        variables = {"params": self.VARIABLES["params"]["coder"]}
        _, states = capture(Coder().apply, ["up"])(variables, X, method="encode")
        up = variables["params"]["up"]
        np.testing.assert_allclose(states["up"], X @ up["kernel"] + up["bias"], rtol=1e-6)

    def test_what_a_module_sows_is_the_callers(self):
        captured = capture(Calling().apply, ["coder.up"])
        (_, variables), _ = captured(self.VARIABLES, X, mutable=["intermediates"])
        _, expected = Calling().apply(self.VARIABLES, X, mutable=["intermediates"])
        jax.tree.map(np.testing.assert_array_equal, variables, expected)

    def test_what_the_caller_captures_stays(self):
        captured = capture(Stack().apply, ["layers.0", "head"])
        options = {"mutable": ["intermediates"], "capture_intermediates": True}
        (_, variables), states = captured(VARIABLES, X, **options)
        _, expected = Stack().apply(VARIABLES, X, **options)
        jax.tree.map(np.testing.assert_array_equal, variables, expected)
        np.testing.assert_array_equal(
            states["layers.0"], expected["intermediates"]["layers_0"]["__call__"][0]
        )

    def test_captures_of_captures(self):
        twice = capture(capture(Stack().apply, ["layers.0", "head"]), "layers.0")
        (out, inner), outer = twice(VARIABLES, X)
        np.testing.assert_array_equal(out, Stack().apply(VARIABLES, X))
        assert list(inner) == ["layers.0", "head"]
        assert list(outer) == ["layers.0"]
        np.testing.assert_array_equal(inner["layers.0"], outer["layers.0"])

    def test_under_an_interceptor(self):
        def double(method, args, kwargs, context):
            out = method(*args, **kwargs)
            return 2 * out if context.module.name == "layers_0" else out

        with nn.intercept_methods(double):
            _, states = capture(Stack().apply, ["layers.0"])(VARIABLES, X)
        np.testing.assert_allclose(states["layers.0"], 2 * block(0, X), rtol=1e-6)

    def test_with_random_numbers(self):
        class Noisy(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Dropout(0.5, deterministic=False, name="drop")(x)

        keys = {"dropout": jax.random.key(3)}
        out, states = capture(Noisy().apply, ["drop"])({}, X, rngs=keys)
        np.testing.assert_array_equal(out, Noisy().apply({}, X, rngs=keys))
        np.testing.assert_array_equal(states["drop"], out)


class TestSites:
    def test_a_string_is_one(self):
        _, states = capture(Stack().apply, "layers.0")(VARIABLES, X)
        np.testing.assert_allclose(states["layers.0"], block(0, X), rtol=1e-6)

    def test_two_spellings_of_one(self):
        _, states = capture(Stack().apply, ["layers.0", "layers_0"])(VARIABLES, X)
        np.testing.assert_array_equal(states["layers.0"], states["layers_0"])

    @pytest.mark.parametrize("given", [3, [3], [("layers", 0)]], ids=str)
    def test_other_than_names(self, given):
        with helpers.raises_line(ValueError, "got site ", "'layers.19'"):
            capture(Stack().apply, given)

    def test_of_a_compiled_function(self):
        with helpers.raises_line(ValueError, "apply is already jitted", "jax.jit(capture(module"):
            capture(jax.jit(Stack().apply), ["layers.0"])(VARIABLES, X)


class TestUnknownSites:
    def test_are_named_with_the_nearest(self):
        with helpers.raises_line(ValueError, "no site matches 'layer.1'; nearest: layers.1"):
            capture(Stack().apply, ["layers.0", "layer.1"])(VARIABLES, X)

    def test_of_a_module_that_did_not_run(self):
        with helpers.raises_line(ValueError, "no site matches 'layers.3'; nearest: layers."):
            capture(Stack().apply, ["layers.3"])(VARIABLES, X)

    def test_unlike_anything(self):
        with helpers.raises_line(ValueError, "no site matches '§'; nearest: none"):
            require_sites(["§"], ["layers.0"])

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
            ("layers.0", []),  # two sites end in it
            ("layers/10", ["model.layers.10"]),
            ("norm", ["model.norm"]),
            ("orm", []),
            ("mlp", []),
            ("layers.[01]", []),
            ("ayers.*", []),
            ("layer+.*", []),
        ],
    )
    def test_by_hand(self, name, meant):
        assert match_sites(name, self.KNOWN) == meant

    def test_names_stay_and_patterns_become_names(self):
        found = find_sites(["model/norm", "model.layers.*", "model.layers.0"], self.KNOWN)
        assert list(found.items()) == [
            ("model/norm", "model.norm"),
            ("model.layers.0", "model.layers.0"),
            ("model.layers.10", "model.layers.10"),
        ]

    def test_the_end_of_a_name_means_the_first_sites(self):
        first = ["model.layers.0", "model.layers.1", "model.layers.1.mlp"]
        known = ["tower.layers.1", "tower.layers.2", "tower.norm", "tower.layers.2.mlp", *first]
        found = find_sites(["layers.1", "norm", "tower.layers.2"], known, first=first)
        assert list(found.values()) == ["model.layers.1", "tower.norm", "tower.layers.2"]
        with helpers.raises_line(
            ValueError,
            "'layers.2' is not one of model.layers.0 to model.layers.1; if you mean "
            "'tower.layers.2', give its full name",
        ):
            find_sites(["layers.2"], known, first=first)
        with helpers.raises_line(ValueError, "'layers.2.mlp' is not one of model.layers.1.mlp to "):
            find_sites(["layers.2.mlp"], known, first=first)
        with helpers.raises_line(ValueError, "no site matches 'layers.3'; nearest: "):
            find_sites(["layers.3"], known, first=first)

    def test_that_match_nothing_lead_to_the_nearest(self):
        with helpers.raises_line(
            ValueError, "no site matches 'model.layer.*'; nearest: model.layers.0"
        ):
            find_sites(["model.layer.*"], self.KNOWN)
        for pattern in ("model.layers.[01]", "layers.{0,10}"):
            with helpers.raises_line(
                ValueError,
                f"no site matches '{pattern}' (patterns support *, ? and **, but not brackets; "
                "list the sites); nearest: model.layers.",
            ):
                find_sites([pattern], self.KNOWN)


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
        assert site_name(path) == name

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
    """Returns the cost of the compiled program that returns only the states of `site`."""
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
