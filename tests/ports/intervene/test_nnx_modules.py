"""`capture` and `steer` on `flax.nnx` models: whole, compiled, split, published."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ports
from ports import add, capture, list_sites, replace, steer, substitute


class Block(nnx.Module):
    """A pre-norm block of causal attention and an MLP."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + self.attention(self.norm(x), mask=mask)
        return x + self.mlp(x)

    def mlp(self, x):
        return self.down(jax.nn.gelu(self.up(x)))


class Model(nnx.Module):
    """Two blocks between embeddings and a head; counts its calls."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.layers = nnx.List([Block(8, rngs) for _ in range(2)])
        self.head = nnx.Linear(8, 11, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.array(0))

    def __call__(self, tokens):
        self.calls[...] += 1
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


TOKENS = jnp.array([[1, 4, 2, 9], [3, 3, 0, 5]])
VECTOR = np.random.default_rng(0).normal(size=8).astype(np.float32)
EDITS = {"layers.0": add(VECTOR, 2.0, where={"from": 2})}


@pytest.fixture
def model():
    return Model(nnx.Rngs(0))


def by_hand(model, edit=lambda x: x):
    """Returns the model's output with the first layer's output edited, and that output."""
    first = edit(model.layers[0](model.embed(TOKENS)))
    return model.head(model.layers[1](first)), first


def edited(x):
    return x.at[:, 2:].add(2 * VECTOR)


class TestCapture:
    def test_by_hand(self, model):
        out, states = capture(model, ["layers.0", "layers/1"])(TOKENS)
        expected, first = by_hand(model)
        np.testing.assert_allclose(out, expected, rtol=1e-6)
        np.testing.assert_allclose(states["layers.0"], first, rtol=1e-6)
        assert states["layers/1"].shape == (2, 4, 8)

    def test_the_model_runs_once_and_keeps_its_state(self, model):
        capture(model, "layers.0")(TOKENS)
        assert int(model.calls[...]) == 1
        assert "__wrapped__" not in vars(vars(Block)["__call__"])  # the class is as it was

    def test_compiled(self, model):
        run = nnx.jit(capture(lambda model, x: model(x), "layers.1.attention"))
        out, states = run(model, TOKENS)
        again, same = capture(model, "layers.1.attention")(TOKENS)
        np.testing.assert_allclose(out, again, rtol=1e-5, atol=1e-6)
        for name in states:
            np.testing.assert_allclose(states[name], same[name], rtol=1e-5, atol=1e-6)
        assert int(model.calls[...]) == 2

    def test_split(self, model):
        graph, state = nnx.split(model)
        out, states = jax.jit(capture(graph, "layers.0"))(state, TOKENS)
        expected, first = by_hand(model)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(states["layers.0"], first, rtol=1e-5, atol=1e-6)

    def test_a_method(self, model):
        _, states = capture(model, "layers.0.mlp")(TOKENS)
        x = model.embed(TOKENS)
        expected = (
            model.layers[0](x)
            - x
            - model.layers[0].attention(
                model.layers[0].norm(x), mask=nnx.make_causal_mask(jnp.ones((2, 4)))
            )
        )
        np.testing.assert_allclose(states["layers.0.mlp"], expected, rtol=1e-4, atol=1e-5)

    def test_a_module_that_is_called_twice(self, model):
        def twice(model, x):
            return model(x), model(x + 1)

        _, states = capture(twice, "embed")(model, TOKENS)
        np.testing.assert_allclose(states["embed"][1], model.embed(TOKENS + 1))

    def test_an_overriding_method_counts_once(self):
        class Twice(nnx.Linear):
            def __call__(self, x):
                return 2 * super().__call__(x)

        class Both(nnx.Module):
            def __init__(self):
                self.plain = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
                self.twice = Twice(2, 2, rngs=nnx.Rngs(1))

            def __call__(self, x):
                return self.plain(x), self.twice(x)

        (plain, twice), states = capture(Both(), ["plain", "twice"])(jnp.ones((1, 2)))
        np.testing.assert_array_equal(states["plain"], plain)
        np.testing.assert_array_equal(states["twice"], twice)

    def test_sites(self, model):
        sites = list_sites(model, TOKENS)
        assert list(sites)[:2] == ["embed", "layers.0.norm"]
        assert sites["layers.1"] == (2, 4, 8) and int(model.calls[...]) == 0


class TestSteer:
    def test_by_hand(self, model):
        np.testing.assert_allclose(
            steer(model, EDITS)(TOKENS), by_hand(model, edited)[0], rtol=1e-5
        )

    def test_captured_states_include_the_edit(self, model):
        _, first = by_hand(model, edited)
        for both in (
            capture(steer(model, EDITS), "layers.0"),
            lambda x: steer(capture(model, "layers.0"), EDITS)(x),
        ):
            np.testing.assert_allclose(both(TOKENS)[1]["layers.0"], first, rtol=1e-5)

    def test_edits_in_order_and_masks(self, model):
        inner = steer(model, {"layers.0": replace(VECTOR)})
        outer, masks = steer(inner, EDITS, masks=True)(TOKENS)
        expected, _ = by_hand(model, lambda x: edited(jnp.broadcast_to(VECTOR, x.shape)))
        np.testing.assert_allclose(outer, expected, rtol=1e-5, atol=1e-6)
        assert masks["layers.0"][0].tolist() == [[False, False, True, True]]

    def test_under_jit_vmap_and_grad(self, model):
        graph, state = nnx.split(model)

        def loss(vector, alpha):
            steered = steer(graph, {"layers.0": add(vector, alpha)})
            return (steered(state, TOKENS) ** 2).sum()

        slope = jax.jit(jax.grad(loss))(jnp.asarray(VECTOR), 1.0)
        step = 1e-2 * VECTOR / np.linalg.norm(VECTOR)
        change = loss(VECTOR + step, 1.0) - loss(VECTOR - step, 1.0)
        np.testing.assert_allclose(change / 2, slope @ step, rtol=2e-2)
        several = jax.vmap(loss, (None, 0))(jnp.asarray(VECTOR), jnp.array([0.0, 1.0]))
        np.testing.assert_allclose(several[1], loss(VECTOR, 1.0), rtol=1e-5)

    def test_training_through_an_edit(self, model):
        """`nnx.grad` of a steered model, and an optimizer's step."""
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            def loss(model):
                return (steer(lambda model, x: model(x), EDITS)(model, TOKENS) ** 2).mean()

            value, slopes = nnx.value_and_grad(loss)(model)
            optimizer.update(model, slopes)
            return value

        first, second = step(model, optimizer), step(model, optimizer)
        assert second < first

    def test_substitute(self, model):
        given = jnp.ones((2, 4, 8))
        out = substitute(model, {"layers.0": given})(TOKENS)
        np.testing.assert_allclose(out, model.head(model.layers[1](given)), rtol=1e-5)

    def test_two_threads(self, model):
        """One thread edits while the other does not; neither affects the other."""
        plain, found = model(TOKENS), []

        def run():
            for _ in range(3):
                found.append(capture(Model(nnx.Rngs(0)), "layers.0")(TOKENS)[0])

        thread = threading.Thread(target=run)
        thread.start()
        for _ in range(3):
            steer(model, EDITS)(TOKENS)
        thread.join()
        assert len(found) == 3
        for out in found:
            np.testing.assert_allclose(out, plain, rtol=1e-6)
        assert "__wrapped__" not in vars(vars(Block)["__call__"])


class TestErrors:
    def test_no_such_site(self, model):
        with pytest.raises(ValueError, match=r"no site matches 'layers.7'; nearest: layers\."):
            capture(model, "layers.7")(TOKENS)

    def test_already_compiled(self, model):
        function = nnx.jit(lambda model, x: model(x))
        for wrapped in (capture(function, "embed"), steer(function, EDITS)):
            with pytest.raises(ValueError, match=r"already jitted, .*; wrap first"):
                wrapped(model, TOKENS)

    def test_an_edit_of_another_width(self, model):
        with pytest.raises(ValueError, match=r"layers\.0"):
            steer(model, {"layers.0": ports.add(np.ones(3))})(TOKENS)

    def test_the_class_is_restored_after_an_error(self, model):
        with pytest.raises(ValueError, match="no site"):
            steer(model, {"nothing": add(VECTOR)})(TOKENS)
        assert "__wrapped__" not in vars(vars(Block)["__call__"])


def test_a_published_model():
    """Tunix's Llama in nnx, if that package is installed."""
    llama = pytest.importorskip("tunix.models.llama3.model")
    config = llama.ModelConfig(
        num_layers=2,
        vocab_size=31,
        embed_dim=16,
        hidden_dim=24,
        num_heads=4,
        head_dim=4,
        num_kv_heads=2,
        norm_eps=1e-5,
        rope_theta=10_000,
    )
    model = llama.Llama3(config, rngs=nnx.Rngs(0))
    tokens = jnp.array([[1, 5, 7]])
    positions, mask = jnp.arange(3)[None], jnp.tril(jnp.ones((1, 3, 3), bool))
    sites = list_sites(model, tokens, positions, None, mask)
    site = next(site for site in sites if site.endswith("layers.0.mlp"))
    _, states = capture(model, site)(tokens, positions, None, mask)
    assert states[site].shape == (1, 3, 16)
    (plain, _), (moved, _) = (
        run(tokens, positions, None, mask)
        for run in (model, steer(model, {site: add(np.ones(16, np.float32))}))
    )
    assert not np.allclose(plain, moved)
