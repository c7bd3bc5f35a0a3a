"""Rules on logits: by hand, and against what transformers' `generate` makes of the same logits."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ports
from ports import passes
from ports.decoding import logits

from .. import helpers
from ..qwen2_vl_helpers import make_inputs, make_qwen2_vl

COUNT = 12
END = 100
process = jax.jit(logits.process)


@pytest.fixture(scope="module")
def inputs():
    """Returns rows padded on the left, with one image, two images and none."""
    return helpers.make_inputs([1, 2, 0], [3, 9, 6])


@pytest.fixture(scope="module")
def greedy(small, inputs):
    return np.asarray(small.vlm.generate(inputs, max_new_tokens=COUNT).tokens)


# Name -> the values, of the tokens int[3, COUNT] that come without them.
CASES = {
    "a penalty": lambda g: {"repetition_penalty": 1.3},
    "a reward": lambda g: {"repetition_penalty": 0.5},
    "no token twice": lambda g: {"no_repeat_ngram_size": 1},
    "no pair twice": lambda g: {"no_repeat_ngram_size": 2},
    "bad words": lambda g: {"bad_words_ids": [g[0, :1], g[1, 2:4], g[2, 3:6], [END], [3] * 40]},
    "biases": lambda g: {"sequence_bias": [[g[0, :1], -2.5], [g[0, 1:2], 3.0], [g[1, :3], -9.0]]},
    "a least number": lambda g: {"min_new_tokens": 3, "eos_token_id": [g[0, 1], END]},
    "a least length": lambda g: {"min_length": 30, "eos_token_id": g[0, 1]},
    "both": lambda g: {"min_length": 99, "min_new_tokens": 3, "eos_token_id": g[0, 1]},
    "a forced end": lambda g: {"forced_eos_token_id": [END, 7]},
    "suppressed": lambda g: {"suppress_tokens": [*g[0, :2]]},
    "suppressed at first": lambda g: {"begin_suppress_tokens": [*g[:, 0], *g[:, 1]]},
    "invalid values": lambda g: {"remove_invalid_values": True, "no_repeat_ngram_size": 1},
    "an ending that grows": lambda g: {
        "exponential_decay_length_penalty": [2, 1.8],
        "eos_token_id": END,
    },
    "all of them": lambda g: {
        "sequence_bias": [[g[1, :1], -1.5]],
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [g[0, :1], g[1, 2:4]],
        "min_new_tokens": 4,
        "forced_eos_token_id": END,
        "exponential_decay_length_penalty": [5, 1.3],
        "suppress_tokens": g[2, :1],
        "begin_suppress_tokens": g[:, 1],
        "eos_token_id": [g[1, 3], END],
    },
}


def values_of(case, greedy):
    return json.loads(json.dumps(CASES[case](greedy), default=lambda value: value.tolist()))


def torch_steps(model, inputs, **options):
    """Returns PyTorch's tokens [B, M], and logits [M, B, V] before and after the rules."""
    out = helpers.torch_generate(
        model, inputs, COUNT, output_logits=True, output_scores=True, **options
    )
    new = out.sequences[:, inputs["input_ids"].shape[1] :].numpy()
    return new, np.stack(out.logits), np.stack(out.scores)


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_pytorchs(small, inputs, greedy, case):
    values = values_of(case, greedy)
    tokens, raw, expected = torch_steps(small.torch_model, inputs, **values)
    assert (raw != expected).any()  # the values do something
    changed = small.vlm.with_generation_config(values)
    rules = changed._rules(inputs)
    ids = np.pad(inputs["input_ids"], ((0, 0), (int(rules.fill), 0)))
    mask = np.pad(inputs["attention_mask"], ((0, 0), (int(rules.fill), 0))) == 1
    prompt = logits.read_prompt(rules, jnp.asarray(ids), jnp.asarray(mask), helpers.VOCABULARY)
    filled = np.zeros((3, COUNT), int)
    filled[:, : tokens.shape[1]] = tokens
    ended = np.cumsum(np.isin(tokens, changed.eos_tokens), 1) - np.isin(tokens, changed.eos_tokens)
    for step, (before, after) in enumerate(zip(raw, expected, strict=True)):
        ours = process(rules, prompt, jnp.asarray(before), jnp.asarray(filled), jnp.int32(step))
        # What follows the end of a row is not chosen from.
        rows = ended[:, step] == 0
        np.testing.assert_allclose(ours[rows], after[rows], rtol=1e-6, atol=1e-6)


class TestGenerate:
    @pytest.mark.parametrize("case", ["a penalty", "a reward", "no pair twice", "all of them"])
    def test_tokens_equal_pytorchs(self, small, inputs, greedy, case):
        values = values_of(case, greedy)
        ours = small.vlm.with_generation_config(values).generate(inputs, max_new_tokens=COUNT)
        theirs, *_ = torch_steps(small.torch_model, inputs, **values)
        assert (np.asarray(ours.tokens) != greedy).any()
        np.testing.assert_array_equal(ours.tokens[:, : theirs.shape[1]], theirs)

    def test_tokens_of_qwen2_vl_equal_pytorchs(self, tmp_path):
        pair = make_qwen2_vl(tmp_path)
        inputs = make_inputs([[(1, 6, 2), (1, 4, 4)], [], [(1, 2, 8)]], [4, 9, 8])
        greedy = np.asarray(pair.vlm.generate(inputs, max_new_tokens=COUNT).tokens)
        values = values_of("all of them", greedy)
        # From its own file, as transformers reads it.
        file = tmp_path / "generation_config.json"
        file.write_text(json.dumps(values | {"pad_token_id": 0, "do_sample": True, "top_k": 1}))
        loaded = ports.load(tmp_path)
        ours = loaded.generate(inputs, max_new_tokens=COUNT).tokens
        theirs, *_ = torch_steps(pair.torch_model, inputs, **values)
        assert (np.asarray(ours) != greedy).any()
        np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs)
        left_out = ports.load(tmp_path, generation_config={"eos_token_id": None})
        ours = left_out.generate(inputs, max_new_tokens=COUNT).tokens
        np.testing.assert_array_equal(ours, greedy)

    def test_rows_padded_on_the_right_give_the_same(self, small, inputs, greedy):
        changed = small.vlm.with_generation_config(values_of("a penalty", greedy))
        left, right = (
            changed.generate(rows, max_new_tokens=COUNT).tokens
            for rows in (inputs, helpers.pad_right(inputs))
        )
        np.testing.assert_array_equal(left, right)

    def test_a_sweep_is_each_of_its_variants(self, small, inputs, greedy):
        changed = small.vlm.with_generation_config(values_of("a penalty", greedy))
        helpers.check_sweep(changed, inputs, "language_model.model.layers.0")

    def test_other_numbers_and_tokens_never_compile_again(self, small, inputs):
        before = None
        for penalty, word in ((1.1, 5), (1.5, 9), (0.9, 11)):
            values = {
                "repetition_penalty": penalty,
                "suppress_tokens": list(range(word)),
                "bad_words_ids": [[word, word]],
            }
            small.vlm.with_generation_config(values).generate(inputs, max_new_tokens=2)
            before = before or passes.generate._cache_size()
        assert passes.generate._cache_size() == before

    def test_values_that_change_nothing_leave_the_program_as_it_is(self, small, inputs):
        neutral = {"repetition_penalty": 1.0, "min_length": 0, "num_beams": 1, "top_k": 5}
        texts = [
            vlm.lower(inputs, sites=(), max_new_tokens=2).as_text()
            for vlm in (small.vlm, small.vlm.with_generation_config(neutral))
        ]
        assert texts[0] == texts[1]

    def test_forward_passes_have_no_rules(self, small, inputs):
        changed = small.vlm.with_generation_config({"repetition_penalty": 9.0, "num_beams": 4})
        ours, expected = (vlm.forward(inputs).logits for vlm in (changed, small.vlm))
        np.testing.assert_array_equal(ours, expected)


class TestByHand:
    make = functools.partial(logits.make_rules, vocabulary=4, end_tokens=(3,), length=2, fill=1)
    IDS, MASK = jnp.array([[0, 0, 1]]), jnp.array([[False, False, True]])
    LOGITS = jnp.array([[4.0, 2.0, -2.0, 1.0]])

    def run(self, values, tokens, step=0):
        rules = self.make(values)
        prompt = logits.read_prompt(rules, self.IDS, self.MASK, 4)
        out = process(rules, prompt, self.LOGITS, jnp.array([tokens]), jnp.int32(step))
        return np.asarray(out)[0].tolist()

    def test_a_penalty_counts_prompt_and_answer_without_padding(self):
        values = {"repetition_penalty": 2.0}
        assert self.run(values, [9, 9]) == [4, 1, -2, 1]
        assert self.run(values, [2, 9], 1) == [4, 1, -4, 1]

    def test_no_pair_comes_twice(self):
        values = {"no_repeat_ngram_size": 2}
        # The pad token of the caller, 0, counts; the column that fills up does not.
        assert self.run(values, [0, 2], 1) == [4, -np.inf, -2, 1]
        assert self.run({"no_repeat_ngram_size": 1}, [9, 9]) == [-np.inf, -np.inf, -2, 1]

    def test_sequences_longer_than_the_text_ban_nothing(self):
        for size in (3, 4, 5, 9):
            assert self.run({"no_repeat_ngram_size": size}, [1, 2], 1) == [4, 2, -2, 1]

    def test_without_values_there_are_no_rules(self):
        assert self.make({}) is None
        assert self.make({"min_length": 2}) is None  # the prompt is as long

    def test_the_token_after_a_single_one_is_forced(self):
        rules = self.make({"forced_bos_token_id": 2}, length=1)
        prompt = logits.read_prompt(rules, self.IDS, self.MASK, 4)
        out = process(rules, prompt, self.LOGITS, jnp.array([[0, 0]]), jnp.int32(0))
        np.testing.assert_array_equal(out[0], [-np.inf, -np.inf, 0, -np.inf])
        assert self.make({"forced_bos_token_id": 2}) is None

    def test_tokens_outside_the_vocabulary(self):
        for values in (
            {"bad_words_ids": [[1, 4]]},
            {"forced_eos_token_id": 4},
            {"suppress_tokens": [0, 4]},
            {"begin_suppress_tokens": [4]},
        ):
            with helpers.raises_line(ValueError, "contains token 4, but the vocabulary has 4"):
                self.make(values)
