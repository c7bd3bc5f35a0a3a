"""Models of text alone, against transformers."""

import numpy as np
import pytest
import torch
import transformers

import ports
from ports.inputs import prompts

from .. import helpers
from ..helpers import VOCABULARY, make_pair, make_tokenizer

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=6),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=8),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """A small checkpoint of transformers, and the port's model of it."""
    directory = tmp_path_factory.mktemp(request.param)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param])
    made = make_pair(directory, model)
    make_tokenizer(["safe"], {}).save_pretrained(directory)
    return made.torch_model, ports.load_text(directory)


@pytest.fixture
def inputs():
    ids = np.random.default_rng(0).integers(4, VOCABULARY, (3, 14)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, :5] = ids[1, :5] = 0  # rows are padded on the left
    return {"input_ids": ids, "attention_mask": mask}


def test_logits_are_those_of_transformers(pair, inputs):
    theirs, ours = pair
    with torch.no_grad():
        tensors = {name: torch.from_numpy(x).long() for name, x in inputs.items()}
        positions = (tensors["attention_mask"].cumsum(1) - 1).clamp(min=0)
        expected = theirs(**tensors, position_ids=positions).logits.numpy()
    real = inputs["attention_mask"] == 1
    got = np.asarray(ours.forward(inputs).logits)
    np.testing.assert_allclose(got[real], expected[real], rtol=0, atol=1e-4)
    assert np.abs(expected[real]).max() > 0.5


def test_greedy_tokens_are_those_of_transformers(pair, inputs):
    theirs, ours = pair
    with torch.no_grad():
        tensors = {name: torch.from_numpy(x).long() for name, x in inputs.items()}
        expected = theirs.generate(**tensors, max_new_tokens=9, do_sample=False)[:, 14:].numpy()
    got = np.asarray(ours.generate(inputs, max_new_tokens=9).tokens)
    assert got[:, : expected.shape[1]].tolist() == expected.tolist()
    assert len(np.unique(got)) > 3


@pytest.mark.parametrize("pair", ["qwen3"], indirect=True)
def test_states_of_single_heads_while_generating(pair, inputs):
    """Norms of queries put out [B, T, H, C]."""
    _, ours = pair
    site, count = "model.layers.1.self_attn.q_norm", 3
    right = helpers.pad_right(inputs)
    answer = ours.generate(right, max_new_tokens=count, sites=[site], prompt_states=True)
    tokens = np.asarray(answer.tokens)
    assert (tokens != 2).all()
    whole = {
        "input_ids": np.concatenate([inputs["input_ids"], tokens], axis=1),
        "attention_mask": np.pad(inputs["attention_mask"], ((0, 0), (0, count)), constant_values=1),
    }
    expected = np.asarray(ours.forward(whole, sites=[site]).states[site])
    assert expected.shape == (3, 14 + count, 4, 8)
    np.testing.assert_allclose(answer.states[site], expected[:, 13:-1], rtol=0, atol=1e-4)
    got = np.asarray(answer.prompt_states[site])[right["attention_mask"] == 1]
    real = whole["attention_mask"][:, :14] == 1
    np.testing.assert_allclose(got, expected[:, :14][real], rtol=0, atol=1e-4)
    vector = np.zeros(ours.site_shapes[ours.layers[0]][-1])
    swept = ours.sweep(
        inputs, [{ours.layers[0]: ports.add(vector)}] * 2, max_new_tokens=count, sites=[site]
    )
    assert swept.states[site].shape == (2, *answer.states[site].shape)
    np.testing.assert_allclose(swept.states[site][1], answer.states[site], rtol=0, atol=1e-4)


class TestEditsOfSingleHeads:
    """Norms of queries put out [B, T, H, C]; positions are those of tokens, not of heads."""

    SITE = "model.layers.0.self_attn.q_norm"
    VECTOR = np.linspace(-1, 1, 8, dtype=np.float32)

    @pytest.fixture(scope="class")
    def places(self):
        """Returns the index of each token of `inputs`; the second row has 5 of padding."""
        index = np.tile(np.arange(14), (3, 1))
        index[1] -= 5
        return index

    def logits(self, theirs, inputs, change):
        """Returns the logits of transformers, where a function changes the norm's output."""
        tensors = {name: torch.from_numpy(x).long() for name, x in inputs.items()}
        positions = (tensors["attention_mask"].cumsum(1) - 1).clamp(min=0)
        norm = theirs.model.layers[0].self_attn.q_norm
        handle = norm.register_forward_hook(
            lambda *args: torch.from_numpy(change(args[-1].numpy()).astype("f4"))
        )
        with torch.no_grad():
            found = theirs(**tensors, position_ids=positions).logits.numpy()
        handle.remove()
        return found[inputs["attention_mask"] == 1]

    def right(self, values):
        """Moves the second row's padding to the end."""
        return np.stack([np.roll(row, -5 * (i == 1), axis=0) for i, row in enumerate(values)])

    def edited(self, ours, inputs, edit):
        right = helpers.pad_right(inputs)
        logits = ours.forward(right, edits={self.SITE: edit}).logits
        return np.asarray(logits)[right["attention_mask"] == 1]

    @pytest.mark.parametrize("pair", ["qwen3"], indirect=True)
    @pytest.mark.parametrize("where", ["from", "at", "mask", "last_prompt", "rows"])
    def test_a_vector_at_some_positions(self, pair, inputs, places, where):
        theirs, ours = pair
        real = inputs["attention_mask"] == 1
        mask = (places % 3 == 1) & real
        chosen, given = {
            "from": (places >= 3, {"from": 3}),
            "at": (np.isin(places, (2, 6)), {"at": [2, 6]}),
            "mask": (mask, self.right(mask)),
            "last_prompt": (places == places[:, -1:], "last_prompt"),
            "rows": (np.array([[True], [False], [True]]) & real, np.array([True, False, True])),
        }[where]
        expected = self.logits(
            theirs, inputs, lambda x: x + 2 * chosen[..., None, None] * self.VECTOR
        )
        plain = self.logits(theirs, inputs, lambda x: x)
        assert np.abs(expected - plain).max() > 1e-2
        got = self.edited(ours, inputs, ports.add(self.VECTOR, 2.0, given))
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("pair", ["qwen3"], indirect=True)
    @pytest.mark.parametrize("shape", [(3, 14, 8), (3, 14, 4, 8), (1, 14, 1, 8), (3, 8)])
    def test_vectors_of_positions_rows_and_heads(self, pair, inputs, shape):
        theirs, ours = pair
        vectors = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        between = {3: np.s_[:, :, None], 4: np.s_[:], 2: np.s_[:, None, None]}[len(shape)]
        expected = self.logits(
            theirs, inputs, lambda x: np.broadcast_to(vectors[between], x.shape).copy()
        )
        if len(shape) > 2:
            vectors = self.right(np.broadcast_to(vectors, (3, *shape[1:])))
        got = self.edited(ours, inputs, ports.replace(vectors))
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("pair", ["qwen3"], indirect=True)
    def test_while_generating_and_by_a_function(self, pair, inputs):
        _, ours = pair
        options = {"max_new_tokens": 2, "sites": [self.SITE], "prompt_states": True}

        def shifted(x, places):
            assert x.shape[2:] == (4, 8) and places.kind.shape == x.shape[:2]
            return x + places.index[..., None, None] * self.VECTOR

        def states(edit):
            answer = ours.generate(inputs, edits={self.SITE: edit} if edit else {}, **options)
            return np.asarray(answer.prompt_states[self.SITE]), np.asarray(answer.states[self.SITE])

        real = inputs["attention_mask"] == 1
        (before, plain), (after, _) = states(None), states(ports.edit_with(shifted))
        index = np.cumsum(inputs["attention_mask"], axis=1) - 1
        expected = before + index[..., None, None] * self.VECTOR
        np.testing.assert_allclose(after[real], expected[real], rtol=0, atol=1e-4)
        prompt, generated = states(ports.add(self.VECTOR, 9.0, "generated"))
        np.testing.assert_allclose(prompt[real], before[real], rtol=0, atol=1e-4)
        expected = plain + 9 * np.array([[0], [1]])[..., None] * self.VECTOR
        np.testing.assert_allclose(generated, expected, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("pair", ["qwen3"], indirect=True)
    def test_what_needs_one_state_per_token_refuses_the_site(self, pair):
        _, ours = pair
        with pytest.raises(
            ValueError, match=r"q_norm' has a state for each of 4 heads; choose a s"
        ):
            ours.find_site(self.SITE, generated=True, one_state=True)
        assert ours.find_site(self.SITE) == self.SITE
        assert len(ours.check_sites("*.heads", one_state=True)) == 2  # [B, T, H * C]

    @pytest.mark.parametrize("pair", ["qwen3"], indirect=True)
    def test_what_does_not_fit(self, pair, inputs):
        _, ours = pair
        for edit, message in (
            (
                ports.replace(np.zeros((3, 14, 3, 8))),
                r", 3, 8\); the states at .*, 4, 8\): expected",
            ),
            (ports.add(np.zeros((3, 4, 8))), r"expected \(3, 14, D\), one per position of input"),
            (ports.add(np.zeros(32)), "width 32; the states at .* have width 8"),
        ):
            with pytest.raises(ValueError, match=message):
                ours.forward(inputs, edits={self.SITE: edit})


def test_no_pictures_and_other_model_types(pair, vlm, tmp_path):
    _, ours = pair
    assert ours.image_tokens == () and ours.decode([6, 7]) == "w1 w2"
    with pytest.raises(ValueError, match="a model of text without pictures; use its tokenizer"):
        ours.render("Is it safe?")
    with pytest.raises(ValueError, match="model_type 'llava' is not supported; supported: llama"):
        ports.load_text(vlm.directory)
    with pytest.raises(ValueError, match=r"'(llama|mistral|qwen3)' is not supported; supported"):
        ports.load(ours.directory)


TEXTS = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} {% endfor %}[assistant]"
PARTS = TEXTS.replace("m.content", "m.content[0].text")
FORGETFUL = "{{ messages[-1].content }}[assistant]"
CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": " w3 "}]


@pytest.mark.parametrize("template", [TEXTS, PARTS])
def test_chats_in_templates_of_texts_and_of_parts(template):
    tokenizer = make_tokenizer(["[user]", "[assistant]"], {})
    tokenizer.chat_template = template
    said = prompts.render_chat(tokenizer, CHAT, where="here")
    assert said == "[user] w1 w2 [assistant] w3 [assistant]"
    arrays = prompts.tokenize(tokenizer, [said, "w1 w2"])
    # No token begins or ends a text that is rendered already.
    assert tokenizer.decode(arrays["input_ids"][0]) == said
    assert arrays["attention_mask"].tolist() == [[1] * 6, [0] * 4 + [1] * 2]


def test_a_message_that_is_also_a_word_of_the_template():
    tokenizer = make_tokenizer([], {})
    loop = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    tokenizer.chat_template = f"No tools. {loop}[assistant]"
    said = prompts.render_chat(tokenizer, [{"role": "user", "content": "No"}], where="here")
    assert said == "No tools. No[assistant]"


def test_reasoning_of_earlier_turns_may_be_left_out():
    tokenizer = make_tokenizer([], {})
    tokenizer.chat_template = TEXTS.replace("m.content", "m.content.split('</think>')[-1]")
    earlier = {"role": "assistant", "content": "<think>w4</think> w3"}
    said = prompts.render_chat(tokenizer, [CHAT[0], earlier, CHAT[0]], where="here")
    assert said == "[user] w1 w2 [assistant] w3 [user] w1 w2 [assistant]"


def test_no_prompts():
    with pytest.raises(ValueError, match="got no prompts; expected one or more"):
        prompts.tokenize(make_tokenizer([], {}), [])


def test_chats_that_a_template_does_not_hold():
    tokenizer = make_tokenizer([], {})
    with pytest.raises(ValueError, match="here has no chat template; add that of the model's"):
        prompts.render_chat(tokenizer, CHAT, where="here")
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(ValueError, match=r"fails for this chat .it leaves out a message of role"):
        prompts.render_chat(tokenizer, CHAT, where="here")
    # Every reason, once.
    tokenizer.chat_template = "{{ messages[0].content.strip() }}"
    with pytest.raises(ValueError, match=r"role 'assistant'; UndefinedError: [^;]*$"):
        prompts.render_chat(tokenizer, CHAT, where="here")
