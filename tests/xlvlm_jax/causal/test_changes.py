"""Effects of edits: against runs of the whole model, PyTorch's hooks, and differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.special import log_softmax

import ports
from ports.decoding.tail import cut_tail
from xlvlm_jax import causal
from xlvlm_jax.causal import changes
from xlvlm_jax.causal.changes import _Arrays, _divergence, _in_groups, _measures
from xlvlm_jax.causal.words import NONE
from xlvlm_jax.data import prompts, scenes
from xlvlm_jax.data.answers import answered
from xlvlm_jax.demo import embedded

SITE = "language_model.model.layers.6"
WORDS = np.int32([[40, NONE], [200, 201], [9, NONE], [300, NONE]])
OWN = np.int32([[40, NONE], [200, 201]])  # tokens of each of two concepts


@pytest.fixture(scope="module")
def forced(vlm):
    """Two pictures with answers of different lengths: the processor's arrays, and the lengths."""
    images = [
        Image.fromarray(scenes.training_image(scenes.sample_scene("test", i))) for i in range(2)
    ]
    texts, *_, lengths = answered(
        vlm, [vlm.render(prompts.CAPTION)] * 2, ["a dog", "two red cats"], ended=False
    )
    return vlm.process(texts, images), lengths


@pytest.fixture(scope="module")
def vectors(vlm):
    return np.random.default_rng(0).standard_normal((2, 192)).astype(np.float32)


@pytest.fixture(scope="module")
def asked(vlm, forced):
    inputs, lengths = forced
    return causal.prepare(vlm, inputs, SITE, answer_lengths=lengths)


def positions(inputs, lengths):
    """bool[B, T]: the positions that predict the answer."""
    T = inputs["input_ids"].shape[1]
    return np.stack([(np.arange(T) >= T - 1 - n) & (np.arange(T) < T - 1) for n in lengths])


def measures(logits, inputs, lengths):
    """Log-probabilities of the words and of the answer, in numpy."""
    logp = log_softmax(np.asarray(logits, np.float64), axis=-1)
    where = positions(inputs, lengths)
    words, said = [], []
    for b in range(len(logp)):
        rows = logp[b][where[b]]
        each = [np.logaddexp.reduce(rows[:, ids[ids != NONE]], axis=1).mean() for ids in WORDS]
        words.append(each)
        targets = inputs["input_ids"][b][-lengths[b] :]
        said.append(rows[np.arange(len(rows)), targets].sum())
    return np.array(words), np.array(said), logp


def expected_effects(vlm, forced, edits, concept):
    inputs, lengths = forced
    where = positions(inputs, lengths)
    words, said, before = measures(vlm.forward(inputs).logits, inputs, lengths)
    new_words, new_said, after = measures(vlm.forward(inputs, edits=edits).logits, inputs, lengths)
    hidden = OWN[concept][OWN[concept] != NONE]
    rest = []
    for b in range(2):
        p, q = (np.delete(x[b][where[b]], hidden, axis=1) for x in (before, after))
        p, q = log_softmax(p, -1), log_softmax(q, -1)
        rest.append((np.exp(p) * (p - q)).sum(-1).mean())
    return new_words - words, new_said - said, np.array(rest)


@pytest.mark.parametrize("where", ["predicting", "all"])
def test_effects_are_those_of_whole_runs(vlm, forced, vectors, asked, where):
    inputs, lengths = forced
    if where == "all":
        asked = causal.prepare(vlm, inputs, SITE, answer_lengths=lengths, where="all")
    assert (asked.tail is None) == (where == "all")
    edits = causal.concept_edits(vectors, add=[0.3], ablate=[1.0])
    found, plain = causal.effects(asked, edits, WORDS, OWN)
    words, _, _ = measures(vlm.forward(inputs).logits, inputs, lengths)
    np.testing.assert_allclose(plain, words, atol=1e-4)
    places = positions(inputs, lengths) if where == "predicting" else "all"
    for e, edit in enumerate(
        [
            ports.add_relative(vectors[0], 0.3, places),
            ports.ablate(vectors[0], 1.0, places),
            ports.add_relative(vectors[1], 0.3, places),
            ports.ablate(vectors[1], 1.0, places),
        ]
    ):
        words, said, rest = expected_effects(vlm, forced, {SITE: edit}, e // 2)
        assert np.abs(words).max() > 0.01
        np.testing.assert_allclose(found.words[e], words, atol=1e-4)
        np.testing.assert_allclose(found.answer[e], said, atol=1e-4)
        np.testing.assert_allclose(found.rest[e], rest, atol=1e-4)


def test_effects_are_those_of_hooks_in_pytorch(vlm, forced, vectors, asked):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    inputs, lengths = forced
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        embedded.LLAVA, dtype=torch.float32
    ).eval()
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    unit = torch.from_numpy(vectors[1] / np.linalg.norm(vectors[1]))
    chosen = torch.from_numpy(positions(inputs, lengths))[..., None]

    def hook(module, args, out):
        states = out[0] if isinstance(out, tuple) else out
        edited = states + 0.3 * states.norm(dim=-1, keepdim=True) * unit
        edited = torch.where(chosen, edited, states)
        return (edited, *out[1:]) if isinstance(out, tuple) else edited

    with torch.no_grad():
        plain = model(**tensors).logits.numpy()
        handle = model.model.language_model.layers[6].register_forward_hook(hook)
        edited = model(**tensors).logits.numpy()
        handle.remove()
    words, said, _ = measures(plain, inputs, lengths)
    new_words, new_said, _ = measures(edited, inputs, lengths)
    edits = causal.concept_edits(vectors, add=[0.3], ablate=[1.0])
    found, _ = causal.effects(asked, edits, WORDS, OWN)
    np.testing.assert_allclose(found.words[2], new_words - words, atol=1e-4)
    np.testing.assert_allclose(found.answer[2], new_said - said, atol=1e-4)


def test_gradients_estimate_the_removal(asked, vectors):
    own_words = np.int32([[0, NONE], [1, 3]])
    small = causal.concept_edits(vectors, add=[], ablate=[1e-2, 1.0])
    found, _ = causal.effects(asked, small, WORDS, OWN)
    own = np.asarray(found.words).reshape(2, 2, 2, -1)
    own = np.stack([own[0][..., [0]].mean(-1), own[1][..., [1, 3]].mean(-1)])
    said = np.asarray(found.answer).reshape(2, 2, 2)
    first = causal.slopes(asked, vectors, WORDS, own_words)
    # The derivative, by the difference for a small fraction.
    np.testing.assert_allclose(first.words, own[:, 0] / 1e-2, rtol=0.05, atol=5e-3)
    np.testing.assert_allclose(first.answer, said[:, 0] / 1e-2, rtol=0.05, atol=5e-3)
    # Integrated, it is the effect itself.
    whole = causal.slopes(asked, vectors, WORDS, own_words, steps=8)
    np.testing.assert_allclose(whole.words, own[:, 1], atol=2e-3)
    np.testing.assert_allclose(whole.answer, said[:, 1], atol=2e-3)


@pytest.mark.parametrize("size", [1, 3, 4, 7, 9])
def test_groups_do_not_count(size):
    edits = {"a": jnp.arange(7.0), "b": jnp.arange(14.0).reshape(7, 2)}
    found = _in_groups(lambda e: (e["a"] + e["b"].sum(), e["b"]), size, edits)
    np.testing.assert_array_equal(found[0], edits["a"] + edits["b"].sum(1))
    np.testing.assert_array_equal(found[1], edits["b"])


def test_losses_of_spliced_states(vlm, forced, asked):
    inputs, lengths = forced
    mean = np.full(192, 0.25, np.float32)
    found = causal.spliced_losses(asked, lambda states: 0.5 * states, mean)
    where = positions(inputs, lengths)
    edits = {
        "own": {},
        "spliced": {SITE: ports.edit_with(half, where=where)},
        "zero": {SITE: ports.replace(np.zeros(192), where=where)},
        "mean": {SITE: ports.replace(mean, where=where)},
    }
    for name, edit in edits.items():
        _, said, _ = measures(vlm.forward(inputs, edits=edit).logits, inputs, lengths)
        np.testing.assert_allclose(found[name], -said / lengths, atol=1e-4)
    perfect = causal.spliced_losses(asked, lambda states: states, mean)
    own, spliced, zero = (perfect[name].mean() for name in ("own", "spliced", "zero"))
    assert causal.loss_recovered(own, spliced, zero) == pytest.approx(1, abs=1e-4)
    assert causal.loss_recovered(own, zero, zero) == 0


def half(states):
    return 0.5 * states


def test_prompts_alone_are_measured_at_their_end(vlm, vectors):
    inputs = vlm.process([vlm.render("What is it?")], [Image.new("RGB", (64, 64), "red")])
    asked = causal.prepare(vlm, inputs, SITE)
    edits = causal.concept_edits(vectors[:1], add=[0.5], ablate=[])
    found, plain = causal.effects(asked, edits, WORDS, OWN)
    edit = {SITE: ports.add_relative(vectors[0], 0.5, "last_prompt")}
    before, after = (
        log_softmax(np.asarray(vlm.forward(inputs, edits=e).logits)[0, -1], -1) for e in ({}, edit)
    )
    assert plain[0, 0] == pytest.approx(before[40], abs=1e-4)
    assert found.words[0, 0, 0] == pytest.approx(after[40] - before[40], abs=1e-4)
    assert np.isnan(found.answer).all()
    with pytest.raises(ValueError, match="the loss is that of answers; prepare the batch with"):
        causal.spliced_losses(asked, half, np.zeros(192, np.float32))


def test_messages(vlm, forced, asked):
    inputs, lengths = forced
    wide = causal.concept_edits(np.ones((1, 7)), add=[0.1])
    with pytest.raises(ValueError, match=r"concepts are 7 wide, but the states at .*width 192"):
        causal.effects(asked, wide, WORDS, OWN)
    with pytest.raises(ValueError, match="finite numbers other than 0; got nan"):
        causal.concept_edits(np.ones((1, 7)), add=[0.1, float("nan")])
    with pytest.raises(ValueError, match="finite numbers other than 0; got inf"):
        causal.concept_edits(np.ones((1, 7)), ablate=[float("inf")])
    with pytest.raises(ValueError, match="other than 0; there are none"):
        causal.concept_edits(np.ones((1, 7)), add=[], ablate=[])
    with pytest.raises(ValueError, match="lm_head' is not in it; choose"):
        causal.prepare(vlm, inputs, vlm.head, answer_lengths=lengths)
    with pytest.raises(ValueError, match=r"layers.1' is not in it; choose"):
        causal.prepare(vlm, inputs, "vision_tower.vision_model.encoder.layers.1")
    with pytest.raises(ValueError, match="selects no position of the batch"):
        causal.prepare(vlm, inputs, SITE, answer_lengths=lengths, where={"from": 10_000})
    with pytest.raises(ValueError, match="steps is 0; expected at least 1"):
        causal.slopes(asked, np.ones((2, 192)), WORDS, OWN, steps=0)
    with pytest.raises(ValueError, match="the reconstruction of states"):
        causal.spliced_losses(asked, lambda states: states[:1], np.zeros(192, np.float32))


def test_a_longer_answer_in_another_batch_does_not_count(vlm, forced, asked, vectors):
    """More positions than the batch has, or as many, are those that it has."""
    inputs, lengths = forced
    edits = causal.concept_edits(vectors[:1], add=[0.5], ablate=[])
    expected, plain = causal.effects(asked, edits, WORDS, OWN)
    longer = causal.prepare(vlm, inputs, SITE, answer_lengths=lengths, count=10_000)
    assert longer.tail is not None and longer.weights.sum() == asked.weights.sum()
    found, before = causal.effects(longer, edits, WORDS, OWN)
    np.testing.assert_allclose(before, plain, atol=1e-4)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    with pytest.raises(ValueError, match="the tail has 9 positions of 9; expected 1 to 8"):
        cut_tail(vlm.module, vlm.params, {"input_ids": np.ones((1, 9), int)}, 9)


def test_no_measure_is_rounded_by_a_product():
    """A model in bfloat16 is traced with the backend's default precision."""
    given = jnp.zeros((2, 3)), jnp.zeros((2, 3, 5))

    def measured(weights, logp):
        targets = jnp.zeros((2, 3), jnp.int32)
        asked = _Arrays({}, None, {}, weights > 0, weights, targets)
        found = _measures(asked, logp, jnp.asarray(OWN))
        return found, _divergence(asked, logp, logp, jnp.asarray(OWN[0]))

    with jax.default_matmul_precision("bfloat16"):
        assert "dot_general" not in str(jax.make_jaxpr(measured)(*given))


def test_whole_sequences_count_in_memory(vlm, forced, asked, monkeypatch):
    inputs, lengths = forced
    whole = causal.prepare(vlm, inputs, SITE, answer_lengths=lengths, where="all")
    text, (B, T) = vlm.sizes.text, whole.mask.shape
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    widest = max(text.intermediate_size, text.num_heads * T)
    monkeypatch.setattr(changes, "ACCELERATOR_LOGITS", 5 * B * T * widest)
    assert changes._at_once(whole) == 5  # and not by the logits of the few that predict
    assert changes._at_once(asked) > 5
