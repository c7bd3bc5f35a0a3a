"""Steering: by hand, against PyTorch's forward hooks, and as a function transform."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

import ports
from ports import capture, steer, steering
from ports import vlm as vlm_module

from . import helpers

SITE = "language_model.model.layers.0"
WIDTH = helpers.TEXT["hidden_size"]
# Strong enough to change every answer.
VECTOR = 3 * np.random.default_rng(5).standard_normal(WIDTH).astype(np.float32)


@pytest.fixture(scope="module")
def inputs():
    return helpers.make_inputs([1, 2, 0], [3, 9, 6])


class Doubling(nn.Module):
    """[B, T, 2] -> twice of it, then its sum over D."""

    @nn.compact
    def __call__(self, x):
        return Twice(name="twice")(x).sum(-1)


class Twice(nn.Module):
    def __call__(self, x):
        return 2 * x


class TestAnyModule:
    X = jnp.array([[[1.0, 0.0], [3.0, 4.0], [0.0, 0.0]]])

    def run(self, edit):
        apply = capture(steer(Doubling().apply, {"twice": edit}), ["twice"])
        out, states = apply({}, self.X)
        np.testing.assert_allclose(out, states["twice"].sum(-1), rtol=1e-6)
        return np.asarray(states["twice"])[0]

    @pytest.mark.parametrize(
        ("edit", "expected"),
        [
            (ports.add([1.0, 1.0], 2.0), [[4, 2], [8, 10], [2, 2]]),
            (ports.add([1.0, 1.0], 2.0, {"from": 1}), [[2, 0], [8, 10], [2, 2]]),
            (ports.add([1.0, 1.0], 2.0, np.array([[1, 0, 1]])), [[4, 2], [6, 8], [2, 2]]),
            (ports.add_relative([2.0, 0.0], 0.5), [[3, 0], [11, 8], [0, 0]]),
            (ports.ablate([2.0, 0.0]), [[0, 0], [0, 8], [0, 0]]),
            (ports.ablate([0.0, 0.0]), [[2, 0], [6, 8], [0, 0]]),
            (ports.replace([5.0, 7.0]), [[5, 7], [5, 7], [5, 7]]),
            (ports.replace([0.0, 0.0], 0.5), [[1, 0], [3, 4], [0, 0]]),
            (ports.edit_with(lambda x, places: x + 1), [[3, 1], [7, 9], [1, 1]]),
            ([ports.add([1.0, 0.0]), ports.ablate([1.0, 0.0])], [[0, 0], [0, 8], [0, 0]]),
        ],
    )
    def test_by_hand(self, edit, expected):
        np.testing.assert_allclose(self.run(edit), expected, atol=1e-6)

    def test_edits_of_edits_add_up(self):
        edit = {"twice": ports.add([1.0, 2.0])}
        both = steer(steer(Doubling().apply, edit), edit)
        np.testing.assert_allclose(both({}, self.X), Doubling().apply({}, self.X) + 6)

    def test_a_row_has_its_own_vector_and_strength(self):
        x = jnp.ones((2, 3, 2))
        edit = ports.add(jnp.array([[1.0, 0.0], [0.0, 10.0]]), jnp.array([1.0, 2.0]))
        out = steer(Doubling().apply, {"twice": edit})({}, x)
        np.testing.assert_allclose(out, [[5] * 3, [24] * 3])

    def test_what_was_edited_can_be_returned(self):
        edits = {"twice": ports.add([1.0, 1.0], where={"from": 2})}
        out, masks = steer(Doubling().apply, edits, masks=True)({}, self.X)
        np.testing.assert_array_equal(masks["twice"][0], [[False, False, True]])
        np.testing.assert_allclose(out, [[2, 14, 2]])

    def test_a_bfloat16_state_stays_one(self):
        out = steer(Doubling().apply, {"twice": ports.add([1.0, 1.0])})(
            {}, self.X.astype("bfloat16")
        )
        assert out.dtype == jnp.bfloat16

    def test_vmap_and_grad(self):
        def total(alpha):
            edits = {"twice": ports.add(jnp.array([1.0, 2.0]), alpha)}
            return steer(Doubling().apply, edits)({}, self.X).sum()

        np.testing.assert_allclose(jax.vmap(total)(jnp.arange(3.0)), [16, 25, 34])
        assert jax.grad(total)(0.5) == 9  # three positions, 1 + 2 each


class TestAgainstPyTorch:
    @staticmethod
    @contextlib.contextmanager
    def hook(model, where, tokens):
        """Adds VECTOR to the output of layer 0 in the manner of a researcher's forward hook."""
        prompt = {}

        def edit(module, args, out):
            states = out[0] if isinstance(out, tuple) else out
            vector = torch.from_numpy(VECTOR)
            is_prompt = states.shape[1] > 1
            if is_prompt:
                prompt["length"] = states.shape[1]
            chosen = torch.zeros(states.shape[:2], dtype=torch.bool)
            if where == "all" or where == ("prompt" if is_prompt else "generated"):
                chosen[:] = True
            elif where == "last_prompt" and is_prompt:
                chosen[:, -1] = True
            elif isinstance(where, dict):
                for row, real in enumerate(tokens):
                    padding = 0 if not is_prompt else prompt["length"] - int(real)
                    chosen[row, padding + where["from"] if is_prompt else 0 :] = True
            states = states + chosen[..., None] * vector
            return (states, *out[1:]) if isinstance(out, tuple) else states

        handle = model.model.language_model.layers[0].register_forward_hook(edit)
        yield
        handle.remove()

    @pytest.mark.parametrize(
        "where", ["all", "prompt", "generated", "last_prompt", {"from": 4}], ids=str
    )
    def test_32_greedy_tokens_equal_a_forward_hooks(self, small, inputs, where):
        plain = small.vlm.generate(inputs, max_new_tokens=32).tokens
        edits = {SITE: ports.add(VECTOR, where=where)}
        ours = small.vlm.generate(inputs, max_new_tokens=32, edits=edits).tokens
        with self.hook(small.torch_model, where, inputs["attention_mask"].sum(1)):
            theirs = helpers.torch_generate(small.torch_model, inputs, 32).sequences
        np.testing.assert_array_equal(ours, theirs[:, inputs["input_ids"].shape[1] :])
        assert (np.asarray(ours) != plain).any(1).all()


class TestModels:
    def test_positions_by_their_kind(self, small, inputs):
        edits = {
            SITE: [
                ports.add(VECTOR, where=where)
                for where in ("all", "prompt", "image", "text", "last_prompt", "generated")
            ]
        }
        apply = steer(small.vlm.apply, edits, masks=True)
        _, masks = jax.jit(apply)(small.vlm.params, inputs)
        tokens = inputs["attention_mask"].astype(bool)
        image = inputs["input_ids"] == helpers.IMAGE
        last = np.zeros_like(tokens)
        last[:, -1] = True
        expected = [tokens, tokens, image, tokens & ~image, last, np.zeros_like(tokens)]
        for mask, kind in zip(masks[SITE], expected, strict=True):
            np.testing.assert_array_equal(mask, kind)

    def test_captured_states_are_those_after_the_edit(self, small, inputs):
        edits = {SITE: ports.replace(VECTOR, where="text")}
        states = small.vlm.forward(inputs, sites=[SITE], edits=edits).states[SITE]
        text = inputs["attention_mask"].astype(bool) & (inputs["input_ids"] != helpers.IMAGE)
        np.testing.assert_allclose(states[text], np.broadcast_to(VECTOR, (text.sum(), WIDTH)))
        generation = small.vlm.generate(inputs, max_new_tokens=4, sites=[SITE], edits=edits)
        states = np.asarray(generation.states[SITE])
        np.testing.assert_allclose(states, np.broadcast_to(VECTOR, states.shape))

    def test_a_strength_of_zero_changes_nothing(self, small, inputs):
        edits = {SITE: ports.add(VECTOR, 0.0)}
        plain = small.vlm.generate(inputs, max_new_tokens=12, sites=[SITE])
        same = small.vlm.generate(inputs, max_new_tokens=12, sites=[SITE], edits=edits)
        np.testing.assert_array_equal(plain.tokens, same.tokens)
        np.testing.assert_allclose(plain.states[SITE], same.states[SITE], atol=1e-5)

    def test_a_mask_moves_with_the_padding(self, small, inputs):
        """The same rows padded on the right, with the same positions edited: the same tokens."""
        mask = np.random.default_rng(0).random(inputs["input_ids"].shape) < 0.5
        right = helpers.pad_right(inputs)
        padding = (inputs["attention_mask"] == 0).sum(1)
        moved = np.stack([np.roll(row, -n) for row, n in zip(mask, padding, strict=True)])
        kept = [
            small.vlm.generate(
                rows, max_new_tokens=12, edits={SITE: ports.add(VECTOR, where=where)}
            ).tokens
            for rows, where in ((inputs, mask), (right, moved))
        ]
        np.testing.assert_array_equal(*kept)

    def test_each_row_of_a_batch_is_steered_by_itself(self, small, inputs):
        vectors = np.stack([VECTOR, -VECTOR, 0 * VECTOR])
        alphas = np.array([1.0, 0.5, 1.0])
        together = small.vlm.generate(
            inputs, max_new_tokens=12, edits={SITE: ports.add(vectors, alphas)}
        ).tokens
        for row in range(3):
            alone = small.vlm.generate(
                inputs, max_new_tokens=12, edits={SITE: ports.add(vectors[row], alphas[row])}
            ).tokens
            np.testing.assert_array_equal(together[row], alone[row])

    def test_vector_strength_positions_and_site_never_compile_again(self, small, inputs):
        sites = [f"language_model.model.layers.{i}" for i in range(2)]
        before = None
        for where in ("all", "last_prompt", {"from": 3}):
            for alpha in ([1.0, 0.0], [0.0, 2.0]):
                edits = ports.stacked(sites, np.stack([VECTOR, alpha[1] * VECTOR]), alpha, where)
                small.vlm.generate(inputs, max_new_tokens=5, edits=edits)
                compiled = vlm_module._generate._cache_size()
                before = before or compiled
        assert compiled == before

    def test_a_sweep_is_each_of_its_variants(self, small, inputs):
        sites = [f"language_model.model.layers.{i}" for i in range(2)]
        vectors = np.stack([VECTOR, VECTOR])
        variants = [
            ports.stacked(sites, vectors, alpha, where)
            for alpha, where in (([1, 0], "all"), ([0, 2], "all"), ([0, 1], "generated"))
        ]
        swept = small.vlm.sweep(inputs, variants, max_new_tokens=8, sites=[SITE])
        assert swept.tokens.shape == (3, 3, 8)
        for index, edits in enumerate(variants):
            alone = small.vlm.generate(inputs, max_new_tokens=8, edits=edits, sites=[SITE])
            np.testing.assert_array_equal(swept.tokens[index], alone.tokens)
            np.testing.assert_allclose(
                swept.states[SITE][index], alone.states[SITE], rtol=1e-4, atol=1e-4
            )

    def test_the_gradient_of_a_strength_is_that_of_differences(self, small, inputs):
        def score(alpha):
            edits = {SITE: ports.add(VECTOR / 30, alpha)}
            return steer(small.vlm.apply, edits)(small.vlm.params, inputs)[0, -1, 7]

        slope = float(jax.grad(score)(jnp.float32(0)))
        step = 0.05
        difference = float(score(step) - score(-step)) / (2 * step)
        assert slope == pytest.approx(difference, rel=2e-2)

    def test_the_vision_tower_can_be_steered(self, small, inputs):
        site = "vision_tower.vision_model.encoder.layers.1"
        vector = np.ones(helpers.VISION["hidden_size"], np.float32)
        plain = small.vlm.forward(inputs, sites=[site]).states[site]
        edited = small.vlm.forward(inputs, sites=[site], edits={site: ports.add(vector)})
        np.testing.assert_allclose(edited.states[site], plain + 1, rtol=1e-5, atol=1e-5)


class TestMessages:
    @pytest.mark.parametrize(
        ("edits", "parts"),
        [
            ({"layers.0": ports.add(VECTOR)}, ("no site matches 'layers.0'", SITE)),
            ({SITE: ports.add(VECTOR[:7])}, ("width 7", f"have {WIDTH}")),
            ({SITE: ports.add(np.stack([VECTOR] * 2))}, ("vector", "2 rows", "batch has 3")),
            ({SITE: ports.add(VECTOR, np.ones(4))}, ("alpha", "4 rows", "batch has 3")),
            ({SITE: ports.add(VECTOR, where=np.ones((3, 2)))}, ("mask", "(3, 2)", "input_ids")),
            (
                {"multi_modal_projector": ports.add(VECTOR, where="prompt")},
                ("multi_modal_projector", "no tokens"),
            ),
        ],
        ids=lambda value: "",
    )
    def test_of_edits_that_do_not_fit(self, small, inputs, edits, parts):
        with helpers.raises_line(ValueError, *parts):
            small.vlm.generate(inputs, max_new_tokens=2, edits=edits)

    def test_of_edits_that_cannot_be(self):
        with helpers.raises_line(ValueError, "where is 'everywhere'", "last_prompt"):
            ports.add(VECTOR, where="everywhere")
        with helpers.raises_line(ValueError, "shape (1, 1, 1)", "[D]"):
            ports.add(np.ones((1, 1, 1)))
        with helpers.raises_line(ValueError, "alpha has shape (2, 2)"):
            ports.add(VECTOR, np.ones((2, 2)))
        with helpers.raises_line(ValueError, "(60,)", "[2, D]"):
            ports.stacked(["a", "b"], VECTOR)

    def test_of_variants_that_differ(self, small, inputs):
        variants = [{SITE: ports.add(VECTOR)}, {SITE: ports.ablate(VECTOR)}]
        with helpers.raises_line(ValueError, "2 variants of edits have 2 structures"):
            small.vlm.sweep(inputs, variants, max_new_tokens=2)

    def test_of_a_module_that_puts_out_no_states(self):
        edits = {"twice": ports.add([1.0, 1.0])}
        with helpers.raises_line(ValueError, "site 'twice' does not put out one array"):
            steer(Doubling().apply, edits)({}, jnp.ones(2))


def test_padding_is_never_edited():
    places = steering.Places(
        jnp.array([[steering.PADDING, steering.TEXT]]), jnp.array([[-1, 0]]), jnp.arange(2)
    )
    np.testing.assert_array_equal(ports.add([1.0]).positions((1, 2, 1), places), [[False, True]])
