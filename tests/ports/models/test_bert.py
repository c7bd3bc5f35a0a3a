"""BERT and RoBERTa against transformers."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import torch

from ports.models import bert, clip

from .. import bert_helpers, helpers

KINDS = ("bert", "roberta")
TEXTS = ["two dogs on the beach", "a cat", "the small red bus runs at the station and sits"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Returns kind -> (PyTorch's model, ours)."""
    made = {}
    for kind in KINDS:
        directory = tmp_path_factory.mktemp(kind)
        made[kind] = bert_helpers.make_bert(directory, kind), bert.load_text_encoder(directory)
    return made


def tokens(encoder, texts=TEXTS):
    inputs = encoder.tokenizer(texts, padding=True, return_tensors="np")
    return inputs["input_ids"], inputs["attention_mask"]


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_every_layer_equal_transformers(pairs, kind):
    model, ours = pairs[kind]
    ids, mask = tokens(ours)
    with torch.no_grad():
        inputs = helpers.to_torch({"input_ids": ids, "attention_mask": mask})
        theirs = model(**inputs, output_hidden_states=True).hidden_states
    for layer, states in enumerate(theirs):
        found = np.asarray(ours.states(ids, mask, layer))
        there = mask.astype(bool)
        np.testing.assert_allclose(found[there], states.numpy()[there], rtol=0, atol=1e-5)


def test_embeddings_by_hand(pairs):
    _, ours = pairs["bert"]
    tables = ours.params["embeddings"]
    ids = np.array([[2, 7, 3]])
    x = tables["word_embeddings"]["embedding"][ids[0]]
    x = x + tables["position_embeddings"]["embedding"][:3]
    x = np.asarray(x + tables["token_type_embeddings"]["embedding"][0])
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-12)
    x = x * tables["LayerNorm"]["scale"] + tables["LayerNorm"]["bias"]
    found = ours.states(ids, np.ones_like(ids), 0)[0]
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-5)


def test_padding_changes_no_state(pairs):
    for _, ours in pairs.values():
        ids, mask = tokens(ours)
        short_ids, short_mask = tokens(ours, TEXTS[1:2])
        length = short_ids.shape[1]
        padded = ours.states(ids, mask, 2)[1, :length]
        short = ours.states(short_ids, short_mask, 2)[0]
        np.testing.assert_allclose(padded, short, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_without_learnt_positions(pairs, kind):
    _, ours = pairs[kind]
    longest = ours.config.max_length
    ids = np.full((1, longest + 1), 7)
    with helpers.raises_line(
        ValueError, f"texts have {longest + 1} tokens; expected at most {longest}: truncate them"
    ):
        ours.states(ids, np.ones_like(ids), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_a_head_loads_without_it(tmp_path, kind):
    model = bert_helpers.make_bert(tmp_path, kind, head=True)
    ours = bert.load_text_encoder(tmp_path)
    ids, mask = tokens(ours)
    with torch.no_grad():
        body = getattr(model, kind)
        theirs = body(**helpers.to_torch({"input_ids": ids, "attention_mask": mask}))
    there = mask.astype(bool)
    found = np.asarray(ours.states(ids, mask, 3))[there]
    np.testing.assert_allclose(found, theirs.last_hidden_state.numpy()[there], rtol=0, atol=1e-5)


def test_norms_under_their_old_names(tmp_path, pairs):
    _, ours = pairs["bert"]
    shutil.copytree(ours.directory, tmp_path / "old")
    file = tmp_path / "old" / "model.safetensors"
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    stored = {}
    for name, value in safetensors.numpy.load_file(file).items():
        for new, old in names.items():
            name = name.replace(new, old)
        stored[name] = value
    safetensors.numpy.save_file(stored, file)
    again = bert.load(tmp_path / "old")  # the name in earlier releases
    ids, mask = tokens(ours)
    np.testing.assert_array_equal(again.states(ids, mask, 3), ours.states(ids, mask, 3))


def test_layers_and_dtypes_that_there_are_not(pairs, tmp_path):
    _, ours = pairs["bert"]
    ids = np.ones((1, 3), int)
    for layer in (-1, ours.config.num_layers + 1):
        with helpers.raises_line(ValueError, f"layer is {layer}; expected 0 to"):
            ours.states(ids, ids, layer)
    for load in (bert.load_text_encoder, clip.load_dual_encoder):
        with helpers.raises_line(ValueError, "dtype is 'fp16'; expected one of float32, bfloat16"):
            load(tmp_path, dtype="fp16")


def test_another_kind_of_model_is_refused(small):
    expected = "model_type 'llava' is not supported; supported: bert, roberta"
    with helpers.raises_line(ValueError, expected):
        bert.load_text_encoder(small.directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_decoder": True}, "config.is_decoder is true; this port implements encoders only"),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type is 'relative_key'; expected 'absolute'",
        ),
        ({"hidden_act": "gelu_new"}, "config has activation 'gelu_new'"),
        ({"num_attention_heads": 4}, "hidden_size 30 of the bert is not a multiple of its 4"),
        ({"num_hidden_layers": 4}, "16 missing: encoder.layer.3.attention.output.LayerNorm.bias"),
    ],
)
def test_what_the_port_does_not_implement_is_refused_by_name(tmp_path, pairs, changes, message):
    shutil.copytree(pairs["bert"][1].directory, tmp_path / "changed")
    file = tmp_path / "changed" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with helpers.raises_line(ValueError, message):
        bert.load_text_encoder(tmp_path / "changed")


def test_a_missing_tokenizer_is_one_line(tmp_path, pairs):
    directory = tmp_path / "bare"
    shutil.copytree(pairs["bert"][1].directory, directory)
    for file in directory.glob("*tok*"):
        file.unlink()
    (directory / "vocab.txt").unlink()
    with helpers.raises_line(FileNotFoundError, f"{directory} has no tokenizer; expected one of"):
        bert.load_text_encoder(directory).tokenizer  # noqa: B018
