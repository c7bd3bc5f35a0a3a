"""Products of factors rounded to bfloat16: values, derivatives, and products of columns."""

import jax
import jax.numpy as jnp
import numpy as np

from xlvlm_jax.solvers.sae.products import of_columns, product

RNG = np.random.default_rng(0)
A, B, G = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((5, 7), (7, 3), (5, 3)))


def rounded(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def test_only_factors_are_rounded():
    np.testing.assert_allclose(product(A, B), np.asarray(A) @ np.asarray(B), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(product(A, B, "bfloat16"), rounded(A) @ rounded(B), rtol=1e-5)
    assert product(A, B, "bfloat16").dtype == jnp.float32


def test_derivatives_are_sums_in_float32():
    of_a, of_b = jax.vjp(lambda a, b: product(a, b, "bfloat16"), A, B)[1](G)
    np.testing.assert_allclose(of_a, rounded(G) @ rounded(B).T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(of_b, rounded(A).T @ rounded(G), rtol=1e-5, atol=1e-6)


def test_products_of_columns():
    """Whichever factor is wider."""
    for a, g in ((A, G), (G, A)):
        np.testing.assert_allclose(of_columns(a, g), np.asarray(a).T @ np.asarray(g), rtol=1e-5)
