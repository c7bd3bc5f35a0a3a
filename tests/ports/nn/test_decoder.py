"""The decoder: masks and positions by hand, its cache against the plain forward pass."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn

from ports import checkpoint
from ports.nn import attention, decoder, rope

from .. import helpers

CONFIG = decoder.DecoderConfig(
    vocab_size=11,
    hidden_size=12,
    intermediate_size=17,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=6,
    rope=rope.Rope(100.0),
    norm_eps=1e-6,
    hidden_act="silu",
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    tie_embeddings=False,
)


class Embedded(nn.Module):
    """Passes tokens through the decoder, with or without a cache."""

    config: decoder.DecoderConfig

    @nn.compact
    def __call__(self, tokens, positions, mask, start=None, last_only=False):
        lm = decoder.Decoder(self.config, name="decoder")
        return lm(lm.embed_tokens(tokens), positions, mask, start, last_only)


_apply = jax.jit(Embedded(CONFIG).apply, static_argnames=("mutable", "last_only"))


@functools.cache
def parameters() -> dict:
    tokens = jnp.ones((1, 2), int)
    mask = attention.token_mask(tokens)
    shapes = jax.eval_shape(Embedded(CONFIG).init, jax.random.key(0), tokens, tokens, mask)
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32) / 2, shapes)


def forward(tokens, attention_mask):
    """Returns the states of a plain forward pass."""
    positions = decoder.token_positions(attention_mask)
    return _apply(parameters(), tokens, positions, attention.token_mask(attention_mask))


def step(cache, *args):
    """Makes one call that fills the cache; returns (states, cache)."""
    variables = {**parameters(), "cache": cache}
    states, variables = _apply(variables, *args, mutable=("cache",))
    return states, variables["cache"]


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
    states, cache = step(cache, tokens[:, :3], positions[:, :3], attention.token_mask(mask[:, :3]))
    got = [states]
    for slot in (3, 4):
        valid = jnp.broadcast_to(jnp.arange(8) <= slot, (2, 1, 1, 8))
        here = slice(slot, slot + 1)
        states, cache = step(cache, tokens[:, here], positions[:, here], valid, jnp.int32(slot))
        got.append(states)
    np.testing.assert_allclose(jnp.concatenate(got, 1), expected, rtol=0, atol=2e-6)


def test_a_cache_after_that_of_the_prompt_equals_one_cache():
    tokens = jnp.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
    mask = jnp.ones_like(tokens)
    expected = forward(tokens, mask)
    positions = decoder.token_positions(mask)
    prompt, own = (
        {"decoder": decoder.init_cache(CONFIG, batch=2, slots=slots, dtype=jnp.float32)}
        for slots in (3, 2)
    )
    _, prompt = step(prompt, tokens[:, :3], positions[:, :3], attention.token_mask(mask[:, :3]))
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
    arguments = (tokens, decoder.token_positions(mask), attention.token_mask(mask))
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


def test_the_width_of_a_head_follows_from_the_width_by_default():
    config = transformers.LlamaConfig(hidden_size=48, num_attention_heads=4, head_dim=None)
    assert decoder.DecoderConfig.from_hf(config, False, "llama").head_dim == 12


# Decoders of transformers, and what is special about each.
SMALL = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 17,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "pad_token_id": 0,
}
GEMMA = {"query_pre_attn_scalar": 7, "sliding_window": 4}
# Values that these model_types do not have, and transformers ignores.
IGNORED = {"attention_bias": True, "mlp_bias": True, "hidden_activation": "relu"}
DECODERS = {
    "mistral": transformers.MistralConfig(**SMALL, **IGNORED, sliding_window=4),
    "qwen2": transformers.Qwen2Config(
        **{**SMALL, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
        | {"head_dim": 6}
    ),
    "qwen3": transformers.Qwen3Config(**SMALL, attention_bias=True),
    "gemma": transformers.GemmaConfig(
        **SMALL, hidden_activation="relu", mlp_bias=True, sliding_window=4
    ),
    "gemma2": transformers.Gemma2Config(
        **SMALL, **GEMMA, attn_logit_softcapping=1.5, attn_implementation="eager"
    ),
    "gemma3_text": transformers.Gemma3TextConfig(
        **SMALL,
        **GEMMA,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
}


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_equals_transformers(tmp_path, name):
    model = helpers.make_pair(tmp_path, transformers.AutoModel.from_config(DECODERS[name]))
    cfg = decoder.DecoderConfig.from_hf(DECODERS[name], True, name)
    tokens = np.random.default_rng(0).integers(1, 31, (2, 9))
    mask = np.ones_like(tokens)
    mask[0, :3] = 0
    positions = decoder.token_positions(jnp.asarray(mask))
    with torch.no_grad():
        expected = model.torch_model(
            input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)
        ).last_hidden_state.numpy()
    inputs = (jnp.asarray(tokens), positions, attention.token_mask(jnp.asarray(mask)))
    module = Embedded(cfg)
    abstract = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    params = checkpoint.load_params(
        tmp_path, abstract, lambda name: f"decoder.{name}", dtype=jnp.dtype("float32"), tied={}
    )
    states = np.asarray(jax.jit(module.apply)({"params": params}, *inputs))
    real = mask == 1
    assert helpers.relative_error(states, expected, real) < 1e-5

    # The same token by token.
    cache = {"decoder": decoder.init_cache(cfg, batch=2, slots=9, dtype=jnp.float32)}
    run = jax.jit(module.apply, static_argnames="mutable")
    got = []
    for slot in range(9):
        valid = (jnp.asarray(mask) != 0) & (jnp.arange(9) <= slot)
        one, variables = run(
            {"params": params, "cache": cache},
            inputs[0][:, slot : slot + 1],
            positions[:, slot : slot + 1],
            valid[:, None, None],
            jnp.int32(slot),
            mutable=("cache",),
        )
        cache = variables["cache"]
        got.append(one)
    got = np.concatenate(got, axis=1)
    np.testing.assert_allclose(got[real], states[real], rtol=0, atol=1e-5)


class TestBlocks:
    """Positions that see each other in both directions."""

    def see(self, **changes):
        """Returns bool[T, T]: which token changes which state, of 6 with a block of three."""
        config = dataclasses.replace(CONFIG, num_layers=1, sliding_window=2, **changes)
        blocks = jnp.array([[-1, 0, 0, 0, -1, -1]])
        tokens = jnp.array([[3, 1, 4, 1, 5, 9]])
        mask = jnp.ones_like(tokens)

        def run(x):
            lm = decoder.Decoder(config)
            params = {k: v for k, v in parameters()["params"]["decoder"].items() if k != "layers_1"}
            return lm.apply(
                {"params": params},
                x,
                decoder.token_positions(mask),
                attention.token_mask(mask),
                blocks=blocks,
            )

        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 12), np.float32))
        change = jax.jacobian(run)(x)[0, :, :, 0]  # [T, D, S, D]
        return (np.abs(change).max((1, 3)) > 0).astype(int).tolist()

    def test_within_the_window(self):
        assert self.see() == [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [0, 1, 1, 1, 0, 0],
            [0, 0, 1, 1, 0, 0],
            [0, 0, 0, 1, 1, 0],
            [0, 0, 0, 0, 1, 1],
        ]

    def test_beyond_the_window(self):
        assert self.see(window_limits_blocks=False)[3] == [0, 1, 1, 1, 0, 0]

    def test_in_a_layer_without_window(self):
        assert self.see(full_layers=(0,))[3] == [1, 1, 1, 1, 0, 0]


class TestInjections:
    """Features added between layers."""

    config = dataclasses.replace(CONFIG, num_injections=2)

    def run(self, features, last_only=False):
        tokens = jnp.array([[3, 1, 4, 1]])
        mask = jnp.ones_like(tokens)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 12), np.float32))

        def apply(variables):
            return decoder.Decoder(self.config).apply(
                variables,
                x,
                decoder.token_positions(mask),
                attention.token_mask(mask),
                last_only=last_only,
                injections=features,
                capture_intermediates=True,
            )

        return apply({"params": parameters()["params"]["decoder"]})

    def test_are_added_after_the_site_of_the_layer(self):
        features = list(np.random.default_rng(1).standard_normal((2, 1, 4, 12), np.float32))
        _, kept = self.run(features)
        sites = {
            name: value["__call__"][0]
            for name, value in kept["intermediates"].items()
            if name != "__call__"
        }
        for i in range(2):
            expected = sites[f"layers_{i}"] + features[i]
            np.testing.assert_array_equal(sites[f"deepstack_{i}"], expected)
        _, plain = self.run(())
        first = plain["intermediates"]["layers_0"]["__call__"][0]
        np.testing.assert_array_equal(sites["layers_0"], first)
        assert (
            np.abs(plain["intermediates"]["layers_1"]["__call__"][0] - sites["layers_1"]).max()
            > 1e-3
        )

    def test_of_the_last_position_alone(self):
        features = list(np.random.default_rng(1).standard_normal((2, 1, 4, 12), np.float32))
        whole, last = self.run(features)[0], self.run(features, last_only=True)[0]
        np.testing.assert_allclose(last, whole[:, -1:], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"layer_types": ["full_attention"]}, ("layer_types is ['full_attention']", "of 3 layers")),
        ({"num_key_value_heads": 3}, ("4 attention heads", "3 key-value heads")),
        ({"hidden_act": "swoosh"}, ("activation 'swoosh', which is not",)),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused(changes, parts):
    text = DECODERS["qwen2"].to_dict() | changes
    with helpers.raises_line(ValueError, *parts):
        decoder.DecoderConfig.from_hf(types.SimpleNamespace(**text), False, "qwen2", "llama")


def test_another_decoder_is_refused_with_those_that_are_known():
    with helpers.raises_line(ValueError, "model_type is 'gemma'", "'llama' or 'mistral'"):
        decoder.DecoderConfig.from_hf(DECODERS["gemma"], False, "llama", "mistral")


@pytest.mark.parametrize("name", ["llava", "idefics2", "qwen2_vl", "molmo"])
def test_every_layer_of_each_port_is_computed_again(vlms, name):
    vlm = vlms[name]

    def counted(is_on):
        def states(params, inputs):
            with decoder.recomputing(is_on):
                return vlm.module.apply({"params": params}, inputs, method="states")

        equations = jax.make_jaxpr(states)(vlm.params, dict(vlm.example_inputs())).eqns
        return sum("remat" in equation.primitive.name for equation in equations)

    assert counted(True) == vlm.module.config.text.num_layers and counted(False) == 0
