"""Filters for sampling: by hand, and against transformers on the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import ports
from ports import passes
from ports.decoding import generation_config, sampling

from .. import helpers

KEY = jax.random.key(0)
draw, keep_likely = jax.jit(sampling.draw), jax.jit(sampling.keep_likely)

CASES = {
    "temperature": {"temperature": 0.3, "top_k": 0},
    "transformers' own": {},
    "top_k": {"top_k": 3},
    "more than there are": {"top_k": 999},
    "top_p": {"top_p": 0.7, "top_k": 0},
    "the likeliest": {"top_p": 0.001, "top_k": 1, "temperature": 0.01},
    "both": {"top_k": 9, "top_p": 0.8, "temperature": 3.0},
    "min_p": {"min_p": 0.2, "temperature": 2.5, "top_k": 0},
    "typical_p": {"typical_p": 0.4, "temperature": 3.0, "top_k": 0},
    "epsilon_cutoff": {"epsilon_cutoff": 0.05, "temperature": 3.0},
    "eta_cutoff": {"eta_cutoff": 0.05, "temperature": 4.0},
    "all of them": {
        "temperature": 4.0,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.9,
        "epsilon_cutoff": 0.002,
        "eta_cutoff": 0.01,
        "repetition_penalty": 1.2,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_what_may_be_drawn_equals_pytorchs(small, case):
    inputs, values = helpers.make_inputs([1, 0], [3, 9]), CASES[case]
    torch.manual_seed(0)
    with torch.no_grad():
        out = small.torch_model.generate(
            **helpers.to_torch(inputs),
            max_new_tokens=1,
            do_sample=True,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            pad_token_id=helpers.PAD,
            **values,
        )
    vlm = small.vlm.with_generation_config({**values, "do_sample": True})
    # Rules on logits come before; the others of transformers' are filters.
    plain = {"repetition_penalty": values.get("repetition_penalty", 1.0)}
    with torch.no_grad():
        ruled = helpers.torch_generate(small.torch_model, inputs, 1, output_scores=True, **plain)
    ours = np.asarray(keep_likely(jnp.asarray(ruled.scores[0].numpy()), vlm.sampling(KEY)))
    theirs = out.scores[0].numpy()
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_cold_checkpoint_of_its_own_is_greedy(small):
    inputs = helpers.make_inputs([1, 1], [3, 6])
    values = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.001}
    vlm = small.vlm.with_generation_config(values)
    greedy = vlm.generate(inputs, max_new_tokens=6).tokens
    drawn = vlm.generate(inputs, max_new_tokens=6, sampling=vlm.sampling(KEY)).tokens
    np.testing.assert_array_equal(drawn, greedy)


def test_every_step_draws_anew():
    logits = jnp.zeros((64, 50))
    drawn = [draw(logits, ports.Sampling(KEY), jnp.int32(i)) for i in (0, 1)]
    assert (drawn[0] != drawn[1]).mean() > 0.8


def test_keeps_one_token_at_least():
    logits = jnp.array([[0.0, 2.0, 1.0]])
    for values in ({"top_p": 0.0}, {"top_k": 1}, {"typical_p": 0.0}, {"epsilon_cutoff": 0.99}):
        assert draw(logits, ports.Sampling(KEY, **values), jnp.int32(0)) == 1


@pytest.mark.parametrize("values", [{"top_k": 0}, {"epsilon_cutoff": 1.0}, {"eta_cutoff": 1.0}])
def test_values_that_turn_a_filter_off(values):
    logits = jnp.log(jnp.arange(1.0, 5.0))[None]
    for keep in (keep_likely, sampling.keep_likely):
        np.testing.assert_array_equal(keep(logits, ports.Sampling(KEY, **values)), logits)
    assert not generation_config.of_sampling({"top_k": 0, **values}).keys() & values.keys()


def test_filters_that_keep_everything_are_turned_off():
    idle = {"top_p": 1.0, "top_k": 0, "typical_p": jnp.float32(1), "epsilon_cutoff": 0.0}
    settings = sampling.without_idle(ports.Sampling(KEY, 0.7, **idle))
    assert settings == ports.Sampling(KEY, 0.7)
    assert sampling.without_idle(ports.Sampling(KEY, top_p=0.9, min_p=0.0)).top_p == 0.9


def test_without_a_filter_nothing_is_sorted(small, monkeypatch):
    """Neither by default nor with a top_p of 1, whose value is an argument of the program."""
    seen = []
    monkeypatch.setattr(passes, "generate", lambda *a, **_: seen.append(a[3]) or 1 / 0)
    inputs = helpers.make_inputs([1], [4])
    for made in (ports.Sampling(KEY), ports.Sampling(KEY, top_p=1.0)):
        with pytest.raises(ZeroDivisionError):
            small.vlm.generate(inputs, max_new_tokens=1, sampling=made)
    logits = jnp.zeros((2, 9))
    for made in seen:
        assert "sort" not in keep_likely.lower(logits, made).as_text()
    assert "sort" in keep_likely.lower(logits, ports.Sampling(KEY, top_p=0.9)).as_text()


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.8])
def test_a_nucleus_keeps_as_many_equal_logits_as_transformers(top_p):
    """Which of them depends on PyTorch's sort, which keeps no order among equals."""
    logits = np.random.default_rng(0).integers(0, 3, (20, 40)).astype(np.float32)
    ours = keep_likely(jnp.asarray(logits), ports.Sampling(KEY, top_p=top_p))
    theirs = transformers.TopPLogitsWarper(top_p)(None, torch.from_numpy(logits)).numpy()
    np.testing.assert_array_equal(np.sort(ours), np.sort(theirs))
    assert ((ours == logits) | np.isinf(ours)).all()


def test_half_of_the_mass_of_equal_logits_is_half_of_them():
    kept = keep_likely(jnp.zeros((1, 4)), ports.Sampling(KEY, top_p=0.5))
    assert kept.tolist() == [[-np.inf, -np.inf, 0, 0]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; expected a number above 0"),
        ({"temperature": jnp.float32(-1)}, "temperature is -1.0; expected a number above 0"),
        ({"temperature": None}, "temperature is None; expected a number above 0"),
        ({"top_k": -1}, "top_k is -1; expected a whole number, at least 0"),
        ({"top_k": 2.5}, "top_k is 2.5; expected a whole number, at least 0"),
        ({"top_p": 1.5}, "top_p is 1.5; expected a number from 0 to 1"),
        ({"min_p": np.float64(2)}, "min_p is 2.0; expected a number from 0 to 1"),
        (
            {"temperature": jnp.ones(4)},
            "temperature has shape (4,); expected one number for all rows",
        ),
        (
            {"top_p": np.full((1, 1), 0.5)},
            "top_p has shape (1, 1); expected one number for all rows",
        ),
        ({"typical_p": float("nan")}, "typical_p is nan; expected a number from 0 to 1"),
    ],
    ids=str,
)
def test_values_outside_their_range(small, values, expected):
    given = ports.Sampling(KEY, **values)
    with helpers.raises_line(ValueError, f"sampling: {expected}"):
        sampling.draw(jnp.zeros((1, 4)), given, jnp.int32(0))
    with helpers.raises_line(ValueError, f"sampling: {expected}"):
        small.vlm.generate(helpers.make_inputs([0], [3]), max_new_tokens=1, sampling=given)


# softmax([0, ln 2, ln 3, ln 4]) = (.1, .2, .3, .4)
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [0.1, 0.2, 0.3, 0.4]),
        # Halving the temperature squares the odds: 1, 4, 9, 16 of 30.
        ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        # .4 + .3 reach .6: the others go, 3 : 4 stays.
        ({"top_p": 0.6}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_k": 3}, [0, 2 / 9, 3 / 9, 4 / 9]),
        # Half of .4 is .2, which .1 falls short of.
        ({"min_p": 0.5}, [0, 2 / 9, 3 / 9, 4 / 9]),
    ],
    ids=str,
)
def test_follows_the_softmax(values, expected):
    rows = 40_000
    logits = jnp.broadcast_to(jnp.log(jnp.arange(1.0, 5.0)), (rows, 4))
    tokens = draw(logits, ports.Sampling(KEY, **values), jnp.int32(0))
    got = np.bincount(tokens, minlength=4) / rows
    # Five standard deviations of a share: one run in 10^5 would miss it by chance.
    expected = np.array(expected)
    assert (np.abs(got - expected) <= 5 * np.sqrt(expected * (1 - expected) / rows)).all()


def test_low_precision_draws_as_float32_does():
    """Of 2,000 equal logits, draws in bfloat16 would be of the first few hundred."""
    logits = jnp.zeros((500, 2000), jnp.bfloat16)
    drawn = draw(logits, ports.Sampling(KEY), 0)
    np.testing.assert_array_equal(drawn, draw(logits.astype(jnp.float32), ports.Sampling(KEY), 0))
    assert 700 < np.mean(drawn) < 1300
