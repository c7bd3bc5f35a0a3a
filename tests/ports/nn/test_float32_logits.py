"""Logits are float32 in every dtype; in bfloat16 the largest ones tie and another token wins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import ports
from ports.models import clip
from ports.nn import layers
from xlvlm_jax.demo import embedded

from .. import helpers

DTYPES = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
NORM = "language_model.model.norm"
VARIANTS = pytest.mark.parametrize(
    "variant", ["grouped queries", "tied embeddings, class position kept"]
)


def head_of(vlm: ports.VLM) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the path and values float64[D, V] of the matrix that gives a model's logits."""
    tied = bool(vlm.module.tied)
    last = ("model", "embed_tokens", "embedding") if tied else ("lm_head", "kernel")
    path = ("language_model", *last)
    kernel = np.asarray(traverse_util.flatten_dict(vlm.params)[path], np.float64)
    return path, kernel.T if tied else kernel


@pytest.fixture(scope="module")
def close_pairs(llava_pair):
    """close_pairs(variant) returns a bfloat16 model; its head has pairs of nearly equal columns."""

    def make(variant: str) -> ports.VLM:
        vlm = ports.load(llava_pair(variant).directory, dtype="bfloat16")
        path, kernel = head_of(vlm)
        bumped = kernel[:, 0:-1:2] * (1 + (np.arange(len(kernel)) == 5)[:, None] / 64)
        kernel[:, 1::2] = bumped
        flat = traverse_util.flatten_dict(vlm.params)
        flat[path] = jnp.asarray(kernel.T if vlm.module.tied else kernel, jnp.bfloat16)
        vlm.params = traverse_util.unflatten_dict(flat)
        return vlm

    return make


def test_by_hand():
    """256 and 257 are the same number in bfloat16, so the first would win."""
    x, kernel = jnp.bfloat16([[256, 1]]), jnp.bfloat16([[1, 1], [0, 1]])
    logits = layers.product_in_float32(x, kernel)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, [[256, 257]])
    np.testing.assert_array_equal(x @ kernel, [[256, 256]])


@VARIANTS
def test_the_token_of_the_largest_exact_logit_is_generated(close_pairs, variant):
    vlm = close_pairs(variant)
    patches = vlm.module.config.tokens_per_image
    inputs = helpers.make_inputs([1, 1, 1], [6, 3, 9], tokens_per_image=patches)
    answer = vlm.generate(inputs, max_new_tokens=8, sites=[NORM])
    exact = np.asarray(answer.states[NORM], np.float64) @ head_of(vlm)[1]
    np.testing.assert_array_equal(answer.tokens, exact.argmax(-1))
    rounded = np.asarray(exact, jnp.bfloat16).argmax(-1)
    assert (rounded != exact.argmax(-1)).any()  # what is tested makes a difference
    nothing = {NORM: ports.add(np.zeros(60, np.float32))}
    swept = vlm.sweep(inputs, [nothing, nothing], max_new_tokens=8).tokens
    np.testing.assert_array_equal(swept, [answer.tokens] * 2)
    whole = vlm.forward(inputs, sites=[NORM])
    exact = np.asarray(whole.states[NORM], np.float64) @ head_of(vlm)[1]
    assert helpers.relative_error(whole.logits, exact) < 1e-6


@DTYPES
@VARIANTS
def test_the_head_alone(llava_pair, variant, dtype):
    vlm = ports.load(llava_pair(variant).directory, dtype=dtype)
    x = np.random.default_rng(0).standard_normal((3, 60), np.float32).astype(jnp.dtype(dtype))
    logits = vlm.unembed(x)
    assert logits.dtype == jnp.float32
    expected = x.astype(np.float64) @ head_of(vlm)[1]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@VARIANTS
def test_the_head_is_not_converted(llava_pair, variant):
    """There is one product of bfloat16 with a float32 result."""
    vlm = ports.load_abstract(llava_pair(variant).directory, dtype="bfloat16")
    x = jax.ShapeDtypeStruct((3, 60), jnp.bfloat16)
    apply = jax.jit(lambda params, x: vlm.module.apply({"params": params}, x, method="unembed"))
    program = apply.lower(vlm.params, x).as_text()
    assert "xbf16>) -> tensor<3x103xf32>" in program
    assert "stablehlo.convert" not in program


class TestGradients:
    def loss(self, product):
        return lambda x, kernel: jnp.sum(jax.nn.logsumexp(product(x, kernel), -1) ** 2)

    def arrays(self, dtype):
        keys = jax.random.split(jax.random.key(0))
        shapes = ((2, 3, 8), (8, 11))
        return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]

    def test_in_float32_are_those_of_a_product(self):
        x, kernel = self.arrays(jnp.float32)
        ours = jax.grad(self.loss(layers.product_in_float32), (0, 1))(x, kernel)
        expected = jax.grad(self.loss(jnp.matmul), (0, 1))(x, kernel)
        for a, b in zip(ours, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        change = (jnp.ones_like(x), jnp.ones_like(kernel))
        _, ours = jax.jvp(layers.product_in_float32, (x, kernel), change)
        _, expected = jax.jvp(jnp.matmul, (x, kernel), change)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)

    def test_multiply_in_the_models_dtype(self):
        """The kernel is not converted, and costs no product if its gradient is not needed."""
        x, kernel = self.arrays(jnp.bfloat16)
        gradient = jax.grad(self.loss(layers.product_in_float32))
        assert gradient(x, kernel).dtype == jnp.bfloat16
        program = jax.make_jaxpr(gradient)(x, kernel)
        products = [e for e in program.eqns if "dot_general" in str(e)]
        assert len(products) == 2
        assert all(v.aval.dtype == jnp.bfloat16 for e in products for v in e.invars)


def test_clips_cosines():
    halves, whole = (
        clip.load_dual_encoder(embedded.CLIP, dtype=d) for d in ("bfloat16", "float32")
    )
    ids = np.array([[1, 5, 9, 2]])
    ours, expected = (each.embed_text(ids, np.ones_like(ids)) for each in (halves, whole))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(ours, axis=-1), 1, rtol=1e-6)
    assert float((ours * expected).sum()) > 0.99
