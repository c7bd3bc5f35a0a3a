"""Edits that depend on the state: by hand, against numpy, in a program, in generation, messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import ports
from ports import steer

STATES = np.float32([[[1, 1], [1, 4], [-2, 0]]])


class Same(nn.Module):
    """Returns its input."""

    def __call__(self, x):
        return x


class Model(nn.Module):
    """Returns the output of the module "inner"."""

    @nn.compact
    def __call__(self, x):
        return Same(name="inner")(x)


def changed(edit, states=STATES) -> np.ndarray:
    return np.asarray(steer(Model().apply, {"inner": edit})({}, states))


def test_adaptive_by_hand():
    # Along the second axis, of whatever length: 1, 4 and 0, with 3 to reach.
    edit = ports.add_adaptive([0.0, 5.0], [9.0, 3.0], alpha=0.5)
    np.testing.assert_allclose(changed(edit), [[[1, 2], [1, 4], [-2, 1.5]]], rtol=1e-6)
    assert edit.width == 2
    nowhere = ports.add_adaptive([0.0, 0.0], [9.0, 3.0])
    np.testing.assert_array_equal(changed(nowhere), STATES)
    first = ports.add_adaptive([0.0, 5.0], [9.0, 3.0], where={"at": [0]})
    np.testing.assert_allclose(changed(first), [[[1, 3], [1, 4], [-2, 0]]], rtol=1e-6)


def test_similar_by_hand():
    vectors, keys = np.float32([[10, 0], [0, 20]]), np.float32([[1, 0], [0, 1]])
    # Cosines with the keys: equal (the first wins), .24 and .97, -1 and 0.
    every = ports.add_if_similar(vectors, keys, -1.0)
    np.testing.assert_allclose(changed(every), [[[11, 1], [1, 24], [-2, 20]]])
    some = ports.add_if_similar(vectors, keys, 0.9, alpha=0.5)
    np.testing.assert_allclose(changed(some), [[[1, 1], [1, 14], [-2, 0]]])
    # A threshold for each key.
    each = ports.add_if_similar(vectors, keys, [0.5, 0.99])
    np.testing.assert_allclose(changed(each), [[[11, 1], [1, 4], [-2, 0]]])
    # From the center, where the first key lies, all have the cosine .71 with the second one.
    moved = ports.add_if_similar(vectors, keys, 0.7, center=[1, 0])
    np.testing.assert_allclose(changed(moved), [[[1, 21], [1, 24], [-2, 20]]])


def test_rounding_leaves_no_cosine_beyond_one():
    states = np.random.default_rng(0).normal(size=(200, 7)).astype(np.float32)
    found = np.asarray(ports.intervene.adaptive_edits.similarities(states, -states, np.zeros(7)))
    assert found.min() == -1 and found.max() <= 1
    # The least threshold always adds, also to what is opposite to the key.
    for state in states[:20]:
        edit = ports.add_if_similar(np.ones(7), -state, -1.0)
        np.testing.assert_array_equal(edit(state[None]), state[None] + 1)


def test_against_numpy():
    rng = np.random.default_rng(0)
    states, keys, vectors = (rng.normal(size=s) for s in ((2, 5, 8), (4, 8), (4, 8)))
    center = rng.normal(size=8)
    moved, towards = states - center, keys - center
    norms = np.linalg.norm(moved, axis=-1)[..., None] * np.linalg.norm(towards, axis=-1)
    cosines = moved @ towards.T / norms
    best = cosines.argmax(-1)
    threshold = np.median(cosines.max(-1)) + np.array([0.01, -0.02, 0.03, -0.04])
    passes = np.take_along_axis(cosines, best[..., None], -1) >= threshold[best][..., None]
    assert 0 < passes.sum() < passes.size
    edit = ports.add_if_similar(vectors, keys, threshold, center=center, alpha=[2.0, 3.0])
    expected = states + np.array([2.0, 3.0])[:, None, None] * passes * vectors[best]
    np.testing.assert_allclose(changed(edit, np.float32(states)), expected, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda v, alpha: ports.add_adaptive(v, 2 * v, alpha),
        lambda v, alpha: ports.add_if_similar(v, 3 * v, 0.1, alpha=alpha),
    ],
)
def test_one_program_for_every_vector_and_strength(make):
    traces = []

    @jax.jit
    def run(edit, x):
        traces.append(edit)
        return steer(Model().apply, {"inner": [edit, ports.add([1.0, 0.0])]})({}, x)

    x = jnp.asarray(STATES)
    rest = np.asarray(run(make(jnp.array([1.0, 2.0]), 0.0), x))
    np.testing.assert_array_equal(rest, STATES + np.float32([1, 0]))  # strength 0 changes nothing
    strong = run(make(jnp.array([3.0, 1.0]), 5.0), x)
    assert len(traces) == 1 and not np.allclose(strong, rest)

    def total(vector):
        return steer(Model().apply, {"inner": make(vector, 1.0)})({}, x).sum()

    slope = jax.grad(total)(jnp.array([1.0, 2.0]))
    assert np.isfinite(slope).all() and np.any(slope)


def test_no_generated_state_falls_short_of_the_reference(vlm):
    site = vlm.find_site("layers.6", generated=True)
    rng = np.random.default_rng(1)
    vector = rng.normal(size=vlm.site_shapes[site][-1])
    unit = vector / np.linalg.norm(vector)
    inputs = vlm.process(
        [vlm.render("Is there a dog?")], [rng.integers(0, 255, (32, 32, 3), np.uint8)]
    )

    def states(reference, alpha):
        edits = {site: ports.add_adaptive(vector, reference, alpha)}
        answer = vlm.generate(inputs, max_new_tokens=2, sites=[site], edits=edits)
        return np.asarray(answer.states[site][0])

    plain = states(vector, 0.0)
    reference = plain.mean(0) + 5 * unit
    assert ((plain - reference) @ unit).min() < -4
    half, whole = (states(reference, alpha) for alpha in (0.5, 1.0))
    # The prompt's state is that of the plain run, moved; the next one depends on what it led to.
    missing = (reference - plain[0]) @ unit
    np.testing.assert_allclose(half[0], plain[0] + 0.5 * missing * unit, atol=1e-4)
    assert ((whole - reference) @ unit).min() > -1e-3


def test_messages():
    with pytest.raises(ValueError, match=r"have shapes \(2,\) and \(3,\); expected \[D\] and"):
        ports.add_adaptive([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"\(1, 2\), \(2, 2\), \(2,\) and \(\); expected \[K, D\]"):
        ports.add_if_similar([1.0, 2.0], np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"\(3,\); expected .*, and a number or \[K\]"):
        ports.add_if_similar([1.0, 2.0], [1.0, 2.0], threshold=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="the steering vector has entries that are not finite"):
        ports.add_adaptive([np.inf, 2.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="width 2; the states at 'inner' have width 3"):
        changed(ports.add_adaptive([1.0, 2.0], [1.0, 2.0]), np.ones((1, 2, 3), np.float32))
