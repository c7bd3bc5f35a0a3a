"""Each public function works under jit, vmap and grad, in float64, or says that it does not."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

import ports
import xlvlm_jax
from xlvlm_jax import metrics, shift, steering

RANDOM = np.random.default_rng(0)
A, B = RANDOM.standard_normal((2, 24, 3))
B = A + B + 1
OF = np.arange(24) % 3
CODES = RANDOM.random((24, 4)) * (RANDOM.random((24, 4)) < 0.7)
CHOSEN = CODES.max(axis=1, keepdims=True) == CODES
IMAGES = A / np.linalg.norm(A, axis=1, keepdims=True)
ATOMS = xlvlm_jax.Concepts(RANDOM.standard_normal((4, 3)), method="snmf")
CENTROIDS = xlvlm_jax.Concepts(RANDOM.standard_normal((4, 3)), method="kmeans")


class Twice(nn.Module):
    def __call__(self, x):
        return 2 * x


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(Twice(name="twice")(x))


def steered(edit):
    """Returns (x, *arguments) -> the output with the edit `edit(*arguments)`."""

    def run(x, *arguments):
        return xlvlm_jax.steer(Model().apply, {"twice": edit(*arguments)})({}, x)

    return run


def several(vectors, alpha):
    sites = ["twice"]
    edits = xlvlm_jax.stacked(sites, vectors, alpha, {"from": 1})
    return xlvlm_jax.steer(Model().apply, edits)({}, jnp.asarray(A))


def substituted(x):
    return ports.substitute(Model().apply, {"twice": x})({}, jnp.zeros_like(x))


def decomposed(Z):
    found = xlvlm_jax.decompose(Z, 2, "kmeans", key=jax.random.key(0), tol=0.0, max_iter=3)
    return found.components, found.activations, found.objective


def projected(Z, components):
    return xlvlm_jax.project(Z, dataclasses.replace(CENTROIDS, components=components))


# name: (function, its arguments, whether it has a gradient)
TRACED = {
    "add": (steered(xlvlm_jax.add), (A, A[0], 0.5), True),
    "add_relative": (steered(xlvlm_jax.add_relative), (A, A[0], 0.5), True),
    "add_adaptive": (steered(xlvlm_jax.add_adaptive), (A, A[0], B[1]), True),
    "add_if_similar": (steered(xlvlm_jax.add_if_similar), (A, A[:2], B[:2]), True),
    "ablate": (steered(xlvlm_jax.ablate), (A, A[0], 0.5), True),
    "replace": (steered(xlvlm_jax.replace), (A[None], B[None], 0.5), True),
    "edit_with": (steered(lambda: xlvlm_jax.edit_with(jnp.sin)), (A,), True),
    "stacked": (several, (A[:1], np.array([0.5])), True),
    "steer": (steered(xlvlm_jax.add), (A[0], A[1]), True),
    "capture": (lambda x: xlvlm_jax.capture(Model().apply, "twice")({}, x), (A,), True),
    "add_mapped": (steered(ports.add_mapped), (A, B[:2], B[:2].T), True),
    "substitute": (substituted, (A,), True),
    "decompose": (decomposed, (A,), False),
    "project": (projected, (A, CENTROIDS.components), True),
    "fine_vectors": (
        lambda Z: xlvlm_jax.fine_vectors(Z, 3, key=jax.random.key(0))[:2],
        (A,),
        False,
    ),
    "ground_images": (lambda u: xlvlm_jax.ground_images(u, 3), (CODES,), False),
    "steering_vector": (xlvlm_jax.steering_vector, (A, B[:9]), True),
    "shift.assign": (shift.assign, (CODES,), False),
    "shift.nearest": (shift.nearest, (A, B[:4]), False),
    "shift.normalised": (shift.normalised, (A,), True),
    "shift.counts": (lambda of: shift.counts(of, 3), (OF,), False),
    "shift.concept_shift": (lambda a, b: shift.concept_shift(a, b, OF, 3), (A, B), True),
    "shift.concept_shift, median": (
        lambda a, b: shift.concept_shift(a, b, OF, 3, "median"),
        (A, B),
        True,
    ),
    "shift.concept_shift, trimmed": (
        lambda a, b: shift.concept_shift(a, b, OF, 3, "trimmed_mean"),
        (A, B),
        True,
    ),
    "shift.shifted": (shift.shifted, (A, B, 0.5), True),
    "shift.spread": (lambda a, b: shift.spread(a, b, OF, 3), (A, B), True),
    "shift.consistency": (lambda a, b: shift.consistency(a, b, OF, 3), (A, B), True),
    "shift.match": (shift.match, (A[:5], B[4::-1]), False),
    "shift.recovery": (shift.recovery, (A, A + 0.5 * B, B), True),
    "shift.recovery, l2": (lambda u, s, v: shift.recovery(u, s, v, "l2"), (A, A + B, B), True),
    "metrics.active_share": (metrics.active_share, (CODES,), False),
    "metrics.clip_scores": (metrics.clip_scores, (IMAGES, IMAGES[:5]), True),
    "metrics.dead_concepts": (metrics.dead_concepts, (CODES,), False),
    "metrics.explained_variance": (metrics.explained_variance, (A, B), True),
    "metrics.hoyer_sparsity": (metrics.hoyer_sparsity, (CODES,), False),
    "metrics.mean_of_top": (lambda u: metrics.mean_of_top(u, CHOSEN), (CODES,), True),
    "metrics.mean_similarity": (metrics.mean_similarity, (IMAGES,), True),
    "metrics.monosemanticity": (metrics.monosemanticity, (CODES + A[:, :1], IMAGES), True),
    "metrics.reconstruct": (lambda u: metrics.reconstruct(ATOMS, u), (CODES,), True),
    "metrics.reconstruct, kmeans": (
        lambda u: metrics.reconstruct(CENTROIDS, u),
        (CODES,),
        False,
    ),
    "metrics.top_concepts": (lambda u: metrics.top_concepts(u, 2), (CODES,), False),
}
OTHERS = {"compilation_cache", "method_named"}  # functions that take no arrays


def total(function):
    """Returns a number that depends on everything that the function returns."""

    def summed(*arguments):
        leaves = map(jnp.asarray, jax.tree.leaves(function(*arguments)))
        return sum(jnp.sum(jnp.sin(jnp.arange(leaf.size) + 1.0) * leaf.ravel()) for leaf in leaves)

    return summed


@pytest.mark.parametrize("name", TRACED)
def test_in_float64_under_jit_vmap_and_grad(name):
    function, arguments, has_gradient = TRACED[name]
    with jax.enable_x64(True):
        plain = function(*arguments)

        @jax.jit
        def composed(*arguments):
            twice = jax.tree.map(lambda x: jnp.stack([x, x]), arguments)
            gradient = None
            if has_gradient:
                gradient = jax.grad(total(function), tuple(range(len(arguments))))(*arguments)
            return function(*arguments), jax.vmap(function)(*twice), gradient

        out, each, gradient = composed(*arguments)
        for one, two, expected in zip(*map(jax.tree.leaves, (out, each, plain)), strict=True):
            if not jnp.issubdtype(one.dtype, jnp.floating):
                assert one.dtype in (jnp.int32, jnp.int64, jnp.bool_)
                np.testing.assert_array_equal(one, expected)
            else:
                assert one.dtype == np.float64
                assert np.asarray(expected).dtype == np.float64
                np.testing.assert_allclose(one, expected, rtol=1e-9, atol=1e-11)
            np.testing.assert_allclose(two, np.stack([one, one]), rtol=1e-9, atol=1e-11)
        if not has_gradient:
            return
        # Along a random direction, against the difference of two values.
        random = np.random.default_rng(1)
        directions = [random.standard_normal(np.shape(x)) for x in arguments]
        ahead, behind = (
            [x + step * d for x, d in zip(arguments, directions, strict=True)]
            for step in (1e-5, -1e-5)
        )
        slope = (total(function)(*ahead) - total(function)(*behind)) / 2e-5
        found = sum(np.sum(g * d) for g, d in zip(gradient, directions, strict=True))
        np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-7)


def test_a_model_answers_alike_with_64_bit_numbers(vlm):
    image = Image.fromarray(np.arange(3 * 32 * 32, dtype=np.uint8).reshape(32, 32, 3))
    inputs = vlm.process([vlm.render("What is in the picture?")], [image])
    site = "language_model.model.layers.1"

    def run():
        states = vlm.forward(inputs, sites=site).states[site]
        edits = {site: xlvlm_jax.replace(2 * states, where="image")}
        answer = vlm.generate(inputs, max_new_tokens=4, sites=site, edits=edits)
        return np.asarray(answer.tokens), np.asarray(answer.states[site])

    tokens, states = run()
    with jax.enable_x64(True):
        wide_tokens, wide_states = run()
    np.testing.assert_array_equal(wide_tokens, tokens)
    assert wide_states.dtype == np.float32  # the model's own
    np.testing.assert_allclose(wide_states, states, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "package", [xlvlm_jax, shift, steering], ids=["xlvlm_jax", "shift", "steering"]
)
def test_each_function_says_whether_it_traces(package):
    listed = {name.partition(",")[0].rpartition(".")[2] for name in TRACED}
    functions = {
        name: value
        for name in package.__all__
        if inspect.isfunction(value := getattr(package, name)) and name not in OTHERS
    }
    for name, function in functions.items():
        said = " ".join((function.__doc__ or "").split())
        if name in listed:
            assert "orks under jit" in said, name
        else:
            assert "cannot be traced" in said, name


@pytest.mark.parametrize("package", [metrics, ports], ids=["metrics", "ports"])
def test_only_what_traces_says_so(package):
    """Most functions take no arrays and say nothing."""
    listed = {name.partition(",")[0].rpartition(".")[2] for name in TRACED}
    functions = [name for name in package.__all__ if inspect.isfunction(getattr(package, name))]
    said = {
        n for n in functions if "orks under jit" in " ".join(getattr(package, n).__doc__.split())
    }
    assert said == listed.intersection(functions)
