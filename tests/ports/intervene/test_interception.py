"""Interceptors and compilation: `nn.jit` neither keeps an edit nor applies an old one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import ports
from ports import capture, steer
from ports.intervene import lora

from .. import helpers

X = jnp.ones((2, 3))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(3, name="fc")(x)


Compiled = nn.jit(Block)


class Nested(nn.Module):
    """A compiled part; all instances share one program."""

    @nn.compact
    def __call__(self, x):
        return 2 * Compiled(name="block")(x)


class SetUp(nn.Module):
    """Like `Nested`, with the part created before the call."""

    def setup(self):
        self.block = Compiled()

    def __call__(self, x):
        return 2 * self.block(x)


class Decorated(nn.Module):
    """Compiled as a whole."""

    @nn.jit
    @nn.compact
    def __call__(self, x):
        return 2 * Block(name="block")(x)


def add(value):
    return {"block": ports.add(jnp.full(3, value))}


@pytest.mark.parametrize("kind", [Nested, SetUp, Decorated])
class TestBelowJit:
    def test_each_run_has_its_own_edits(self, kind):
        module = kind()
        variables = module.init(jax.random.key(0), X)
        first = steer(module.apply, add(1.0))(variables, X)
        plain = module.apply(variables, X)
        np.testing.assert_allclose(first, plain + 2, rtol=1e-6)
        np.testing.assert_allclose(
            steer(module.apply, add(3.0))(variables, X), plain + 6, rtol=1e-6
        )
        np.testing.assert_allclose(module.apply(variables, X), plain)
        for mutable in (["cache"], True, nn.DenyList("cache")):
            out, _ = steer(module.apply, add(2.0))(variables, X, mutable=mutable)
            np.testing.assert_allclose(out, plain + 4, rtol=1e-6)

    def test_jit_grad_and_vmap_around(self, kind):
        module = kind()
        variables = module.init(jax.random.key(0), X)

        def total(value):
            return steer(module.apply, add(value))(variables, X).sum()

        plain = module.apply(variables, X).sum()
        for value in (1.0, 2.0):
            np.testing.assert_allclose(jax.jit(total)(value), plain + 12 * value, rtol=1e-5)
        np.testing.assert_allclose(jax.grad(total)(1.0), 12, rtol=1e-6)
        np.testing.assert_allclose(
            jax.vmap(total)(jnp.arange(3.0)), plain + 12 * jnp.arange(3.0), rtol=1e-5
        )

    def test_captured_with_edits(self, kind):
        module = kind()
        variables = module.init(jax.random.key(0), X)
        for value in (1.0, 3.0):
            out, states = capture(steer(module.apply, add(value)), "block")(variables, X)
            np.testing.assert_allclose(out, 2 * states["block"], rtol=1e-6)
            out, states = steer(capture(module.apply, "block"), add(value))(variables, X)
            np.testing.assert_allclose(out, 2 * states["block"], rtol=1e-6)
            np.testing.assert_allclose(
                states["block"], module.apply(variables, X) / 2 + value, rtol=1e-6
            )


def test_an_adapter_is_not_kept_by_jit():
    variables = Nested().init(jax.random.key(0), X)
    plain = Nested().apply(variables, X)
    factors = lora.Factors(jnp.ones((3, 1)), jnp.ones((1, 3)))
    adapter = lora.Adapter({"block.fc": factors}, {"block.fc": 1.0})
    tuned = ports.adapted(Nested().apply)(variables, adapter, X)
    np.testing.assert_allclose(tuned, plain + 2 * 3, rtol=1e-6)
    np.testing.assert_allclose(Nested().apply(variables, X), plain)


def test_what_is_compiled_already_is_refused():
    compiled = jax.jit(Nested().apply)
    variables = Nested().init(jax.random.key(0), X)
    with helpers.raises_line(ValueError, "apply is already jitted", "jax.jit(steer("):
        steer(compiled, add(1.0))(variables, X)
    np.testing.assert_allclose(compiled(variables, X), Nested().apply(variables, X), rtol=1e-6)
