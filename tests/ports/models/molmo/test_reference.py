"""Molmo against functional PyTorch: every site, the logits, 32 greedy tokens; loading from files in
the layout of the hub.
"""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

import ports

from ... import helpers, molmo_helpers
from ...molmo_helpers import CONFIG, PROMPTS, VARIANTS, greedy, make_inputs, reference, rows

DATA = Path(__file__).parents[3] / "data" / "molmo"
MIXED = "padded on the left, three, no and two crops"
CASES = [
    *(("grouped queries", prompt) for prompt in PROMPTS),
    *((variant, MIXED) for variant in list(VARIANTS)[1:]),
]
parametrize_cases = pytest.mark.parametrize(
    ("variant", "prompt"), CASES, ids=[": ".join(case) for case in CASES]
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable:
    """made(variant) returns the configuration, PyTorch's weights and the port's model."""
    known = {}

    def get(variant: str):
        if variant not in known:
            config = {**CONFIG, **VARIANTS[variant]}
            directory = tmp_path_factory.mktemp("checkpoint")
            molmo_helpers.make_checkpoint(directory, config)
            weights = molmo_helpers.read_weights(directory)
            known[variant] = (config, weights, ports.load(directory))
        return known[variant]

    return get


@pytest.mark.parametrize("case", range(3))
def test_the_reference_computes_what_the_original_does(case):
    expected = np.load(DATA / "expected.npz")
    config = json.loads((DATA / "config.json").read_text())
    names = ("input_ids", "images", "image_masks", "image_input_idx")
    arrays = [expected[f"{case}.{name}"] for name in names]
    logits, states = reference(config, molmo_helpers.read_weights(DATA), *arrays)
    np.testing.assert_allclose(logits, expected[f"{case}.logits"], rtol=0, atol=1e-4)
    prefix = f"{case}.states."
    sites = [name.removeprefix(prefix) for name in expected if name.startswith(prefix)]
    assert len(sites) == 5
    for site in sites:
        assert helpers.relative_error(states[site], expected[prefix + site][0]) < 1e-5


@parametrize_cases
def test_every_site_and_the_logits_equal_pytorchs(made, variant, prompt):
    config, weights, vlm = made(variant)
    inputs = make_inputs(config, *PROMPTS[prompt])
    sites = [
        site
        for site in vlm.sites
        if site.startswith("model.transformer")
        or ("images" in inputs and "image_pooling_2d" not in site)
    ]
    ours = vlm.forward(inputs, sites=sites)
    for i, row in enumerate(rows(inputs)):
        logits, states = reference(config, weights, **row)
        length, crops = len(row["ids"]), len(row.get("images", ()))
        np.testing.assert_allclose(ours.logits[i, -length:], logits, rtol=0, atol=1e-4)
        for site in sites:
            if site.startswith("model.transformer"):
                error = helpers.relative_error(ours.states[site][i, -length:], states[site])
            elif crops:
                # The tower sees the crops of all rows one after the other, filled up alike.
                values = np.asarray(ours.states[site])
                values = values.reshape(len(inputs["input_ids"]), -1, *states[site].shape[1:])
                error = helpers.relative_error(values[i, :crops], states[site])
            assert error < 1e-5, site


def test_edits_of_heads_equal_pytorchs(made):
    config, weights, vlm = made("grouped queries")
    inputs = make_inputs(config, *PROMPTS[MIXED])
    heads = "model.transformer.blocks.0.heads"
    vector = np.random.default_rng(4).standard_normal(vlm.site_shapes[heads][-1], np.float32)
    ours = vlm.forward(inputs, edits={heads: ports.add(vector)}).logits
    for i, row in enumerate(rows(inputs)):
        logits, _ = reference(config, weights, **row, to_heads={heads: vector})
        np.testing.assert_allclose(ours[i, -len(logits) :], logits, rtol=0, atol=1e-4)


def test_apply_takes_the_processors_arrays_as_they_are(made):
    config, weights, vlm = made("grouped queries")
    inputs = make_inputs(config, *PROMPTS[MIXED])
    ours = jax.jit(vlm.apply)(vlm.params, inputs)
    for i, row in enumerate(rows(inputs)):
        logits, _ = reference(config, weights, **row)
        np.testing.assert_allclose(ours[i, -len(logits) :], logits, rtol=0, atol=1e-4)


@parametrize_cases
def test_32_greedy_tokens_equal_pytorchs(made, variant, prompt):
    config, weights, vlm = made(variant)
    inputs = make_inputs(config, *PROMPTS[prompt])
    tokens = vlm.generate(inputs, max_new_tokens=32).tokens
    expected = [greedy(config, weights, row, 32) for row in rows(inputs)]
    np.testing.assert_array_equal(tokens, expected)


def test_padding_on_either_side_gives_the_same_answers(made):
    config, _, vlm = made("grouped queries")
    left = make_inputs(config, *PROMPTS[MIXED])
    right = helpers.pad_right(left)
    padding = (left["attention_mask"] == 0).sum(1)[:, None, None]
    places = left["image_input_idx"]
    right["image_input_idx"] = np.where(places < 0, places, places - padding)
    expected, answers = (vlm.generate(x, max_new_tokens=8).tokens for x in (left, right))
    np.testing.assert_array_equal(answers, expected)


class TestFilesOfTheHub:
    """config.json and tokenizer_config.json name classes in adjacent code, which is not run."""

    @pytest.fixture(params=["vocab.json and merges.txt", "tokenizer.json"])
    def directory(self, request, tmp_path):
        auto_map = {"AutoConfig": "config_molmo.MolmoConfig"}
        config = {k: v for k, v in CONFIG.items() if "token_id" not in k}
        config |= {"auto_map": auto_map, "vocab_size": 258, "embedding_size": 258}
        config["eos_token_id"] = 257
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "config_molmo.py").write_text("raise SystemExit('remote code was run')")
        (tmp_path / "preprocessor_config.json").write_text(
            json.dumps(
                {
                    "auto_map": {"AutoProcessor": "preprocessing_molmo.MolmoProcessor"},
                    "base_image_input_size": [42, 42],
                    "image_patch_size": 7,
                    "image_token_length_h": 3,
                    "image_token_length_w": 3,
                    "max_crops": 2,
                    "overlap_margins": [2, 2],
                    "image_mean": [0.5, 0.5, 0.5],
                    "image_std": [0.5, 0.5, 0.5],
                }
            )
        )
        letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {letter: i for i, letter in enumerate(letters)} | {"Us": 256}
        special = ["<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>"]
        added = {"<|endoftext|>": 257} | {name: 258 + i for i, name in enumerate(special)}
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        decoder = {str(i): {"content": name, "special": True, **flags} for name, i in added.items()}
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(
                {
                    "added_tokens_decoder": decoder,
                    "auto_map": {"AutoProcessor": "preprocessing_molmo.MolmoProcessor"},
                    "bos_token": None,
                    "eos_token": "<|endoftext|>",
                    "pad_token": "<|endoftext|>",
                    "tokenizer_class": "Qwen2Tokenizer",
                }
            )
        )
        if request.param == "tokenizer.json":
            bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("U", "s")]))
            bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            bpe.decoder = tokenizers.decoders.ByteLevel()
            bpe.save(str(tmp_path / "tokenizer.json"))
        else:
            (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
            (tmp_path / "merges.txt").write_text("#version: 0.2\nU s\n")
        return tmp_path

    def test_load_without_remote_code(self, directory, monkeypatch):
        monkeypatch.setattr("builtins.input", lambda *_: "y")  # to any question
        vlm = ports.load_abstract(directory)
        tokenizer, processor = vlm.tokenizer, vlm.processor
        assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
        assert processor.token_ids == {"start": 258, "end": 259, "patch": 260, "col": 261}
        assert vlm.image_tokens == (260, 261, 258, 259)  # config.json says none
        assert processor.start_token == tokenizer.eos_token_id
        ids = processor(text=[" User: hi"])["input_ids"][0].tolist()
        assert tokenizer.decode(ids[1:]) == " User: hi"
        assert 256 in ids

    def test_a_tokenizer_without_the_tokens_of_images_is_refused(self, directory):
        for name in ("vocab.json", "merges.txt", "tokenizer.json"):
            (directory / name).unlink(missing_ok=True)
        helpers.make_tokenizer([], {}).save_pretrained(directory)
        with helpers.raises_line(ValueError, "has no <im_patch>"):
            _ = ports.load_abstract(directory).processor


def test_two_features_at_one_position_are_refused(made):
    config, _, vlm = made("grouped queries")
    inputs = make_inputs(config, [2], [4])
    places = inputs["image_input_idx"].reshape(-1)  # a view
    count = (places >= 0).sum()
    places[places < 0] = places.max()
    with helpers.raises_line(ValueError, f"maps {len(places)} features to {count} positions"):
        vlm.forward(inputs)
