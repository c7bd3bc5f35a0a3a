"""The decoder: masks and positions by hand, its cache against the plain forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import linen as nn

from ports.nn import decoder

from .. import helpers

CONFIG = decoder.DecoderConfig(
    vocab_size=11,
    hidden_size=12,
    intermediate_size=17,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=6,
    rope_theta=100.0,
    norm_eps=1e-6,
    hidden_act="silu",
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    tie_embeddings=False,
)


class Embedded(nn.Module):
    """Tokens through the decoder, with or without a cache."""

    config: decoder.DecoderConfig

    @nn.compact
    def __call__(self, tokens, positions, mask, start=None, last_only=False):
        lm = decoder.Decoder(self.config, name="decoder")
        return lm(lm.embed_tokens(tokens), positions, mask, start, last_only)


_apply = jax.jit(Embedded(CONFIG).apply, static_argnames=("mutable", "last_only"))


@functools.cache
def parameters() -> dict:
    tokens = jnp.ones((1, 2), int)
    mask = decoder.causal_mask(tokens)
    shapes = jax.eval_shape(Embedded(CONFIG).init, jax.random.key(0), tokens, tokens, mask)
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32) / 2, shapes)


def forward(tokens, attention_mask):
    """A plain forward pass -> states."""
    positions = decoder.token_positions(attention_mask)
    return _apply(parameters(), tokens, positions, decoder.causal_mask(attention_mask))


def step(cache, *args):
    """One call that fills the cache -> (states, cache)."""
    variables = {**parameters(), "cache": cache}
    states, variables = _apply(variables, *args, mutable=("cache",))
    return states, variables["cache"]


def test_causal_mask_by_hand():
    # The second row's first position is padding: nobody sees it.
    mask = decoder.causal_mask(jnp.array([[1, 1, 1], [0, 1, 1]]))
    expected = [
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
        [[0, 0, 0], [0, 1, 0], [0, 1, 1]],
    ]
    np.testing.assert_array_equal(mask[:, 0], np.array(expected, bool))


def test_a_mask_of_pairs_is_taken_as_it_is():
    pairs = np.random.default_rng(0).random((2, 3, 3)) < 0.5
    np.testing.assert_array_equal(decoder.causal_mask(jnp.asarray(pairs))[:, 0], pairs)


def test_positions_count_tokens_and_not_padding():
    positions = decoder.token_positions(jnp.array([[0, 0, 1, 1], [1, 1, 1, 0]]))
    np.testing.assert_array_equal(positions, [[0, 0, 0, 1], [0, 1, 2, 2]])


def test_a_position_does_not_see_what_follows():
    tokens = jnp.array([[3, 1, 4, 1, 5]])
    mask = jnp.ones_like(tokens)
    states, changed = forward(tokens, mask), forward(tokens.at[0, 3].set(9), mask)
    np.testing.assert_array_equal(states[:, :3], changed[:, :3])
    assert (states[:, 3:] != changed[:, 3:]).any(-1).all()


def test_padding_changes_no_state():
    # The padding holds a token: what it is must not matter.
    tokens = jnp.array([[7, 7, 3, 1, 4], [3, 1, 4, 9, 9]])
    states = forward(tokens, jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]))
    np.testing.assert_allclose(states[0, 2:], states[1, :3], rtol=0, atol=1e-6)


def test_token_by_token_through_the_cache_equals_one_pass():
    tokens = jnp.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
    mask = jnp.ones_like(tokens)
    expected = forward(tokens, mask)
    cache = {"decoder": decoder.init_cache(CONFIG, batch=2, slots=8, dtype=jnp.float32)}
    positions = decoder.token_positions(mask)
    # The first three at once, which is a prefill, then one at a time.
    states, cache = step(cache, tokens[:, :3], positions[:, :3], decoder.causal_mask(mask[:, :3]))
    got = [states]
    for slot in (3, 4):
        valid = jnp.broadcast_to(jnp.arange(8) <= slot, (2, 1, 1, 8))
        here = slice(slot, slot + 1)
        states, cache = step(cache, tokens[:, here], positions[:, here], valid, jnp.int32(slot))
        got.append(states)
    np.testing.assert_allclose(jnp.concatenate(got, 1), expected, rtol=0, atol=2e-6)


def test_a_cache_behind_that_of_the_prompt_equals_one_cache():
    tokens = jnp.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
    mask = jnp.ones_like(tokens)
    expected = forward(tokens, mask)
    positions = decoder.token_positions(mask)
    prompt, own = (
        {"decoder": decoder.init_cache(CONFIG, batch=2, slots=slots, dtype=jnp.float32)}
        for slots in (3, 2)
    )
    _, prompt = step(prompt, tokens[:, :3], positions[:, :3], decoder.causal_mask(mask[:, :3]))
    for slot in (3, 4):
        here = slice(slot, slot + 1)
        valid = jnp.broadcast_to(jnp.arange(5) <= slot, (2, 1, 1, 5))
        variables = {**parameters(), "prompt_cache": prompt, "cache": own}
        states, variables = _apply(
            variables,
            tokens[:, here],
            positions[:, here],
            valid,
            jnp.int32(slot),
            mutable=("cache",),
        )
        own = variables["cache"]
        np.testing.assert_allclose(states, expected[:, here], rtol=0, atol=2e-6)


def test_the_last_position_alone_is_that_of_all():
    tokens = jnp.array([[7, 3, 1, 4], [3, 1, 4, 9]])
    mask = jnp.array([[0, 1, 1, 1], [1, 1, 1, 1]])
    cache = {"decoder": decoder.init_cache(CONFIG, batch=2, slots=5, dtype=jnp.float32)}
    arguments = (tokens, decoder.token_positions(mask), decoder.causal_mask(mask))
    both = [
        _apply(
            {**parameters(), "cache": cache},
            *arguments,
            mutable=("cache",),
            last_only=last_only,
        )
        for last_only in (False, True)
    ]
    (states, filled), (last, filled_too) = both
    assert last.shape == (2, 1, 12)
    np.testing.assert_allclose(last, states[:, -1:], rtol=0, atol=2e-6)
    # Later tokens see the keys and values of all positions.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), filled, filled_too
    )


def test_the_cache_holds_the_key_value_heads_alone():
    cache = decoder.init_cache(CONFIG, batch=2, slots=8, dtype=jnp.bfloat16)
    leaves = jax.tree.leaves(cache)
    assert len(leaves) == 2 * CONFIG.num_layers
    shapes = {((2, 1, 6, 8), "bfloat16"), ((2, 1, 8, 6), "bfloat16")}
    assert {(leaf.shape, str(leaf.dtype)) for leaf in leaves} == shapes


@pytest.mark.parametrize(
    ("rope", "parts"),
    [
        ({"rope_type": "linear", "factor": 2.0}, ("rope_type 'linear'", "'default'")),
        ({"rope_type": "dynamic", "factor": 2.0}, ("rope_type 'dynamic'", "'default'")),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, ("partial_rotary_factor",)),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
)
def test_scaled_rotary_embedding_is_refused(rope, parts):
    config = transformers.LlamaConfig(rope_parameters={"rope_theta": 1e4, **rope})
    with helpers.raises_line(ValueError, *parts):
        decoder.DecoderConfig.from_hf(config, False, "llama")


def test_the_width_of_a_head_follows_from_the_width_when_it_is_not_said():
    config = transformers.LlamaConfig(hidden_size=48, num_attention_heads=4, head_dim=None)
    assert decoder.DecoderConfig.from_hf(config, False, "llama").head_dim == 12
