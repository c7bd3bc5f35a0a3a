"""The logit lens: the model's own predictions at its last layer, blocks, steering, messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ports
from xlvlm_jax import lenses
from xlvlm_jax.lenses import reading as lens_reading
from xlvlm_jax.lenses.run import run_lens


@pytest.fixture(scope="module")
def inputs(vlm):
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "white")]
    return vlm.process([vlm.render("What is it?"), vlm.render("Where is the dog now?")], pictures)


@pytest.fixture(scope="module")
def reading(vlm, inputs):
    return lenses.logit_lens(vlm, inputs, k=3)


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def test_layers_are_the_decoders(vlm):
    assert vlm.layers == tuple(f"language_model.model.layers.{i}" for i in range(8))


def test_the_last_layer_is_the_models_own_prediction(vlm, inputs, reading):
    shares = softmax(vlm.forward(inputs).logits)
    tokens = inputs["attention_mask"] == 1
    assert reading.tokens.shape == (8, *tokens.shape, 3) and reading.sites == vlm.layers
    np.testing.assert_array_equal(reading.tokens[-1][tokens][:, 0], shares[tokens].argmax(-1))
    np.testing.assert_allclose(
        reading.probabilities[-1][tokens], -np.sort(-shares[tokens])[:, :3], atol=1e-5
    )
    entropy = -(shares * np.log(shares)).sum(-1)
    np.testing.assert_allclose(reading.entropy[-1][tokens], entropy[tokens], atol=1e-4)


def test_blocks_do_not_count(vlm, inputs, reading):
    sites = list(vlm.layers[2:4])
    blocked = lenses.logit_lens(vlm, inputs, sites=sites, k=3, block=23)
    np.testing.assert_allclose(blocked.probabilities, reading.probabilities[2:4], atol=1e-6)
    np.testing.assert_array_equal(blocked.tokens[..., 0], reading.tokens[2:4, ..., 0])


def test_each_block_is_waited_for(vlm, reading, waited_for):
    values = waited_for(lens_reading)
    states = np.ones((50, 192), np.float32)
    lenses.read_states(vlm, {vlm.layers[2]: states}, k=3, block=23)
    assert [tokens.shape for tokens, *_ in values] == 3 * [(23, 3)]


def test_a_steered_run(vlm, inputs, reading):
    vector = np.random.default_rng(0).standard_normal(192).astype(np.float32)
    edits = {vlm.layers[4]: ports.add(vector, 2.0)}
    steered = lenses.logit_lens(vlm, inputs, k=3, edits=edits)
    np.testing.assert_allclose(steered.probabilities[:4], reading.probabilities[:4], atol=1e-6)
    assert np.abs(steered.probabilities[4:] - reading.probabilities[4:]).max() > 0.05


def test_states_are_carried_first(vlm):
    site, x = vlm.layers[3], np.random.default_rng(1).standard_normal((4, 192), np.float32)
    matrix = np.random.default_rng(2).standard_normal((192, 192)).astype(np.float32)
    one = lenses.read_states(vlm, {site: x}, k=2, carried={site: matrix})
    two = lenses.read_states(vlm, {site: x @ matrix.T}, k=2)
    np.testing.assert_allclose(one.probabilities, two.probabilities, rtol=1e-3)


def test_prompt_and_answer_together(vlm, inputs):
    """The run over a prompt and its answer reads what two forward passes do."""
    row = vlm.process([vlm.render("What is it?")], [Image.new("RGB", (64, 64), "red")])
    run = run_lens(vlm, row, k=2, max_new_tokens=4)
    T = row["input_ids"].shape[1]
    assert run.tokens[:T].tolist() == row["input_ids"][0].tolist()
    assert run.kinds.count("image") == 64 and run.texts[-1] == vlm.tokenizer.decode(run.tokens[-1:])
    whole = {
        "input_ids": run.tokens[None],
        "attention_mask": np.ones((1, len(run.tokens)), int),
        "pixel_values": row["pixel_values"],
    }
    again = lenses.logit_lens(vlm, whole, k=2)
    np.testing.assert_allclose(run.reading.probabilities, again.probabilities[:, 0], atol=1e-4)
    # Each token of the answer is what the last layer expected before it.
    np.testing.assert_array_equal(run.reading.tokens[-1, T - 1 : -1, 0], run.tokens[T:])
    (picture,) = run.pictures
    assert {run.kinds[i] for i in picture.positions.ravel()} == {"image"}


def test_messages(vlm, inputs):
    with pytest.raises(ValueError, match="k is 0; expected 1 to 708 words"):
        lenses.read_states(vlm, {vlm.layers[0]: np.ones((1, 192))}, k=0)
    with pytest.raises(ValueError, match="no states to read"):
        lenses.read_states(vlm, {})
    with pytest.raises(ValueError, match="before the decoder"):
        lenses.read_states(vlm, {"multi_modal_projector": np.ones((1, 192))})
    with pytest.raises(ValueError, match="shows one prompt; got 2"):
        run_lens(vlm, inputs)


def test_a_site_may_be_spelled_in_several_ways(vlm):
    x = np.random.default_rng(1).standard_normal((4, 192), np.float32)
    matrix = np.random.default_rng(2).standard_normal((192, 192)).astype(np.float32)
    own, spelled = vlm.layers[3], vlm.layers[3].replace("layers.3", "layers_3")
    expected = lenses.read_states(vlm, {own: x}, k=2, carried={own: matrix})
    for name in (spelled, "layers.3"):
        for carried in ({own: matrix}, {name: matrix}):
            found = lenses.read_states(vlm, {name: x}, k=2, carried=carried)
            np.testing.assert_array_equal(found.tokens, expected.tokens)
            assert found.sites == (name,)


def test_prompts_of_nearly_one_length_share_a_program(vlm):
    site = vlm.layers[2]
    lenses.read_states(vlm, {site: np.ones((3, 13, 192), np.float32)}, k=2)
    compiled = lens_reading._top._cache_size()
    lenses.read_states(vlm, {site: np.ones((35, 192), np.float32)}, k=2)
    assert lens_reading._top._cache_size() == compiled
    none = lenses.read_states(vlm, {site: np.ones((0, 5, 192), np.float32)}, k=2)
    assert none.tokens.shape == (1, 0, 5, 2) and none.entropy.shape == (1, 0, 5)


def test_states_are_carried_in_float32(vlm):
    x, matrix = jnp.ones((2, 192)), jnp.eye(192)
    with jax.default_matmul_precision("bfloat16"):
        text = lens_reading._top.lower(vlm.module, vlm.params, x, matrix, False, 1).as_text()
    assert text.count("[HIGHEST, HIGHEST]") == 1
