"""The shared layers: by hand, and against transformers' modules."""

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama

from ports import names
from ports.intervene.sites import capture
from ports.nn import layers, rope
from ports.parallel import sharding

from .. import helpers

ROPE = rope.Rope(10000.0)


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations_equal_transformers(name):
    x = np.linspace(-8, 8, 101, dtype=np.float32)
    expected = ACT2FN[name](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(layers.activation(name)(x), expected, rtol=0, atol=2e-6)


def test_an_unknown_activation_is_named_with_those_that_are_known():
    with helpers.raises_line(ValueError, "activation 'swoosh', which is not", "silu", "quick_gelu"):
        layers.activation("swoosh")


def test_rotation_by_a_quarter_turn():
    # The halves of a head turn against each other: (a, b) -> (-b, a).
    x = jnp.arange(1.0, 5.0).reshape(1, 1, 1, 4)
    turned = layers.rotate(x, jnp.zeros((1, 1, 4)), jnp.ones((1, 1, 4)))
    np.testing.assert_array_equal(turned.ravel(), [-3, -4, 1, 2])


def test_rotation_equals_transformers():
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 14), np.float32)
    cos, sin = rope.angles(ROPE, jnp.arange(7, 17).reshape(2, 5), 14)
    expected, _ = modeling_llama.apply_rotary_pos_emb(
        *(torch.from_numpy(np.array(y)) for y in (x, x, cos, sin)), unsqueeze_dim=2
    )
    np.testing.assert_allclose(layers.rotate(x, cos, sin), expected, rtol=0, atol=1e-6)


@jax.jit
def _rotate_to(x, positions):
    return layers.rotate(x, *rope.angles(ROPE, positions, 14))


@given(shift=st.integers(0, 3000))
def test_rotated_products_depend_on_distances_alone(shift):
    query, key = np.random.default_rng(1).standard_normal((2, 1, 1, 1, 14), np.float32)

    def product(i, j):
        q, k = (_rotate_to(x, jnp.array([[p]])) for x, p in ((query, i), (key, j)))
        return float(jnp.vdot(q, k))

    assert product(9 + shift, 2 + shift) == pytest.approx(product(9, 2), abs=5e-3)


def test_rotation_keeps_the_dtype():
    angles = rope.angles(ROPE, jnp.array([[5]]), 4)
    assert layers.rotate(jnp.ones((1, 1, 1, 4), jnp.bfloat16), *angles).dtype == jnp.bfloat16


def test_the_gated_mlp_by_hand():
    kernels = {"gate_proj": [[1.0, -1.0]], "up_proj": [[2.0, 5.0]], "down_proj": [[3.0], [1.0]]}
    params = {name: {"kernel": jnp.array(kernel)} for name, kernel in kernels.items()}
    out = jax.jit(layers.GatedMLP(2, "relu").apply)({"params": params}, jnp.array([[[4.0]]]))
    # gate (4, 0), up (8, 20): down 3 x 4 x 8 + 1 x 0 x 20.
    np.testing.assert_array_equal(out, [[[96.0]]])


def test_layer_norm_is_exact_far_from_zero():
    # The variance as the difference of two moments loses all digits here.
    x = np.float32(1000.0) + np.random.default_rng(3).standard_normal((4, 37), np.float32) / 10
    params = {"params": {"scale": np.ones(37), "bias": np.zeros(37)}}
    ours = jax.jit(layers.layer_norm(1e-5, jnp.float32).apply)(params, x)
    theirs = torch.nn.functional.layer_norm(torch.from_numpy(x).double(), (37,))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-3)


class TestProductsInBfloat16:
    """On a CPU, a few columns of a kernel are converted to float32 at a time."""

    def given(self):
        random = np.random.default_rng(0)
        # The last columns are not a whole step.
        shapes = (2, 3, 40), (40, 2 * layers.COLUMNS + 44)
        return tuple(jnp.asarray(random.standard_normal(s), jnp.bfloat16) for s in shapes)

    def test_equal_those_in_float32(self):
        x, kernel = self.given()
        exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
        got = jax.jit(layers.product_in_float32)(x, kernel)
        np.testing.assert_allclose(got, exact, rtol=0, atol=1e-5)
        dense = layers.dense(kernel.shape[1], False, jnp.bfloat16)
        rounded = jax.jit(dense.apply)({"params": {"kernel": kernel}}, x)
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_array_equal(rounded, got.astype(jnp.bfloat16))

    def test_have_the_gradients_of_a_product(self):
        x, kernel = self.given()
        dense = layers.dense(kernel.shape[1], False, jnp.bfloat16)

        def loss(multiply):
            return lambda x, kernel: (multiply(x, kernel).astype(jnp.float32) ** 2).sum()

        def ours(x, kernel):
            return dense.apply({"params": {"kernel": kernel}}, x)

        got = jax.jit(jax.grad(loss(ours), (0, 1)))(x, kernel)
        expected = jax.jit(jax.grad(loss(lambda x, kernel: x @ kernel), (0, 1)))(x, kernel)
        for one, other in zip(got, expected, strict=True):
            assert helpers.relative_error(one, other) < 2**-7

    def test_convert_no_whole_kernel(self):
        x, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 512), (512, 4096)))
        compiled = jax.jit(layers.product_in_float32).lower(x, kernel).compile()
        # A copy of the 16 bits, and a step's columns.
        bound = 2 * kernel.size + 4 * 512 * layers.COLUMNS + 16 * 4096 * 4
        assert compiled.memory_analysis().temp_size_in_bytes <= bound


class TestProductsOfFewRows:
    """Written in another order on a CPU, for large kernels: the same numbers and gradients."""

    width, out = 512, 640
    dense = layers.dense(out, True, jnp.float32)
    table = layers.Embed(out, width, dtype=jnp.float32)

    def arrays(self, rows: int) -> tuple[jax.Array, jax.Array]:
        random = np.random.default_rng(0)
        x = random.standard_normal((rows, 1, self.width), np.float32)
        return jnp.asarray(x), random.standard_normal((self.width, self.out), np.float32)

    def layer(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        params = {"kernel": kernel, "bias": jnp.arange(self.out, dtype=jnp.float32)}
        return self.dense.apply({"params": params}, x)

    def head(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        params = {"embedding": jnp.asarray(kernel).T}
        return self.table.apply({"params": params}, x, method="attend")

    @pytest.mark.parametrize("rows", [1, 2, 8, layers.FEW_ROWS + 1])
    def test_equal_those_in_float64(self, rows):
        x, kernel = self.arrays(rows)
        expected = np.asarray(x, np.float64) @ kernel
        options = {"rtol": 0, "atol": 2e-4}  # of sums of 512 terms, up to 100 in size
        np.testing.assert_allclose(self.head(x, kernel), expected, **options)
        np.testing.assert_allclose(self.layer(x, kernel), expected + np.arange(self.out), **options)

    @pytest.mark.parametrize("which", ["layer", "head"])
    def test_have_the_gradients_of_a_product(self, which):
        x, kernel = self.arrays(3)
        weight = np.cos(np.arange(self.out))

        def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return (getattr(self, which)(x, kernel) * weight).sum()

        of_x, of_kernel = jax.grad(loss, (0, 1))(x, kernel)
        np.testing.assert_allclose(of_x[0, 0], kernel @ weight, rtol=0, atol=1e-4)
        expected = np.outer(x.sum((0, 1)), weight)
        np.testing.assert_allclose(of_kernel, expected, rtol=0, atol=1e-5)

    def test_of_several_variants_equal_those_of_each(self):
        x, kernel = self.arrays(6)
        variants = x.reshape(3, 2, 1, self.width)
        for product in (self.layer, self.head):
            together = jax.vmap(product, (0, None))(variants, kernel)
            np.testing.assert_allclose(together.reshape(6, 1, -1), product(x, kernel), atol=1e-4)

    @pytest.mark.parametrize(
        ("rows", "out", "dtype", "changed"),
        [
            (8, 640, jnp.float32, True),
            (layers.FEW_ROWS, 512, jnp.float32, True),
            (layers.FEW_ROWS + 1, 640, jnp.float32, False),
            (1, 640, jnp.float32, False),  # XLA's own loops read the kernel once
            (8, 511, jnp.float32, False),  # a small kernel
            (8, 640, jnp.float16, False),
        ],
    )
    def test_are_few_rows_and_large_kernels_alone(self, rows, out, dtype, changed):
        shaped = jax.ShapeDtypeStruct
        module = layers.dense(out, False, dtype)
        params = {"params": {"kernel": shaped((self.width, out), dtype)}}
        traced = jax.make_jaxpr(module.apply)(params, shaped((rows, 1, self.width), dtype))
        assert ("optimization_barrier" in str(traced)) == changed

    def test_the_tied_head_is_written_so_too(self):
        x, kernel = self.arrays(8)
        assert "optimization_barrier" in str(jax.make_jaxpr(self.head)(x, kernel))

    def test_not_on_a_mesh(self):
        x, kernel = self.arrays(8)
        with sharding.on(sharding.make_mesh(1)):
            for product in (self.layer, self.head):
                assert "optimization_barrier" not in str(jax.make_jaxpr(product)(x, kernel))


def never(*_):
    raise AssertionError("an initializer ran")


@pytest.mark.parametrize("name", ["Dense", "RMSNorm", "LayerNorm", "Embed"])
def test_given_parameters_are_read_without_their_initializers(name):
    sizes = {"Dense": [4], "Embed": [5, 3]}.get(name, [])
    x = jnp.arange(3) if name == "Embed" else jnp.linspace(-1, 2, 6).reshape(2, 3)
    params = getattr(nn, name)(*sizes).init(jax.random.key(0), x)
    kinds = ("kernel", "bias", "scale", "embedding")
    fields = getattr(layers, name).__dataclass_fields__
    ours = getattr(layers, name)(
        *sizes, **{f"{k}_init": never for k in kinds if f"{k}_init" in fields}
    )
    expected = getattr(nn, name)(*sizes).apply(params, x)
    np.testing.assert_array_equal(ours.apply(params, x), expected)
    with pytest.raises(AssertionError, match="an initializer ran"):
        ours.init(jax.random.key(0), x)


def test_a_parameter_of_another_shape_is_refused():
    module = layers.dense(4, True, jnp.float32, None)
    params = {"params": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(1)}}
    with pytest.raises(flax.errors.ScopeParamShapeError, match=r"\"bias\".*\(4,\).*\(1,\)"):
        module.apply(params, jnp.ones((2, 3)))


class Joint(nn.Module):
    """The parts of a fused layer."""

    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        return tuple(layers.fused(x, (3, 5), self.use_bias, jnp.float32, "joint"))


class TestFused:
    @pytest.fixture(autouse=True)
    def registered(self, monkeypatch):
        monkeypatch.setitem(names._FUSED, "joint", ("left", "right"))

    @pytest.mark.parametrize("use_bias", [True, False])
    def test_is_one_linear_layer(self, use_bias):
        x = jax.random.normal(jax.random.key(0), (2, 4, 6))
        module = Joint(use_bias)
        params = module.init(jax.random.key(1), x)["params"]
        bias = np.arange(8.0, dtype=np.float32)
        if use_bias:
            params["joint"]["left"]["bias"], params["joint"]["right"]["bias"] = bias[:3], bias[3:]
        kernel = np.concatenate([params["joint"][part]["kernel"] for part in ("left", "right")], 1)
        whole = nn.Dense(8, use_bias=use_bias).apply(
            {"params": {"kernel": kernel} | ({"bias": bias} if use_bias else {})}, x
        )
        (left, right), states = capture(module.apply, ["joint"])({"params": params}, x)
        np.testing.assert_allclose(states["joint"], whole, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(np.concatenate([left, right], -1), states["joint"])

    def test_parts_are_not_joined_where_nothing_reads_the_whole(self):
        x = jnp.ones((2, 4, 6))
        params = Joint().init(jax.random.key(1), x)
        text = jax.jit(Joint().apply).lower(params, x).compile().as_text()
        assert "concatenate" not in text
        read = jax.jit(capture(Joint().apply, ["joint"])).lower(params, x).compile().as_text()
        assert "concatenate" in read or "dynamic-update-slice" in read
