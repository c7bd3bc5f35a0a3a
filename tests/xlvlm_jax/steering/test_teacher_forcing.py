"""Runs from stored states: equal to full runs, and to PyTorch's loss and gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

import ports
from ports.intervene.edits import GENERATED, IMAGE, LAST_PROMPT, PADDING, TEXT
from xlvlm_jax.data.images import read_image
from xlvlm_jax.demo import embedded
from xlvlm_jax.steering import teacher_forcing

SITE = "language_model.model.layers.6"
ANSWERS = ["no", "a red dog in the park", "three", "yes"]


@pytest.fixture(scope="module")
def samples(questions):
    return questions[:2] + questions[-2:]


@pytest.fixture(scope="module")
def forced(vlm, samples):
    made, kept, skipped = teacher_forcing.force(vlm, samples, ANSWERS, SITE, batch_size=3)
    assert (kept.tolist(), skipped) == ([0, 1, 2, 3], {})
    return made


def texts_of(vlm, samples):
    texts = [
        f"{vlm.render(sample.prompt)} {answer}{vlm.tokenizer.eos_token}"
        for sample, answer in zip(samples, ANSWERS, strict=True)
    ]
    return vlm.process(texts, [read_image(sample.image) for sample in samples])


def test_kinds_by_hand(vlm, forced):
    for row, answer in enumerate(ANSWERS):
        kinds = list(forced.kinds[row])
        count = kinds.count(GENERATED)
        words = vlm.tokenizer.decode(forced.tokens[row][-count:], skip_special_tokens=True)
        assert words.strip() == answer
        assert forced.tokens[row, -1] in vlm.eos_tokens
        assert kinds[-count - 1] == LAST_PROMPT
        assert kinds.count(LAST_PROMPT) == 1
        assert kinds.count(IMAGE) == 64
        assert set(kinds[kinds.index(IMAGE) + 64 : -count - 1]) == {TEXT}
        assert (np.array(kinds[: kinds.count(PADDING)]) == PADDING).all()


@pytest.mark.parametrize("where", ["all", "prompt", "generated", "last_prompt"])
def test_losses_are_those_of_a_whole_run(vlm, samples, forced, where):
    vector = 0.5 * np.random.default_rng(0).standard_normal(192).astype(np.float32)
    length = forced.answer_length
    losses, weights = jax.jit(teacher_forcing.answer_losses, static_argnums=(0, 3, 5))(
        vlm.module, vlm.params, forced, SITE, {SITE: ports.add(vector, where=where)}, length
    )
    # The same edit in a pass over the whole, by a mask: it knows no generated positions.
    inputs = texts_of(vlm, samples)
    columns = inputs["input_ids"].shape[1]
    kinds = forced.kinds[:, -columns:]
    chosen = {
        "all": kinds != PADDING,
        "prompt": (kinds != PADDING) & (kinds != GENERATED),
        "generated": kinds == GENERATED,
        "last_prompt": kinds == LAST_PROMPT,
    }[where]
    logits = vlm.forward(inputs, edits={SITE: ports.add(vector, where=chosen)}).logits
    logits = jax.nn.log_softmax(logits[:, :-1])
    expected = -np.take_along_axis(
        np.asarray(logits), np.asarray(inputs["input_ids"])[:, 1:, None], axis=2
    )[..., 0]
    is_answer = kinds[:, 1:] == GENERATED
    np.testing.assert_array_equal(weights.sum(1), is_answer.sum(1))
    ours = np.asarray(losses)[np.asarray(weights) == 1]
    np.testing.assert_allclose(ours, expected[is_answer], rtol=1e-4, atol=1e-4)


def test_loss_and_gradient_are_pytorchs(vlm, samples, forced):
    vector = 0.5 * np.random.default_rng(1).standard_normal(192).astype(np.float32)

    def loss(vector):
        losses, weights = teacher_forcing.answer_losses(
            vlm.module,
            vlm.params,
            forced,
            SITE,
            {SITE: ports.add(vector)},
            forced.answer_length,
        )
        return losses.sum() / weights.sum()

    ours, slope = jax.jit(jax.value_and_grad(loss))(jnp.asarray(vector))
    peer = LlavaForConditionalGeneration.from_pretrained(embedded.LLAVA, dtype=torch.float32)
    inputs = texts_of(vlm, samples)
    kinds = forced.kinds[:, -inputs["input_ids"].shape[1] :]
    labels = torch.tensor(np.where(kinds == GENERATED, inputs["input_ids"], -100))
    shift = torch.tensor(vector, requires_grad=True)
    handle = peer.model.language_model.layers[6].register_forward_hook(
        lambda module, args, out: out + shift
    )
    theirs = peer(**{k: torch.tensor(v) for k, v in inputs.items()}, labels=labels).loss
    theirs.backward()
    handle.remove()
    assert float(ours) == pytest.approx(theirs.item(), rel=1e-4)
    error = np.abs(np.asarray(slope) - shift.grad.numpy()).max()
    assert error < 1e-3 * float(shift.grad.abs().max())


def test_means_of_prompts_of_many_lengths_run_few_programs():
    random = np.random.default_rng(0)
    before = teacher_forcing._token_means._cache_size()
    for length in (33, 40, 47):
        states = random.standard_normal((3, length, 5)).astype(np.float32)
        chosen = random.random((3, length)) < 0.5
        expected = [rows[own].mean(0) for rows, own in zip(states, chosen, strict=True)]
        means = teacher_forcing.token_means(states, chosen)
        np.testing.assert_allclose(means, expected, rtol=1e-5, atol=1e-6)
    assert teacher_forcing._token_means._cache_size() - before == 1


@pytest.mark.parametrize(
    ("site", "begin"),
    [
        ("layers.6", "layers.6"),
        ("layers.5.self_attn.o_proj", "layers.4"),
        ("layers.5.mlp", "layers.4"),
        ("norm", "layers.7"),
    ],
)
def test_where_a_run_begins(vlm, site, begin):
    stem = "language_model.model."
    assert teacher_forcing.begin_site(vlm, stem + site) == stem + begin
    if site != "norm":
        assert teacher_forcing.begin_site(vlm, site) == stem + begin


def test_messages(vlm, samples):
    for site in ("language_model.model.layers.0.mlp", "multi_modal_projector"):
        with pytest.raises(ValueError, match=rf"nothing can be learnt at site '{site}'.*layers\.0"):
            teacher_forcing.begin_site(vlm, site)
    with pytest.raises(ValueError, match=r"no site matches 'layers\.99'"):
        teacher_forcing.begin_site(vlm, "layers.99")
    with pytest.raises(ValueError, match="1 answers for 4 samples"):
        teacher_forcing.force(vlm, samples, ["no"], SITE)
    with pytest.raises(ValueError, match=r"the answer to force on sample \d+ is empty"):
        list(teacher_forcing.batches(vlm, samples[:1], [""], 1))
    with pytest.raises(ValueError, match="batch size is 0; expected 1 sample or more"):
        list(teacher_forcing.batches(vlm, samples[:1], None, 0))


def test_refused_samples_are_left_out(vlm, samples, forced):
    odd = [dataclasses.replace(samples[0], prompt="<image> ?"), *samples[1:]]
    made, kept, skipped = teacher_forcing.force(vlm, odd, ANSWERS, SITE, batch_size=3)
    assert kept.tolist() == [1, 2, 3] and list(skipped) == [samples[0].id]
    assert "the processor refuses it" in skipped[samples[0].id]
    real = made.kinds != PADDING
    np.testing.assert_array_equal(made.kinds, forced.kinds[1:, -made.kinds.shape[1] :])
    expected = forced.states[1:, -made.kinds.shape[1] :]
    np.testing.assert_allclose(made.states[real], expected[real], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=f"sample {samples[0].id}: .* refuses it"):
        teacher_forcing.force(vlm, odd, ANSWERS, SITE, strict=True)
    with pytest.raises(ValueError, match=r"none of 1 samples can be processed; the first: .*ref"):
        teacher_forcing.force(vlm, odd[:1], ANSWERS[:1], SITE)
