"""Generation: which state belongs to which token, how rows end, sampling, compiled programs."""

import copy
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ports
from ports import passes
from ports.inputs import padding

from .. import helpers

COUNT = 8
LAYER, HEAD = "language_model.model.layers.0", "language_model.lm_head"
SITES = (
    "language_model.model.embed_tokens",
    LAYER,
    "language_model.model.layers.1.mlp.down_proj",
    "language_model.model.norm",
    "language_model.model",
    HEAD,
)


@pytest.fixture(scope="module")
def batch():
    """Returns rows of different lengths, padded on the left, with two images, none and one."""
    return helpers.make_inputs([2, 0, 1], [4, 9, 8])


@pytest.fixture(scope="module")
def answer(small, batch):
    return small.vlm.generate(batch, max_new_tokens=COUNT, sites=SITES, prompt_states=True)


@pytest.fixture(scope="module")
def twins():
    """Returns two rows of different lengths with one image each, in the same bucket."""
    return helpers.make_inputs([1, 1], [3, 6])


@pytest.fixture(scope="module")
def greedy(small, twins):
    return np.asarray(small.vlm.generate(twins, max_new_tokens=COUNT).tokens)


class TestStates:
    """State m is the one from which token m was predicted."""

    @pytest.fixture(scope="class")
    def forced(self, small, batch, answer):
        """Returns a forward pass over the prompt and the generated tokens."""
        tokens = np.asarray(answer.tokens)
        extended = {
            **batch,
            "input_ids": np.concatenate([batch["input_ids"], tokens], 1),
            "attention_mask": np.pad(
                batch["attention_mask"], ((0, 0), (0, COUNT)), constant_values=1
            ),
        }
        return small.vlm.forward(extended, sites=SITES)

    @pytest.mark.parametrize("site", SITES)
    def test_equal_those_of_a_teacher_forced_pass(self, batch, answer, forced, site):
        start = batch["input_ids"].shape[1] - 1
        expected = forced.states[site][:, start : start + COUNT]
        assert answer.states[site].shape == expected.shape
        assert helpers.relative_error(answer.states[site], expected) < 1e-5

    @pytest.mark.parametrize("site", SITES[:-1])
    def test_of_the_prompt_equal_those_of_a_forward_pass(self, batch, answer, forced, site):
        length = batch["input_ids"].shape[1]
        assert answer.prompt_states[site].shape[:2] == batch["input_ids"].shape
        where = batch["attention_mask"] == 1
        ours, expected = answer.prompt_states[site], forced.states[site][:, :length]
        assert helpers.relative_error(ours, expected, where) < 1e-5

    def test_of_the_prompts_head_are_those_of_its_last_position(self, answer):
        np.testing.assert_array_equal(answer.prompt_states[HEAD][:, 0], answer.states[HEAD][:, 0])

    def test_equal_pytorchs_hidden_states(self, small, batch, answer):
        theirs = helpers.torch_generate(small.torch_model, batch, COUNT, output_hidden_states=True)
        # One entry a step; entry 0 of it is what enters layer 0.
        expected = np.stack([step[1][:, -1].numpy() for step in theirs.hidden_states], 1)
        assert helpers.relative_error(answer.states[LAYER], expected) < 1e-5

    def test_predict_the_tokens(self, small, answer):
        logits = answer.states[HEAD]
        np.testing.assert_array_equal(np.argmax(logits, -1), answer.tokens)
        unembedded = small.vlm.unembed(answer.states["language_model.model.norm"])
        np.testing.assert_allclose(unembedded, logits, rtol=0, atol=1e-4)

    def test_are_returned_only_for_the_requested_sites(self, small, twins, greedy):
        assert small.vlm.generate(twins, max_new_tokens=COUNT).states == {}

    def test_of_the_vision_tower_belong_to_no_token(self, small, twins):
        with helpers.raises_line(
            ValueError, "site 'multi_modal_projector' has no states for generated tokens", "forward"
        ):
            small.vlm.generate(twins, max_new_tokens=2, sites=["multi_modal_projector"])


class TestRows:
    def test_give_the_same_tokens_one_by_one(self, small, twins, greedy):
        for row in range(2):
            tokens = twins["attention_mask"][row] == 1
            alone = {
                "input_ids": twins["input_ids"][row : row + 1, tokens],
                "attention_mask": twins["attention_mask"][row : row + 1, tokens],
                "pixel_values": twins["pixel_values"][row : row + 1],
            }
            ours = small.vlm.generate(alone, max_new_tokens=COUNT).tokens
            np.testing.assert_array_equal(ours[0], greedy[row])

    def test_one_alone_copies_no_cache_at_each_step(self, small, twins):
        alone = {name: value[:1] for name, value in twins.items()}
        text = small.vlm.lower(alone, sites=(), max_new_tokens=COUNT).compile().as_text()
        sizes = small.vlm.sizes.text
        slots = padding.bucket_length(alone["input_ids"].shape[1]) + COUNT
        shapes = f"{sizes.head_dim},{slots}|{slots},{sizes.head_dim}"
        cache = rf"\[(?:1,)?{sizes.num_kv_heads},(?:{shapes})\]"
        assert re.search(cache, text)
        copies = re.findall(rf"{cache}\S* copy\(", text)
        assert len(copies) <= 2 * sizes.num_layers  # keys and values, once before the loop

    def test_may_be_padded_on_either_side(self, small, twins, greedy):
        right = helpers.pad_right(twins)
        assert (right["attention_mask"][:, 0] == 1).all()
        ours = small.vlm.generate(right, max_new_tokens=COUNT).tokens
        np.testing.assert_array_equal(ours, greedy)

    def test_end_by_themselves(self, small, twins, greedy):
        # The third token of the first row ends a row now.
        end = greedy[0, 2]
        ending = copy.copy(small.vlm)
        ending.eos_tokens, ending.pad_token = (int(end), 99), helpers.PAD
        ours = ending.generate(twins, max_new_tokens=COUNT, sites=[LAYER])
        expected = greedy.copy()
        ended = np.cumsum(greedy == end, 1) - (greedy == end) > 0
        expected[ended] = helpers.PAD
        assert ended[0, 3:].all() and not ended[0, :3].any()
        np.testing.assert_array_equal(ours.tokens, expected)
        # What ended predicts nothing.
        states = np.asarray(ours.states[LAYER])
        assert (states[ended] == 0).all() and (states[~ended] != 0).any(-1).all()

    def test_end_as_pytorchs_do(self, small, twins, greedy):
        end = int(greedy[0, 2])
        theirs = helpers.torch_generate(small.torch_model, twins, COUNT, eos_token_id=[end, 99])
        theirs = theirs.sequences[:, twins["input_ids"].shape[1] :].numpy()
        ended = np.cumsum(greedy == end, 1) - (greedy == end) > 0
        expected = np.where(ended, helpers.PAD, greedy)
        np.testing.assert_array_equal(theirs, expected[:, : theirs.shape[1]])


def test_logits_that_overflow_either_way_are_reported(small):
    """-Inf is no maximum: it must be found too."""
    inputs, vlm = helpers.make_inputs([0], [3]), copy.copy(small.vlm)
    layer = vlm.decoder + ".norm"
    final = np.asarray(vlm.forward(inputs, sites=[layer]).states[layer])[0, -1]
    head = dict(vlm.params["language_model"]["lm_head"])
    for sign in (1, -1):
        overflowing = sign * 3e38 * np.sign(final)
        kernel = head["kernel"].at[:, 5].set(overflowing)
        language = {**vlm.params["language_model"], "lm_head": {**head, "kernel": kernel}}
        vlm.params = {**small.vlm.params, "language_model": language}
        assert vlm.forward(inputs).logits[0, -1, 5] == sign * np.inf
        assert not vlm.generate(inputs, max_new_tokens=1).finite[0]
    assert small.vlm.generate(inputs, max_new_tokens=1).finite[0]


class TestLengths:
    def test_one_token_is_the_likeliest_after_the_prompt(self, small, twins):
        ours = small.vlm.generate(twins, max_new_tokens=1).tokens
        logits = small.vlm.forward(twins).logits[:, -1]
        assert ours.shape == (2, 1)
        np.testing.assert_array_equal(ours[:, 0], np.argmax(logits, -1))

    def test_no_token_at_all_is_refused(self, small, twins):
        with helpers.raises_line(ValueError, "max_new_tokens is 0; expected a whole number >= 1"):
            small.vlm.generate(twins, max_new_tokens=0)

    def test_a_handful_of_programs_serves_prompts_of_all_lengths(self, small):
        before = passes.generate._cache_size()
        for length in range(1, 32):
            small.vlm.generate(helpers.make_inputs([0], [length]), max_new_tokens=2)
        # Buckets of 16 and 32 positions.
        assert passes.generate._cache_size() - before == 2


class TestSampling:
    KEY = jax.random.key(0)

    def answer(self, pair, inputs, key=KEY, temperature=1.0, top_p=1.0):
        sampling = ports.Sampling(key, jnp.float32(temperature), jnp.float32(top_p))
        return np.asarray(pair.vlm.generate(inputs, max_new_tokens=COUNT, sampling=sampling).tokens)

    def test_cold_is_greedy(self, small, twins, greedy):
        ours = self.answer(small, twins, temperature=1e-4)
        np.testing.assert_array_equal(ours, greedy)

    def test_of_the_smallest_nucleus_is_greedy(self, small, twins, greedy):
        np.testing.assert_array_equal(self.answer(small, twins, top_p=1e-6), greedy)

    def test_is_reproducible_by_its_key(self, small, twins):
        first = self.answer(small, twins, temperature=2.0)
        np.testing.assert_array_equal(first, self.answer(small, twins, temperature=2.0))
        other = self.answer(small, twins, jax.random.key(1), temperature=2.0)
        assert (first != other).any()

    def test_of_a_model_follows_its_logits(self, small):
        rows = 1000
        prompt = helpers.make_inputs([0], [9])
        many = {name: value.repeat(rows, 0) for name, value in prompt.items()}
        sampling = ports.Sampling(self.KEY, jnp.float32(2.0))
        tokens = small.vlm.generate(many, max_new_tokens=1, sampling=sampling).tokens[:, 0]
        share = np.bincount(tokens, minlength=helpers.VOCABULARY) / rows
        expected = np.asarray(jax.nn.softmax(small.vlm.forward(prompt).logits[0, -1] / 2))
        assert (np.abs(share - expected) <= 5 * np.sqrt(expected / rows) + 1 / rows).all()
