"""Each method is one record that contains everything the rest of the package needs."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xlvlm_jax
from xlvlm_jax.concepts import methods, reconstruct
from xlvlm_jax.concepts.methods import METHODS, Method, method_named
from xlvlm_jax.solvers import largest_norm
from xlvlm_jax.solvers.loop import Result

Z = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
KEY = jax.random.key(0)


@partial(jax.jit, static_argnames=("num_samples", "num_concepts", "mesh", "first"))
def solve(Z, key, *, num_samples, num_concepts, mesh=None, first=0):
    """Returns the rows from `first` on as components, and products with them as activations."""
    (K,) = num_concepts
    components = Z[first : first + K]
    one = Result(components, Z @ components.T, jnp.sum(Z), jnp.int32(0), jnp.bool_(True), Z[0, :1])
    return jax.tree.map(lambda leaf: leaf[None], one)


def encode(rows, options):
    return rows.unit * rows.Z @ rows.components.T


@pytest.fixture
def products(monkeypatch):
    """Registers a method for the test and returns its name."""
    solver = types.ModuleType("products")
    solver.__dict__["solve"] = solve
    method = Method("products", solver, encode, max_per_width=True)
    monkeypatch.setitem(METHODS, "products", method)


@pytest.mark.usefixtures("products")
def test_a_new_method_is_found_and_its_concepts_saved_and_projected(tmp_path):
    found = xlvlm_jax.decompose(Z, 2, "products", key=KEY, first=3)
    np.testing.assert_array_equal(found.components, Z[3:5])
    np.testing.assert_allclose(found.activations, Z @ Z[3:5].T, rtol=0, atol=1e-5)
    assert found.options == {"first": 3} and not found.dead.any()
    np.testing.assert_allclose(xlvlm_jax.project(Z, found), found.activations, rtol=0, atol=1e-5)
    back = reconstruct(found, found.activations)
    np.testing.assert_allclose(back, Z @ Z[3:5].T @ Z[3:5], rtol=0, atol=1e-5)
    found.save(tmp_path)
    assert xlvlm_jax.Concepts.load(tmp_path).method == "products"


@pytest.mark.wrong_types
@pytest.mark.usefixtures("products")
def test_a_new_methods_own_rules_apply():
    with pytest.raises(ValueError, match=r"has no option 'last'; its options are first"):
        xlvlm_jax.decompose(Z, 2, "products", key=KEY, last=3)
    with pytest.raises(ValueError, match=r"num_concepts=5 is larger than min\(N, D\) = 4"):
        xlvlm_jax.decompose(Z, 5, "products", key=KEY)
    with pytest.raises(ValueError, match="'products' can't be streamed; expected one of snmf, km"):
        xlvlm_jax.decompose_stored(Z, 2, "products", key=KEY)
    with pytest.raises(ValueError, match=r"'products' does not take weights; .* or use 'kmeans'"):
        xlvlm_jax.decompose(Z, 2, "products", key=KEY, sample_weight=np.ones(9))
    with pytest.raises(ValueError, match=r"unknown method 'product'.* did you mean 'products'"):
        method_named("product")


def test_defaults_of_each_method():
    assert METHODS["simple"].options({}) == {}
    assert METHODS["pca"].options({"tol": 1}) == {"tol": 1.0, "max_iter": 100}
    assert METHODS["kmeans"].options({})["init"] is None
    assert METHODS["snmf"].options({})["relative_alpha"] is False
    assert method_named("nndl") is METHODS["snmf"] and METHODS["simple"].solver is largest_norm


@pytest.mark.parametrize("xp", [np, jnp])
def test_what_activations_stand_for(xp):
    activations, components = xp.array([[1.0, 2.0], [3.0, 0.5]]), xp.array([[1.0, 0.0], [1.0, 4.0]])
    nearest = METHODS["kmeans"].reconstruct(activations, components)
    np.testing.assert_array_equal(nearest, [[1, 4], [1, 0]])
    sums = METHODS["pca"].reconstruct(activations, components, xp.array([10.0, 20.0]))
    np.testing.assert_array_equal(sums, [[13, 28], [13.5, 22]])
    assert isinstance(sums, np.ndarray if xp is np else jax.Array)


def test_names_stand_in_one_place():
    assert list(METHODS) == [method.name for method in METHODS.values()]
    assert set(methods.ALIASES.values()) <= set(METHODS)
