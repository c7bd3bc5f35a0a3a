"""Edits by hand, in any Linen module, and `steer` as a function transform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import ports
from ports import capture, steer
from ports.edits import PADDING, TEXT, Places

from . import helpers

VECTOR = np.ones(60, np.float32)


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
            (ports.add_mapped([[1.0, 1.0]], [[2.0], [0.5]]), [[6, 1], [34, 15], [0, 0]]),
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

    def test_given_states_are_those_that_are_steered(self):
        given = {"twice": jnp.full((1, 3, 2), 5.0)}
        apply = ports.substitute(Doubling().apply, given)
        np.testing.assert_allclose(apply({}, self.X), [[10] * 3])
        steered = steer(apply, {"twice": ports.add([1.0, 2.0])})
        np.testing.assert_allclose(steered({}, self.X), [[13] * 3])
        # What led up to them is left out.
        assert "mul" in str(jax.make_jaxpr(Doubling().apply)({}, self.X))
        lowered = jax.jit(apply).lower({}, self.X).compile().as_text()
        assert "multiply" not in lowered
        with pytest.raises(ValueError, match="no site matches 'thrice'"):
            ports.substitute(Doubling().apply, {"thrice": 0})({}, self.X)

    def test_only_another_kind_of_edit_compiles_again(self):
        traced = []

        def run(edits, x):
            traced.append(1)
            return steer(Doubling().apply, edits)({}, x)

        compiled = jax.jit(run)
        for vector in ([1.0, 2.0], [3.0, 4.0]):
            for alpha in (1.0, np.float32(2), jnp.float32(3)):
                for where in ("all", {"from": 1}, {"from": 2}):
                    compiled({"twice": ports.add(np.array(vector), alpha, where)}, self.X)
        assert len(traced) == 1
        for mask in ([[1, 0, 1]], [[0, 0, 1]]):
            compiled({"twice": ports.add(np.ones(2), where=np.array(mask))}, self.X)
        assert len(traced) == 2
        compiled({"twice": ports.ablate(np.ones(2))}, self.X)
        assert len(traced) == 3

    def test_vmap_and_grad(self):
        def total(alpha):
            edits = {"twice": ports.add(jnp.array([1.0, 2.0]), alpha)}
            return steer(Doubling().apply, edits)({}, self.X).sum()

        np.testing.assert_allclose(jax.vmap(total)(jnp.arange(3.0)), [16, 25, 34])
        assert jax.grad(total)(0.5) == 9  # three positions, 1 + 2 each


def test_padding_is_never_edited():
    places = Places(jnp.array([[PADDING, TEXT]]), jnp.array([[-1, 0]]), jnp.arange(2)[None])
    np.testing.assert_array_equal(ports.add([1.0]).positions((1, 2, 1), places), [[False, True]])


def test_columns_are_the_callers():
    """Two fillers, then the caller's columns 1 and 0: a row that was padded on the right."""
    kind, index = jnp.array([[PADDING, PADDING, PADDING, TEXT]]), jnp.array([[-1, -1, -1, 0]])
    places = Places(kind, index, jnp.array([[-1, -1, 1, 0]]))
    x = jnp.arange(4.0)[None, :, None]
    edit = ports.edit_with(lambda x, places: x + 10 * x[:, :1] + places.slot[..., None])
    np.testing.assert_allclose(edit(x, places)[0, :, 0], [0, 1, 2, 33])
    for column, edited in ((0, True), (1, False)):
        mask = np.arange(2)[None] == column
        positions = ports.add([1.0], where=mask).positions(x.shape, places)
        np.testing.assert_array_equal(positions, [[False, False, False, edited]])


class TestMessages:
    def test_of_edits_that_cannot_be(self):
        with helpers.raises_line(ValueError, "where is 'everywhere'", "last_prompt"):
            ports.add(VECTOR, where="everywhere")
        with helpers.raises_line(ValueError, "shape (1, 1, 1)", "[D]"):
            ports.add(np.ones((1, 1, 1)))
        with helpers.raises_line(ValueError, "alpha has shape (2, 2)"):
            ports.add(VECTOR, np.ones((2, 2)))
        with helpers.raises_line(ValueError, "(2, 60) and (2, 60)", "[R, D] and [D, R]"):
            ports.add_mapped(np.ones((2, 60)), np.ones((2, 60)))
        with helpers.raises_line(ValueError, "alpha is nan; expected finite numbers"):
            ports.add(VECTOR, float("nan"))
        with helpers.raises_line(ValueError, "alpha has entries that are not finite"):
            ports.ablate(VECTOR, np.array([1.0, np.inf]))
        with helpers.raises_line(ValueError, "vector has entries that are not finite"):
            ports.add(VECTOR * np.nan)
        with helpers.raises_line(ValueError, "{'from': -1}", "i >= 0"):
            ports.add(VECTOR, where={"from": -1})
        with helpers.raises_line(ValueError, "(60,)", "[2, D]"):
            ports.stacked(["a", "b"], VECTOR)

    def test_of_a_module_that_puts_out_no_states(self):
        chosen = {"twice": ports.add([1.0, 1.0])}
        with helpers.raises_line(ValueError, "site 'twice' does not put out one array"):
            steer(Doubling().apply, chosen)({}, jnp.ones(2))
