"""Gradients of an answer's log-probability: against PyTorch, by their slope, and messages."""

import numpy as np
import pytest
from PIL import Image

import ports
from xlvlm_jax import answer_gradients
from xlvlm_jax.concepts.answer_gradients import _answer_gradients
from xlvlm_jax.data import scenes

LAYER = "language_model.model.layers.3"


@pytest.fixture(scope="module")
def asked(vlm):
    """Two prompts with answers of different lengths."""
    pictures = [Image.fromarray(scenes.draw(scenes.sample_scene("val", i))) for i in range(2)]
    prompt = vlm.render("What is in the picture?")
    return vlm.process([f"{prompt} dog", f"{prompt} a red bus"], pictures), np.array([1, 3])


@pytest.fixture(scope="module")
def found(vlm, asked):
    return answer_gradients(vlm, *asked, LAYER)


def test_states_and_probabilities_are_those_of_a_forward_pass(vlm, asked, found):
    inputs, lengths = asked
    out = vlm.forward(inputs, sites=[LAYER])
    np.testing.assert_allclose(found.states, out.states[LAYER], atol=1e-5)
    logits = np.asarray(out.logits, np.float64)
    every = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, length in enumerate(lengths):
        ids = inputs["input_ids"][row, -length:]
        expected = every[row, -length - 1 : -1][np.arange(length), ids].sum()
        assert found.log_probability[row] == pytest.approx(expected, abs=1e-4)


def test_answers_of_other_lengths_share_a_program(vlm, asked, found):
    inputs, _ = asked
    before = _answer_gradients._cache_size()
    other = answer_gradients(vlm, inputs, np.array([2, 1]), LAYER)
    assert _answer_gradients._cache_size() == before
    assert (np.asarray(other.log_probability) < 0).all()


def test_the_gradient_is_the_slope(vlm, asked, found):
    """Along a direction at one image token of each row, against the difference of two values."""
    inputs, lengths = asked
    direction = np.random.default_rng(0).normal(size=found.states.shape).astype(np.float32)
    direction[:, :20] = direction[:, 21:] = 0
    values = []
    for step in (0.02, -0.02):
        moved = np.asarray(found.states) + step * direction
        edits = {LAYER: ports.replace(moved)}
        logits = np.asarray(vlm.forward(inputs, edits=edits).logits, np.float64)
        every = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        values.append(
            [
                every[row, -n - 1 : -1][np.arange(n), inputs["input_ids"][row, -n:]].sum()
                for row, n in enumerate(lengths)
            ]
        )
    slope = (np.array(values[0]) - values[1]) / 0.04
    expected = (np.asarray(found.gradients) * direction).sum((1, 2))
    np.testing.assert_allclose(expected, slope, rtol=0.02, atol=2e-3)


def test_as_in_pytorch(vlm, asked, found):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    inputs, lengths = asked
    peer = transformers.LlavaForConditionalGeneration.from_pretrained(
        vlm.directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    kept = []

    def keep(module, args, out):
        states = out[0] if isinstance(out, tuple) else out
        states.retain_grad()
        kept.append(states)

    handle = peer.model.language_model.layers[3].register_forward_hook(keep)
    logits = peer(**{name: torch.tensor(x) for name, x in inputs.items()}).logits
    handle.remove()
    every = logits.log_softmax(-1)
    total = 0
    for row, length in enumerate(lengths):
        ids = torch.tensor(inputs["input_ids"][row, -length:])
        total = total + every[row, -length - 1 : -1].gather(-1, ids[:, None]).sum()
    total.backward()
    expected, got = kept[0].grad.numpy(), np.asarray(found.gradients)
    real = inputs["attention_mask"] > 0
    assert np.abs(expected - got)[real].max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("lengths", "site", "message"),
    [
        ([1], LAYER, r"answers have \[1\] tokens in rows of"),
        ([0, 1], LAYER, r"expected from one to one less than the row"),
        ([1, 3], "multi_modal_projector", "has no states for generated tokens"),
        ([1, 3], "language_model.lm_head", "is the head; choose a site of the decoder"),
    ],
)
@pytest.mark.wrong_types
def test_messages(vlm, asked, lengths, site, message):
    with pytest.raises(ValueError, match=message):
        answer_gradients(vlm, asked[0], np.array(lengths), site)
