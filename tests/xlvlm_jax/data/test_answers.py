"""Answers as tokens after their prompts, for teacher forcing."""

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import ports
from xlvlm_jax.causal import changes
from xlvlm_jax.data.answers import answered, end_token
from xlvlm_jax.data.batches import make_batch
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.finetune import FinetuneSettings, examples
from xlvlm_jax.finetune.training import Trainer
from xlvlm_jax.steering import teacher_forcing

from ...ports import helpers
from ...test_models import MODELS


def test_by_hand(vlm):
    prompts = [vlm.render("what color is the dog?"), "USER: <image>\nhow many? ASSISTANT:"]
    texts, suffixes, lengths = answered(vlm, prompts, ["a dog", "two"])
    assert texts == [f"{prompts[0]} a dog</s>", f"{prompts[1]} two</s>"]
    assert lengths.tolist() == [3, 2]
    assert suffixes is None
    texts, _, lengths = answered(vlm, prompts, ["a dog", "two"], ended=False)
    assert texts[1] == f"{prompts[1]} two"
    assert lengths.tolist() == [2, 1]


@pytest.mark.parametrize("name", sorted({*MODELS} - {"paligemma"}))
def test_no_second_space_and_an_end_token(name, tmp_path):
    """There is no second space after a template's line break; the last token ends rows."""
    MODELS[name][0](tmp_path / name)
    vlm = ports.load(tmp_path / name)
    prompt = vlm.render("the picture")
    (text,), _, (length,) = answered(vlm, [prompt], ["picture"])
    between = text[len(prompt) : text.index("picture", len(prompt))]
    assert between == ("" if prompt[-1].isspace() else " ")
    ids = vlm.tokenizer([text])["input_ids"][0]
    assert 1 < length < len(ids)
    if vlm.eos_tokens:
        assert vlm.tokenizer.convert_tokens_to_ids(end_token(vlm)) in vlm.eos_tokens


def test_an_answer_for_each_prompt(vlm):
    with pytest.raises(ValueError, match="shorter"):
        answered(vlm, ["USER: how many? ASSISTANT:"] * 2, ["two"])


class TestPrefixLM:
    """PaliGemma, whose prompts do not see their answers: the processor takes them apart."""

    ANSWERS = ("picture", "what the picture is")

    @pytest.fixture(scope="class")
    def directory(self, tmp_path_factory):
        directory = tmp_path_factory.mktemp("checkpoint") / "paligemma"
        MODELS["paligemma"][0](directory)
        return directory

    @pytest.fixture(scope="class")
    def vlm(self, directory):
        return ports.load(directory)

    @pytest.fixture(scope="class")
    def samples(self, tmp_path_factory):
        directory, samples = tmp_path_factory.mktemp("pictures"), []
        for i, answer in enumerate(self.ANSWERS):
            pixels = np.random.default_rng(i).integers(0, 256, (30, 20, 3), np.uint8)
            Image.fromarray(pixels).save(directory / f"{i}.png")
            prompt = "what is in the picture"[: 7 + 8 * i]
            samples.append(Sample(str(i), directory / f"{i}.png", str(i), prompt, (answer,)))
        return samples

    @pytest.fixture(scope="class")
    def loss(self, directory, vlm, samples):
        """PyTorch's, of the arrays and labels that transformers' processor makes."""
        model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(directory).eval()
        arrays = vlm.processor(
            text=[vlm.render(sample.prompt) for sample in samples],
            images=[[Image.open(sample.image)] for sample in samples],
            suffix=list(self.ANSWERS),
            padding=True,
            return_tensors="np",
        )
        with torch.no_grad():
            return model(**helpers.to_torch(arrays)).loss.item()

    def test_batches_mark_the_answers(self, vlm, samples):
        batch = make_batch(vlm, samples, 3, answers=self.ANSWERS)
        types = batch.inputs[0]["token_type_ids"]
        # With their end tokens, and the first again in the row that fills up.
        assert types.sum(1).tolist() == batch.answer_lengths.tolist() == [2, 5, 2]
        assert (batch.inputs[0]["input_ids"][:, -1] == vlm.tokenizer.eos_token_id).all()
        plain = make_batch(vlm, samples, 2, answers=self.ANSWERS, ended=False)
        assert plain.answer_lengths.tolist() == [1, 4]
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            np.testing.assert_array_equal(plain.inputs[0][name], batch.inputs[0][name][:2, :-1])

    def test_losses_of_training_are_pytorchs(self, vlm, samples, loss):
        trainer = Trainer(vlm, FinetuneSettings(), 1)
        split = list(examples.evaluation_batches(vlm, samples, 2))
        assert trainer.evaluate(trainer.begin(), split) == pytest.approx(loss, rel=1e-5)

    def test_losses_of_steering_are_pytorchs(self, vlm, samples, loss):
        site = "language_model.model.layers.0"
        forced, _, _ = teacher_forcing.force(vlm, samples, self.ANSWERS, site)
        losses, weights = jax.jit(teacher_forcing.answer_losses, static_argnums=(0, 3, 5))(
            vlm.module, vlm.params, forced, site, {}, forced.answer_length
        )
        assert float(losses.sum() / weights.sum()) == pytest.approx(loss, rel=1e-5)

    def test_losses_of_causal_scores_are_pytorchs(self, vlm, samples, loss):
        batch = make_batch(vlm, samples, 2, answers=self.ANSWERS)
        site, counts = "language_model.model.layers.0", batch.answer_lengths
        asked = changes.prepare(vlm, batch.inputs[0], site, answer_lengths=counts)
        losses = changes.spliced_losses(asked, lambda states: states, np.zeros(60))
        for name in ("own", "spliced"):
            assert np.average(losses[name], weights=counts) == pytest.approx(loss, rel=1e-5)

    def test_an_answer_for_each_prompt(self, vlm):
        with pytest.raises(ValueError, match="shorter"):
            answered(vlm, ["what", "is"], ["two"])
