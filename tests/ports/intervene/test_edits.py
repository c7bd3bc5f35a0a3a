"""Edits by hand, in any Linen module, and `steer` as a function transform."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import ports
from ports import capture, steer
from ports.intervene.edits import PADDING, TEXT, Places

from .. import helpers

VECTOR = np.ones(60, np.float32)


class Pair(NamedTuple):
    first: Any
    second: Any


class Doubling(nn.Module):
    """[B, T, 2] -> twice the input, then its sum over D."""

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

    @pytest.mark.parametrize("where", ["all", {"at": [1]}])
    def test_a_state_of_zeros_has_a_gradient(self, where):
        """Its norm has no derivative, also where it is not edited."""

        def total(x):
            edits = {"twice": ports.add_relative(jnp.array([1.0, 0.0]), 0.5, where)}
            return steer(Doubling().apply, edits)({}, x).sum()

        moved = 0.5 * 2 * np.array([[1, 0], [0.6, 0.8], [0, 0]])
        expected = 2 + (moved if where == "all" else moved * [[0], [1], [0]])
        np.testing.assert_allclose(jax.grad(total)(self.X)[0], expected, rtol=1e-6)

    @pytest.mark.parametrize("make", [ports.replace, lambda v, a: ports.edit_with(lambda x: v, a)])
    def test_what_has_no_weight_leaves_no_nan(self, make):
        given = jnp.array([5.0, 7.0])
        broken = jnp.array([[[jnp.inf, 0.0], [jnp.nan, 4.0]]])
        whole = steer(Twice().apply, {"": make(given, 1.0)})({}, broken)
        np.testing.assert_array_equal(whole, [[[5, 7], [5, 7]]])
        half = np.asarray(make(given, 0.5)(broken))
        assert (np.isfinite(half) == [[[False, True], [False, True]]]).all()
        # The derivative by the strength is that of the mixture, also at its ends.
        for alpha in (0.0, 0.3, 1.0):
            slope = jax.grad(lambda a: make(given, a)(self.X).sum())(alpha)
            np.testing.assert_allclose(slope, float((given - self.X).sum()), rtol=1e-6)

    def test_a_function_that_fails_does_nothing_with_strength_zero(self):
        edit = ports.edit_with(lambda x: x / 0, 0.0)
        np.testing.assert_array_equal(edit(self.X), self.X)


def test_padding_is_never_edited():
    places = Places(jnp.array([[PADDING, TEXT]]), jnp.array([[-1, 0]]), jnp.arange(2)[None])
    np.testing.assert_array_equal(ports.add([1.0]).positions((1, 2, 1), places), [[False, True]])


def test_columns_are_those_of_the_caller():
    """Two padding columns, then the caller's columns 1 and 0: a row padded on the right."""
    kind, index = jnp.array([[PADDING, PADDING, PADDING, TEXT]]), jnp.array([[-1, -1, -1, 0]])
    places = Places(kind, index, jnp.array([[-1, -1, 1, 0]]))
    x = jnp.arange(4.0)[None, :, None]
    edit = ports.edit_with(lambda x, places: x + 10 * x[:, :1] + places.slot[..., None])
    np.testing.assert_allclose(edit(x, places)[0, :, 0], [0, 1, 2, 33])
    for column, edited in ((0, True), (1, False)):
        mask = np.arange(2)[None] == column
        positions = ports.add([1.0], where=mask).positions(x.shape, places)
        np.testing.assert_array_equal(positions, [[False, False, False, edited]])


class TestRanks:
    """Outputs keep their rank; vectors, strengths and positions apply to their own axes."""

    V = np.array([1.0, 10.0], np.float32)
    ROWS = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]], np.float32)

    def change(self, shape, edit):
        """Returns what the edit adds to zeros of this shape."""
        apply = capture(steer(Doubling().apply, {"twice": edit}), "twice")
        _, states = apply({}, jnp.zeros(shape))
        assert states["twice"].shape == shape
        return np.asarray(states["twice"])

    @pytest.mark.parametrize("shape", [(2,), (3, 2), (1, 2), (3, 4, 2), (3, 5, 4, 2)], ids=str)
    def test_a_vector_is_added_everywhere(self, shape):
        np.testing.assert_array_equal(
            self.change(shape, ports.add(self.V, 2.0)), np.broadcast_to(2 * self.V, shape)
        )

    @pytest.mark.parametrize("shape", [(3, 2), (3, 4, 2), (3, 5, 4, 2)], ids=str)
    def test_rows_have_their_own_vector_and_strength(self, shape):
        alpha = np.array([1.0, -1.0, 0.5], np.float32)
        expected = (alpha[:, None] * self.ROWS).reshape(3, *(1,) * (len(shape) - 2), 2)
        np.testing.assert_array_equal(
            self.change(shape, ports.add(self.ROWS, alpha)), np.broadcast_to(expected, shape)
        )

    def test_one_row_is_for_all(self):
        edit = ports.add(self.V[None], np.array([2.0]))
        for shape in ((2,), (3, 2), (3, 4, 2)):
            np.testing.assert_array_equal(
                self.change(shape, edit), np.broadcast_to(2 * self.V, shape)
            )

    @pytest.mark.parametrize("shape", [(3, 2), (3, 4, 2), (3, 5, 4, 2)], ids=str)
    def test_a_mask_of_rows(self, shape):
        rows = np.array([True, False, True])
        changed = self.change(shape, ports.add(self.V, where=rows))
        expected = rows.reshape(3, *(1,) * (len(shape) - 1)) * self.V
        np.testing.assert_array_equal(changed, np.broadcast_to(expected, shape))

    @pytest.mark.parametrize("shape", [(3, 4, 2), (3, 5, 4, 2)], ids=str)
    def test_a_mask_of_positions(self, shape):
        mask = np.random.default_rng(0).random((3, 4)) < 0.5
        expected = mask.reshape(3, *(1,) * (len(shape) - 3), 4, 1) * self.V
        np.testing.assert_array_equal(
            self.change(shape, ports.add(self.V, where=mask)), np.broadcast_to(expected, shape)
        )

    @pytest.mark.parametrize("shape", [(3, 2), (1, 3, 2), (2, 5, 3, 2)], ids=str)
    def test_positions_are_counted_along_the_second_to_last_axis(self, shape):
        for where, chosen in (({"from": 1}, [0, 1, 1]), ({"at": 1}, [0, 1, 0])):
            expected = np.array(chosen)[:, None] * self.V
            np.testing.assert_array_equal(
                self.change(shape, ports.add(self.V, where=where)), np.broadcast_to(expected, shape)
            )

    def test_what_was_edited_has_the_shape_of_the_states(self):
        for shape, expected in (((2,), ()), ((3, 2), (3,)), ((2, 3, 2), (1, 3))):
            assert ports.add(self.V).positions(shape, None).shape == expected

    def test_the_only_axis_has_no_rows(self):
        with helpers.raises_line(ValueError, "(3, 2)", "'twice' have shape (2,)"):
            self.change((2,), ports.add(self.ROWS))
        with helpers.raises_line(ValueError, "(2,)", "'twice' have shape (3, 2)", "[3]"):
            self.change((3, 2), ports.add(self.V, where=np.array([True, False])))


class TestPatching:
    """`replace` with one state per position, from another run."""

    X = jnp.zeros((2, 4, 2))
    GIVEN = np.arange(16, dtype=np.float32).reshape(2, 4, 2) + 1

    def run(self, edit, x=X):
        return np.asarray(
            capture(steer(Doubling().apply, {"twice": edit}), "twice")({}, x)[1]["twice"]
        )

    def test_all_positions(self):
        np.testing.assert_array_equal(self.run(ports.replace(self.GIVEN)), self.GIVEN)
        np.testing.assert_array_equal(self.run(ports.replace(self.GIVEN, 0.5)), self.GIVEN / 2)
        one = self.GIVEN[:1]
        np.testing.assert_array_equal(self.run(ports.replace(one)), np.repeat(one, 2, 0))

    def test_some_positions(self):
        for where, mask in (
            ({"from": 2}, np.array([[0, 0, 1, 1]] * 2)),
            (np.array([[1, 0, 0, 1], [0, 1, 0, 0]]), np.array([[1, 0, 0, 1], [0, 1, 0, 0]])),
            (np.array([False, True]), np.array([[0] * 4, [1] * 4])),
        ):
            np.testing.assert_array_equal(
                self.run(ports.replace(self.GIVEN, where=where)), mask[..., None] * self.GIVEN
            )

    def test_states_go_to_the_positions_that_are_named(self):
        given = self.GIVEN[:, :2]
        expected = np.zeros((2, 4, 2))
        expected[:, [3, 1]] = given
        np.testing.assert_array_equal(
            self.run(ports.replace(given, where={"at": [3, 1]})), expected
        )
        expected = np.zeros((2, 4, 2))
        expected[0, [0, 2]], expected[1, [3, 0]] = given
        where = {"at": np.array([[0, 2], [3, 0]])}
        np.testing.assert_array_equal(self.run(ports.replace(given, where=where)), expected)

    def test_rows_without_positions(self):
        np.testing.assert_array_equal(
            self.run(ports.replace(self.GIVEN[0]), self.X[0]), self.GIVEN[0]
        )
        expected = np.zeros((4, 2))
        expected[[2, 0]] = self.GIVEN[0, :2]
        edit = ports.replace(self.GIVEN[0, :2], where={"at": [2, 0]})
        np.testing.assert_array_equal(self.run(edit, self.X[0]), expected)

    def test_states_of_more_axes(self):
        given = np.arange(24, dtype=np.float32).reshape(1, 3, 4, 2)
        np.testing.assert_array_equal(
            self.run(ports.replace(given), jnp.zeros((1, 3, 4, 2))), given
        )

    def test_add_and_ablate_take_states_too(self):
        x = jnp.full((2, 4, 2), 0.5)
        np.testing.assert_allclose(self.run(ports.add(self.GIVEN, 2.0), x), 1 + 2 * self.GIVEN)
        unit = self.GIVEN / np.linalg.norm(self.GIVEN, axis=-1, keepdims=True)
        expected = 1 - (unit.sum(-1, keepdims=True)) * unit
        np.testing.assert_allclose(self.run(ports.ablate(self.GIVEN), x), expected, atol=1e-6)

    def test_jit_grad_and_vmap(self):
        def total(given, at):
            edits = {"twice": ports.replace(given, where={"at": at})}
            return (steer(Doubling().apply, edits)({}, self.X + 1) ** 2).sum()

        given, at = jnp.asarray(self.GIVEN[:, :1]), jnp.array([2])
        # Three positions of [2, 2] and one that is given, in two rows.
        sums = self.GIVEN[:, 0].sum(-1)
        expected = 2 * 3 * 16 + (sums**2).sum()
        np.testing.assert_allclose(jax.jit(total)(given, at), expected)
        gradient = jax.grad(total)(given, at)
        np.testing.assert_allclose(gradient[:, 0], np.repeat(2 * sums[:, None], 2, 1))
        each = jax.vmap(total, in_axes=(None, 0))(given, jnp.arange(4)[:, None])
        np.testing.assert_allclose(each, [expected] * 4)


class TestModules:
    """Modules that are called several times, lifted, or return several values."""

    X = jnp.array([[1.0, 2.0]])
    V = jnp.array([10.0, 20.0])

    def test_each_call_is_edited(self):
        class Shared(nn.Module):
            @nn.compact
            def __call__(self, x):
                twice = Twice(name="twice")
                return twice(x) + twice(3 * x)

        out, masks = steer(Shared().apply, {"twice": ports.add(self.V)}, masks=True)({}, self.X)
        np.testing.assert_allclose(out, 8 * self.X + 2 * self.V)
        np.testing.assert_array_equal(masks["twice"], [[True]])

    @pytest.mark.parametrize("site", ["layers", "layers.twice"])
    def test_each_layer_of_a_scan_is_edited_once(self, site):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return Twice(name="twice")(x), x

        class Scanned(nn.Module):
            @nn.compact
            def __call__(self, x):
                axes = {"intermediates": 0}
                return nn.scan(Layer, variable_axes=axes, length=3)(name="layers")(x, None)

        apply = capture(
            steer(Scanned().apply, {site: ports.add(self.V)}, masks=True), "layers.twice"
        )
        ((out, before), masks), states = jax.jit(apply)({}, self.X)
        np.testing.assert_allclose(before[1], 2 * self.X + self.V)
        np.testing.assert_allclose(out, 8 * self.X + 7 * self.V)
        np.testing.assert_array_equal(masks[site], [[True]])
        last = out if site == "layers.twice" else out - self.V
        np.testing.assert_allclose(states["layers.twice"][-1], last)

    def test_under_vmap_there_is_one_row(self):
        mapped = nn.vmap(Twice, in_axes=0)

        class Mapped(nn.Module):
            @nn.compact
            def __call__(self, x):
                return mapped(name="twice")(x)

        x = jnp.ones((3, 2))
        out = steer(Mapped().apply, {"twice": ports.add(self.V)})({}, x)
        np.testing.assert_allclose(out, 2 * x + self.V)
        with helpers.raises_line(ValueError, "(3, 2)", "'twice' have shape (2,)"):
            steer(Mapped().apply, {"twice": ports.add(jnp.ones((3, 2)))})({}, x)

    def test_the_first_of_several_values(self):
        class Several(nn.Module):
            @nn.compact
            def __call__(self, x):
                return Values(name="values")(x), Named(name="named")(x), Dict(name="dict")(x)

        class Values(nn.Module):
            def __call__(self, x):
                return x, 5 * x

        class Named(nn.Module):
            def __call__(self, x):
                return Pair(x, 5 * x)

        class Dict(nn.Module):
            def __call__(self, x):
                return {"count": jnp.arange(3), "states": x}

        sites = ["values", "named", "dict"]
        edits = {site: ports.add(self.V) for site in sites}
        out, states = capture(steer(Several().apply, edits), sites)({}, self.X)
        for values in (out[0], out[1], states["values"]):
            np.testing.assert_allclose(values[0], self.X + self.V)
            np.testing.assert_allclose(values[1], 5 * self.X)
        assert isinstance(states["named"], Pair)
        np.testing.assert_allclose(states["dict"]["states"], self.X + self.V)
        np.testing.assert_array_equal(out[2]["count"], range(3))

    def test_a_method(self):
        class Coder(nn.Module):
            def encode(self, x):
                return 3 * x

        class Outer(nn.Module):
            @nn.compact
            def __call__(self, x):
                return Coder(name="coder").encode(x) + 1

        out = steer(Outer().apply, {"coder.encode": ports.add(self.V)})({}, self.X)
        np.testing.assert_allclose(out, 3 * self.X + self.V + 1)

    def test_mutable_collections_and_random_numbers(self):
        class Noisy(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.Dropout(0.5, deterministic=False, name="drop")(x)
                count = self.variable("counts", "calls", lambda: jnp.zeros((), int))
                count.value += 1
                return x

        options = {"mutable": ["counts"], "rngs": {"dropout": jax.random.key(0)}}
        edits = {"drop": ports.add(self.V)}
        expected, variables = Noisy().apply({}, self.X, **options)
        out, counted = steer(Noisy().apply, edits)({}, self.X, **options)
        np.testing.assert_allclose(out, expected + self.V)
        assert counted == variables
        (out, counted), masks = steer(Noisy().apply, edits, masks=True)({}, self.X, **options)
        assert counted == variables
        assert list(masks) == ["drop"]

    def test_steering_and_capturing_in_any_order(self):
        edits = {"twice": ports.add(self.V)}
        for apply in (
            capture(steer(Doubling().apply, edits), "twice"),
            steer(capture(Doubling().apply, "twice"), edits),
        ):
            out, states = apply({}, self.X[None])
            np.testing.assert_allclose(states["twice"], 2 * self.X[None] + self.V)
            np.testing.assert_allclose(out, states["twice"].sum(-1))
        # The states of an inner run without the edit: two runs of the same module.
        inner = capture(Doubling().apply, "twice")

        def difference(variables, x):
            return steer(Doubling().apply, edits)(variables, x) - inner(variables, x)[0]

        np.testing.assert_allclose(difference({}, self.X[None]), [[30]])

    def test_two_spellings_of_a_site_add_up(self):
        edits = {"layers.0": ports.add(self.V), "layers_0": ports.add(self.V)}

        class Layers(nn.Module):
            @nn.compact
            def __call__(self, x):
                return Twice(name="layers_0")(x)

        np.testing.assert_allclose(
            steer(Layers().apply, edits)({}, self.X), 2 * self.X + 2 * self.V
        )


class TestFunctions:
    def test_a_function_is_an_edit(self):
        out = steer(Doubling().apply, {"twice": lambda x: x + 1})({}, TestAnyModule.X)
        np.testing.assert_allclose(out, [[4, 16, 2]])
        both = {"twice": [jnp.tanh, ports.add([1.0, 0.0])]}
        out = steer(Doubling().apply, both)({}, TestAnyModule.X)
        np.testing.assert_allclose(out, np.tanh(2 * TestAnyModule.X).sum(-1) + 1, rtol=1e-6)

    def test_options_of_a_function_are_not_places(self):
        edit = ports.edit_with(lambda x, scale=3: scale * x)
        out = steer(Doubling().apply, {"twice": edit})({}, TestAnyModule.X)
        np.testing.assert_allclose(out, [[6, 42, 0]])

    def test_places_are_given_to_a_function_that_needs_two_arguments(self):
        seen = []

        def look(x, places):
            seen.append(places)
            return x

        steer(Doubling().apply, {"twice": look})({}, TestAnyModule.X)
        assert seen == [None]

    def test_a_function_may_return_one_state_for_all(self):
        edit = ports.edit_with(lambda x: jnp.array([5.0, 7.0]), where={"from": 2})
        out = steer(Doubling().apply, {"twice": edit})({}, TestAnyModule.X)
        np.testing.assert_allclose(out, [[2, 14, 12]])


class TestMessages:
    def test_of_edits_that_cannot_be(self):
        with helpers.raises_line(ValueError, "where is 'everywhere'", "last_prompt"):
            ports.add(VECTOR, where="everywhere")
        with helpers.raises_line(ValueError, "shape ()", "[D]"):
            ports.add(1.0)
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
        with helpers.raises_line(ValueError, "{'from': -1}", "i from 0 to 2147483647"):
            ports.add(VECTOR, where={"from": -1})
        for start in (None, np.inf, np.nan, "x", 0.5, 2**31, 10**30, [0], 1j):
            with helpers.raises_line(ValueError, "where is {'from':", "a whole number i from 0"):
                ports.add(VECTOR, where={"from": start})
        for start in (3, 3.0, np.int64(3), np.float32(3), jnp.int32(3)):
            assert ports.add(VECTOR, where={"from": start}).start == 3
        with helpers.raises_line(ValueError, "(60,)", "[2, D]"):
            ports.stacked(["a", "b"], VECTOR)

    @pytest.mark.parametrize(
        ("edits", "parts"),
        [
            (ports.add([1.0]), ("edits is of type Edit", "{site: edit}")),
            ({"twice": np.ones(2)}, ("'twice' is an array of shape (2,)", "add(vector)")),
            ({"twice": [1.0, 2.0]}, ("'twice' is of type float", "replace(states)")),
            ({"twice": lambda x: None}, ("returns of type NoneType", "(1, 3, 2)")),
            ({"twice": ports.add}, ("returns of type Edit", "expected states of shape")),
            ({"twice": lambda x: x[..., :1].repeat(3, -1)}, ("(1, 3, 2) into (1, 3, 3)",)),
            ({"twice": ports.add(np.ones((3, 2)))}, ("vector", "(3, 2)", "(1, 3, 2)")),
            ({"twice": ports.add(np.ones((1, 4, 2)))}, ("vector", "(1, 4, 2)", "(1, 3, 2)")),
            ({"twice": ports.add([1.0, 1.0], np.ones(2))}, ("alpha has shape (2,)", "1 rows")),
            ({"twice": ports.add([1.0, 1.0], where=np.ones((1, 2)))}, ("(1, 2)", "[1, 3]")),
            ({"twice": ports.add([1.0, 1.0], where="text")}, ("'twice' are not tokens", "'all'")),
        ],
        ids=lambda value: "",
    )
    def test_of_edits_that_do_not_fit(self, edits, parts):
        with helpers.raises_line(ValueError, *parts):
            steer(Doubling().apply, edits)({}, TestAnyModule.X)

    @pytest.mark.parametrize(
        ("where", "parts"),
        [
            (np.array([1, 2]), ("an array of int64", "{'at': indices}")),
            (np.array([[0, 2]]), ("an array of int64", "bool[B, T]")),
            ({"at": -1}, ("{'at': -1}", "from 0 to 2147483647")),
            ({"at": [2**31]}, ("{'at': [2147483648]}", "from 0 to 2147483647")),
            ({"at": [0.5]}, ("{'at': [0.5]}", "whole numbers")),
            ({"at": [0, 1, 2]}, ("3 positions for 2 states", "one state per position")),
        ],
        ids=str,
    )
    def test_of_positions_that_cannot_be(self, where, parts):
        with helpers.raises_line(ValueError, *parts):
            ports.replace(np.ones((1, 2, 2)), where=where)

    def test_of_vectors_that_are_not_numbers(self):
        with helpers.raises_line(ValueError, "vector is an array of shape (1,)", "real numbers"):
            ports.add(["up"])
        with helpers.raises_line(ValueError, "edit_with takes a function", "shape (2,)"):
            ports.edit_with(np.ones(2))

    def test_of_a_module_that_outputs_no_states(self):
        class Pair(nn.Module):
            @nn.compact
            def __call__(self, x):
                return Two(name="two")(x)["a"]

        class Two(nn.Module):
            def __call__(self, x):
                return {"a": x, "b": 2 * x}

        edits = {"two": ports.add([1.0, 1.0])}
        with helpers.raises_line(ValueError, "'two'", "dict of float32[3, 2], float32[3, 2]"):
            steer(Pair().apply, edits)({}, jnp.ones((3, 2)))
        with helpers.raises_line(ValueError, "'twice'", "int32[1, 3, 2]"):
            edits = {"twice": ports.add([1.0, 1.0])}
            steer(Doubling().apply, edits)({}, jnp.ones((1, 3, 2), int))
