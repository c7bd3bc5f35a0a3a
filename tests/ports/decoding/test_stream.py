"""Answers token by token are those of `generate`, and end where the caller leaves."""

import numpy as np
import pytest

import ports
from ports.decoding import stream

from .. import helpers, molmo_helpers, qwen2_vl_helpers

COUNT = 6
SITE = "language_model.model.layers.0"


@pytest.fixture(scope="module")
def batch():
    """Returns rows of different lengths, padded on the left, with two images, none and one."""
    return helpers.make_inputs([2, 0, 1], [4, 9, 8])


def answered(vlm, batch, **options):
    steps = list(vlm.stream(batch, max_new_tokens=COUNT, **options))
    return np.stack([step.tokens for step in steps], axis=1), steps


def added(vlm, alpha):
    vector = np.random.default_rng(0).standard_normal(vlm.config.get_text_config().hidden_size)
    return {SITE: ports.add(vector, alpha, where="predicting")}


def test_tokens_are_those_of_generate(small, batch):
    edits = added(small.vlm, 3.0)
    tokens, steps = answered(small.vlm, batch, edits=edits)
    expected = small.vlm.generate(batch, max_new_tokens=COUNT, edits=edits).tokens
    np.testing.assert_array_equal(tokens, np.asarray(expected)[:, : tokens.shape[1]])
    plain, _ = answered(small.vlm, batch, edits=added(small.vlm, 0.0))
    assert (tokens != plain).any()
    # The logits of each step are those that its token was chosen from.
    for m, step in enumerate(steps):
        np.testing.assert_array_equal(np.argmax(step.logits, -1), tokens[:, m])


def test_rules_and_ends_are_those_of_the_checkpoint(small, batch):
    """A third of all tokens end a row; without its rules, the small model repeats itself."""
    ends = list(range(0, small.vlm.module.num_embeddings, 3))
    values = {"eos_token_id": ends, "pad_token_id": 1, "repetition_penalty": 3.0}
    vlm = small.vlm.with_generation_config(values | {"no_repeat_ngram_size": 1})
    tokens, _ = answered(vlm, batch)
    expected = np.asarray(vlm.generate(batch, max_new_tokens=COUNT).tokens)
    np.testing.assert_array_equal(tokens, expected[:, : tokens.shape[1]])
    lengths = [next((m for m, t in enumerate(r) if t in ends), COUNT) + 1 for r in tokens.tolist()]
    assert tokens.shape[1] == min(max(lengths), COUNT) and min(lengths) < tokens.shape[1]


def test_leaving_the_loop_computes_no_further_token(small, batch, monkeypatch):
    calls = []
    proceed = stream.proceed
    monkeypatch.setattr(
        stream, "proceed", lambda *a, **named: calls.append(1) or proceed(*a, **named)
    )
    edits = added(small.vlm, 1.0)
    for number, _ in enumerate(small.vlm.stream(batch, max_new_tokens=COUNT, edits=edits)):
        if number == 2:
            break
    assert len(calls) == 2


def test_strengths_and_positions_compile_nothing_new(small, batch):
    width = small.vlm.config.get_text_config().hidden_size
    for where in ("all", "image", "generated"):
        edits = {SITE: ports.add(np.ones(width), alpha=float(len(where)), where=where)}
        list(small.vlm.stream(batch, max_new_tokens=COUNT, edits=edits))
        sizes = stream.begin._cache_size(), stream.proceed._cache_size()
        if where == "all":
            first = sizes
    assert sizes == first


def test_encoded_images_give_the_same_answer_and_spare_the_tower(small, batch):
    vlm, edits = small.vlm, added(small.vlm, 3.0)
    shown = {"pixel_values": batch["pixel_values"]}
    encoded = vlm.encode_images(helpers.make_inputs([2, 0, 1], [1, 1, 1]) | shown)
    tokens, steps = answered(vlm, batch, edits=edits)
    ours, same = answered(vlm, batch, edits=edits, images=encoded)
    np.testing.assert_array_equal(ours, tokens)
    for mine, theirs in zip(same, steps, strict=True):
        np.testing.assert_array_equal(mine.logits, theirs.logits)
    # The tower does not run: other pixels change nothing.
    other = batch | {"pixel_values": batch["pixel_values"][::-1]}
    assert (answered(vlm, other, edits=edits)[1][0].logits != steps[0].logits).any()
    again = answered(vlm, other, edits=edits, images=encoded)[1]
    np.testing.assert_array_equal(again[0].logits, steps[0].logits)
    with pytest.raises(ValueError, match=r"for \d+ image tokens, but the prompts hold"):
        next(vlm.stream(helpers.make_inputs([1], [4]), max_new_tokens=1, images=encoded))


def test_pixels_of_encoded_images_are_not_arguments_of_the_program(small, batch, monkeypatch):
    given, begin = [], stream.begin
    monkeypatch.setattr(
        stream, "begin", lambda *a, **more: given.append(set(a[2])) or begin(*a, **more)
    )
    for images in (None, small.vlm.encode_images(batch)):
        answered(small.vlm, batch, images=images)
    assert given[0] - given[1] == {"pixel_values"}
    assert given[1] - given[0] == {"image_states"}


@pytest.mark.parametrize(
    ("port", "dropped"),
    [("qwen2_vl", {"pixel_values"}), ("molmo", {"images", "image_masks"})],
    ids=["qwen2_vl", "molmo"],
)
def test_what_only_the_tower_reads_is_left_out(vlms, port, dropped, monkeypatch):
    """Grids stay, of which positions depend, and which feature a position has."""
    given, begin = [], stream.begin
    monkeypatch.setattr(
        stream, "begin", lambda *a, **more: given.append(set(a[2])) or begin(*a, **more)
    )
    vlm = vlms[port]
    if port == "molmo":
        inputs = molmo_helpers.make_inputs(molmo_helpers.CONFIG, [1, 1], [5, 7])
    else:
        inputs = qwen2_vl_helpers.make_inputs([[(1, 4, 4)], [(1, 4, 8)]], [5, 7])
    plain, kept = (
        [step.tokens for step in vlm.stream(inputs, max_new_tokens=2, images=images)]
        for images in (None, vlm.encode_images(inputs))
    )
    np.testing.assert_array_equal(plain, kept)
    assert given[0] - given[1] == dropped


def test_an_edit_of_the_tower_encodes_the_images_again(small, batch):
    vlm, site = small.vlm, "multi_modal_projector"
    encoded = vlm.encode_images(batch)
    edits = {site: ports.add(np.ones(vlm.site_shapes[site][-1]), 2.0)}
    _, steps = answered(vlm, batch, edits=edits)
    _, same = answered(vlm, batch, edits=edits, images=encoded)
    np.testing.assert_array_equal(same[0].logits, steps[0].logits)
    _, without = answered(vlm, batch)
    assert np.abs(without[0].logits - steps[0].logits).max() > 1e-3


def test_padding_further_compiles_fewer_programs(small):
    vlm = small.vlm.with_generation_config({"repetition_penalty": 3.0, "no_repeat_ngram_size": 2})
    sizes = []
    for text in (4, 30):
        inputs, edits = helpers.make_inputs([1], [text]), added(vlm, 2.0)
        tokens, _ = answered(vlm, inputs, edits=edits, pad_to_multiple_of=64)
        sizes.append((stream.begin._cache_size(), stream.proceed._cache_size()))
    expected = vlm.generate(inputs, max_new_tokens=COUNT, edits=edits).tokens
    np.testing.assert_array_equal(tokens, np.asarray(expected)[:, : tokens.shape[1]])
    assert sizes[0] == sizes[1]


def test_padding_further_moves_edits_of_positions(small, batch):
    where = np.zeros(batch["input_ids"].shape, bool)
    where[:, -3] = True
    width = small.vlm.config.get_text_config().hidden_size
    edits = {SITE: ports.add(np.linspace(-9, 9, width), where=where)}
    plain, moved = (
        next(small.vlm.stream(batch, max_new_tokens=1, edits=edits, pad_to_multiple_of=multiple))
        for multiple in (1, 64)
    )
    np.testing.assert_allclose(moved.logits, plain.logits, rtol=0, atol=1e-4)
    without = next(small.vlm.stream(batch, max_new_tokens=1))
    assert np.abs(without.logits - plain.logits).max() > 1e-2


def test_a_count_of_zero_is_refused(small, batch):
    with pytest.raises(ValueError, match="max_new_tokens"):
        next(small.vlm.stream(batch, max_new_tokens=0))
