"""generation_config.json: which values apply, which are refused, which are ignored."""

import json
import shutil

import jax
import pytest
import transformers

import ports
from ports.decoding import generation_config

from .. import helpers


@pytest.mark.parametrize(
    "values",
    [
        transformers.GenerationConfig._get_default_generation_params(),
        {
            "chat_format": "chatml",
            "use_cache": False,
            "length_penalty": 2.0,
            "early_stopping": True,
        },
        {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.001},
        {"num_beams": None, "stop_strings": None, "guidance_scale": 1},
    ],
    ids=["transformers' defaults", "what changes no token", "of samples", "null"],
)
def test_what_changes_no_greedy_token_passes(values):
    assert generation_config.changing_logits(values) == {}


def test_what_changes_tokens_by_hand():
    values = {"repetition_penalty": 1.05, "min_length": 0, "suppress_tokens": [7], "top_k": 1}
    assert generation_config.changing_logits(values) == {
        "repetition_penalty": 1.05,
        "suppress_tokens": [7],
    }
    assert generation_config.of_sampling(values) == {"top_k": 1, "top_p": None}
    # What transformers takes where nothing says another.
    assert generation_config.of_sampling({"top_p": 0.5}) == {"top_k": 50, "top_p": 0.5}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_beams", 4),
        ("num_return_sequences", 2),
        ("penalty_alpha", 0.6),
        ("guidance_scale", 1.5),
        ("constraints", [1]),
        ("force_words_ids", [[3]]),
        ("watermarking_config", {"bias": 2.0}),
        ("stop_strings", ["."]),
        ("max_time", 3.0),
        ("encoder_repetition_penalty", 1.2),
        ("forced_decoder_ids", [[1, 5]]),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(small, key, value):
    vlm = small.vlm.with_generation_config({key: value})
    with helpers.raises_line(
        ValueError, f"{key} is {value!r}, which is not implemented", "--ignore-generation-config"
    ):
        vlm.generate(helpers.make_inputs([0], [3]), max_new_tokens=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"repetition_penalty": "a"}, "repetition_penalty is 'a'; expected a number above 0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; expected a number above 0"),
        ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size is 1.5; expected a whole number"),
        ({"bad_words_ids": [5]}, "bad_words_ids is [5]; expected a list of lists"),
        ({"bad_words_ids": [[]]}, "bad_words_ids is [[]]; expected a list of lists"),
        ({"suppress_tokens": [-1]}, "suppress_tokens is [-1]; expected a list of token ids"),
        ({"sequence_bias": [[3, 1.0]]}, "sequence_bias is [[3, 1.0]]; expected a list of"),
        (
            {"suppress_tokens": [5, 6], "forced_eos_token_id": [5]},
            "forced_eos_token_id is [5], which suppress_tokens forbids",
        ),
    ],
    ids=str,
)
def test_values_that_cannot_be(values, message):
    with helpers.raises_line(ValueError, message):
        generation_config.changing_logits(values)


def test_samples_that_cannot_be(small):
    with helpers.raises_line(ValueError, "top_h is 0.4, which is not implemented"):
        generation_config.of_sampling({"top_h": 0.4})
    with helpers.raises_line(ValueError, "temperature is 0; expected a number above 0"):
        small.vlm.with_generation_config({"temperature": 0}).sampling(jax.random.key(0))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("temperature", 0.0, "a number above 0"),
        ("top_p", 1.5, "a number from 0 to 1"),
        ("top_k", -1, "a whole number"),
        ("top_h", 0.4, "null"),
    ],
)
def test_samples_that_cannot_be_are_refused_before_any_is_drawn(key, value, expected):
    with helpers.raises_line(ValueError, f"{key} is {value}", f"expected {expected}"):
        generation_config.changing_logits({"do_sample": True, key: value})
    assert generation_config.changing_logits({"do_sample": False, key: value}) == {}


class TestLoading:
    def test_values_of_the_file_and_of_the_caller(self, small, tmp_path):
        directory = shutil.copytree(small.directory, tmp_path / "checkpoint")
        file = directory / "generation_config.json"
        file.write_text(json.dumps({"repetition_penalty": 1.2, "eos_token_id": 5, "num_beams": 2}))
        loaded = ports.load_abstract(directory)
        assert loaded.generation_config["repetition_penalty"] == 1.2
        with helpers.raises_line(ValueError, "num_beams is 2"):
            _ = loaded.logits_options
        left_out = ports.load(directory, generation_config={})
        assert (left_out.logits_options, left_out.eos_tokens) == ({}, (5,))
        other = left_out.with_generation_config({"min_new_tokens": 2, "eos_token_id": [6, 7]})
        assert (other.logits_options, other.eos_tokens) == ({"min_new_tokens": 2}, (6, 7))
        assert other.params is left_out.params

    @pytest.mark.parametrize("where", ["at the top", "in text_config"])
    def test_values_that_old_checkpoints_keep_in_the_configuration(self, small, tmp_path, where):
        directory = shutil.copytree(small.directory, tmp_path / "checkpoint")
        (directory / "generation_config.json").unlink()
        config = json.loads((directory / "config.json").read_text())
        part = config if where == "at the top" else config["text_config"]
        part |= {"repetition_penalty": 1.3, "top_k": 50, "num_beams": 1}
        (directory / "config.json").write_text(json.dumps(config))
        assert ports.load_abstract(directory).logits_options == {"repetition_penalty": 1.3}
        theirs = transformers.LlavaForConditionalGeneration.from_pretrained(directory)
        assert theirs.generation_config.repetition_penalty == 1.3

    def test_ends_that_old_checkpoints_keep_in_the_configuration(self, small, tmp_path):
        directory = shutil.copytree(small.directory, tmp_path / "checkpoint")
        (directory / "generation_config.json").unlink()
        config = json.loads((directory / "config.json").read_text())
        config["text_config"]["eos_token_id"] = 9
        for top, expected in (({}, (9,)), ({"eos_token_id": [5, 7], "pad_token_id": 4}, (5, 7))):
            (directory / "config.json").write_text(json.dumps({**config, **top}))
            loaded = ports.load_abstract(directory)
            assert loaded.eos_tokens == expected
            assert loaded.with_generation_config({"top_k": 3}).eos_tokens == expected
            theirs = transformers.GenerationConfig.from_pretrained(
                directory, config_file_name="config.json", _from_model_config=True
            )
            assert theirs.eos_token_id == top.get("eos_token_id", 9)
        assert loaded.pad_token == theirs.pad_token_id == 4

    def test_a_misspelt_key(self, small):
        with helpers.raises_line(
            ValueError, "generation_config has no 'repetition_penality'", "repetition_penalty"
        ):
            small.vlm.with_generation_config({"repetition_penality": 1.1})
