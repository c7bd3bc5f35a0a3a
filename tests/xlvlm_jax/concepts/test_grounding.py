"""Grounding of concepts in words and images: by hand, properties, messages."""

import functools
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from xlvlm_jax.concepts.grounding import (
    ground_images,
    ground_text,
    strongest_samples,
    unembed_of,
)

VOCABULARY = ["▁Dog", "▁the", "dog", "ab", "▁grass ", "xqz", "12", "tree", "cat"]


class Decoder:
    def decode(self, ids):
        return VOCABULARY[ids[0]].replace("▁", " ")


def head(x):
    """Returns a head of V = 9 tokens, D = 2: one direction ranks them forwards, one backwards."""
    falling = jnp.arange(9.0)[::-1]
    return jnp.asarray(x) @ jnp.stack([falling, falling[::-1]])


def test_words_by_hand():
    components = np.eye(2, dtype=np.float32)
    forwards, backwards = ground_text(components, head, Decoder())
    assert forwards == ["dog", "grass", "12", "tree", "cat"]
    assert backwards == ["cat", "tree", "12", "grass", "dog"]


def test_words_are_limited_by_candidates_and_by_words():
    components = np.eye(2, dtype=np.float32)
    assert ground_text(components, head, Decoder(), num_words=2)[0] == ["dog", "grass"]
    assert ground_text(components, head, Decoder(), num_candidates=2) == [["dog"], ["cat", "tree"]]


def test_words_through_the_final_norm():
    """The norm swaps the two directions."""

    def unembed(x, through_norm=False):
        return head(x[:, ::-1] if through_norm else x)

    components = np.eye(2, dtype=np.float32)
    plain = ground_text(components, unembed, Decoder())
    assert ground_text(components, unembed, Decoder(), through_norm=True) == plain[::-1]


def test_concepts_of_heads_are_read_after_the_output_projection(vlm):
    layer = "language_model.model.layers.3.self_attn"
    width = vlm.site_shapes[f"{layer}.heads"][-1]
    x = np.random.default_rng(0).standard_normal((2, width)).astype(np.float32)
    kernel = vlm.params["language_model"]["model"]["layers_3"]["self_attn"]["o_proj"]["kernel"]
    expected = vlm.unembed(x @ np.asarray(kernel), through_norm=True)
    for site in (f"{layer}.heads", f"finetuned:{layer}.heads"):
        found = unembed_of(vlm, site)(x, through_norm=True)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert unembed_of(vlm, vlm.head)(x) is x  # logits already
    assert unembed_of(vlm, layer) == unembed_of(vlm, None) == vlm.unembed
    with pytest.raises(ValueError, match=r"got site .*o_proj'; expected heads: vision_tower"):
        vlm.project_heads(x, f"{layer}.o_proj")


def test_a_concept_may_have_no_words():
    component = np.float32([[1.0, 0.0]])
    words = ground_text(component, lambda x: -abs(head(x) - 7), Decoder(), num_candidates=1)
    assert words == [[]]  # its one candidate is a stop word


@given(scale=st.floats(0.1, 10), order=st.permutations(range(4)))
@settings(max_examples=10, deadline=None)
def test_words_depend_on_the_direction_alone(scale, order):
    components = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    words = ground_text(components, head, Decoder())
    again = ground_text(np.float32(scale) * components[list(order)], head, Decoder())
    assert again == [words[k] for k in order]


@pytest.mark.parametrize(
    ("components", "options", "message"),
    [
        (
            np.ones((2, 3)),
            {},
            "components are 3 wide, which the language-model head does not accept",
        ),
        (np.ones(2), {}, r"components have shape \(2,\); expected \[K, D\]"),
        (np.float32([[1, 1], [1, np.nan]]), {}, "concept 1 contains NaN or Inf"),
        (np.ones((2, 2)), {"num_words": 0}, "num_words must be at least 1, got 0"),
        (np.ones((2, 2)), {"num_candidates": 0}, "num_candidates must be at least 1, got 0"),
    ],
)
@pytest.mark.wrong_types
def test_bad_components_are_one_line(components, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        ground_text(components, head, Decoder(), **options)
    assert "\n" not in str(caught.value)


def test_components_of_another_width_than_the_head_are_one_line():
    dense = nn.Dense(9)
    unembed = functools.partial(dense.apply, dense.init(jax.random.key(0), np.ones((1, 2))))
    with pytest.raises(ValueError, match="components are 3 wide, which the language-model head"):
        ground_text(np.ones((2, 3)), unembed, Decoder())


def test_images_by_hand():
    activations = np.float32([[0.0, 2.0], [3.0, 1.0], [1.0, 2.0]])
    assert ground_images(activations, 2).tolist() == [[1, 2], [0, 2]]
    assert ground_images(jnp.asarray(activations), 3).tolist() == [[1, 2, 0], [0, 2, 1]]


@given(arrays(np.float32, (7, 3), elements=st.floats(0, 4, width=32)), st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_images_are_those_of_largest_activation(activations, num_images):
    images = ground_images(activations, num_images)
    got = np.take_along_axis(activations, images.T, axis=0)
    np.testing.assert_array_equal(got, -np.sort(-activations, axis=0)[:num_images])
    assert all(len(set(row)) == num_images for row in images.tolist())


@pytest.mark.parametrize("num_images", [0, 4])
def test_images_cannot_be_more_than_samples(num_images):
    with pytest.raises(ValueError, match=rf"must be in 1\.\.3, the number of .* got {num_images}"):
        ground_images(np.ones((3, 2), np.float32), num_images)


def test_images_need_finite_activations():
    with pytest.raises(ValueError, match="activations of sample 1 contain NaN or Inf"):
        ground_images(np.float32([[1, 1], [np.inf, 1]]), 1)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, jax.jit(lambda x: x)])
def test_images_of_ties_and_on_the_device_are_those_of_a_full_sort(kind):
    values = np.random.default_rng(0).integers(0, 4, (50, 3)).astype(np.float32)
    expected = np.argsort(-values, axis=0, kind="stable")[:12].T
    found = ground_images(kind(values), 12)
    assert isinstance(found, np.ndarray if kind is np.asarray else jax.Array)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(jax.jit(lambda x: ground_images(x, 12))(values), expected)


def test_images_in_float64_are_told_apart_beyond_float32():
    values = 1 + 1e-12 * np.array([[0.0], [2.0], [1.0]])
    np.testing.assert_array_equal(ground_images(values, 3), [[1, 2, 0]])


class TestStrongestSamples:
    @settings(max_examples=50, deadline=None)
    @given(
        arrays(np.float32, (12, 3), elements=st.integers(-2, 3).map(float)),
        st.lists(st.integers(0, 4), min_size=12, max_size=12),
        st.integers(1, 6),
        st.integers(1, 5),
    )
    def test_as_sorting_all_rows_does(self, activations, samples, size, count):
        """Whatever the tiles, wherever the rows of a sample are, with ties."""
        of = np.array(samples)
        tiles = ((start, activations[start : start + size]) for start in range(0, 12, size))
        found = strongest_samples(tiles, 3, of, count)
        for column, rows in zip(activations.T, found, strict=True):
            every = [row for row in np.argsort(-column, kind="stable") if column[row] != 0]
            firsts = [row for i, row in enumerate(every) if of[row] not in of[every[:i]]]
            assert rows.tolist() == firsts[:count]

    def test_memory_does_not_grow_with_the_rows_of_a_sample(self):
        of = np.zeros(2**14, np.int64)
        rng = np.random.default_rng(0)
        tiles = ((i, rng.random((256, 32), np.float32)) for i in range(0, 2**14, 256))
        tracemalloc.start()
        found = strongest_samples(tiles, 32, of, 5)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert [len(rows) for rows in found] == [1] * 32
        assert peak < 2**19  # the activations have 2**21 bytes
