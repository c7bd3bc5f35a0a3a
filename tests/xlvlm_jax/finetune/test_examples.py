"""Training examples: masks of answers, batches, skipped samples."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

import ports
from xlvlm_jax.data import Sample
from xlvlm_jax.data.answers import end_token
from xlvlm_jax.data.images import read_image
from xlvlm_jax.finetune import examples

from ...test_models import MODELS


def answers(vlm, batch: examples.TrainingBatch) -> list[str]:
    """Returns the texts of the tokens that are learnt."""
    ids = batch.inputs["input_ids"]
    return [
        vlm.tokenizer.decode(row[len(row) - n :]) for row, n in zip(ids, batch.lengths, strict=True)
    ]


def test_the_end_of_each_row_is_its_answer(vlm, samples):
    first = samples[0].references[0]
    (batch,) = examples.evaluation_batches(vlm, samples[:3], 4)
    assert answers(vlm, batch)[0] == f"{first} </s>"
    assert batch.lengths.tolist() == [len(s.references[0].split()) + 1 for s in samples[:3]] + [0]
    assert batch.window == 31  # of 32 positions, the first is predicted by none


@pytest.mark.parametrize("name", MODELS)
def test_every_model(name, tmp_path, samples):
    """Whatever a processor puts before the prompt, the answer is what comes after it."""
    make = MODELS[name][0]
    make(tmp_path / name)
    vlm = ports.load(tmp_path / name)
    texts = ["picture", "the picture is in the"]
    # Words of the tokenizer.
    if name == "molmo":
        texts = ["a caption", "a"]
    elif name in ("idefics3", "smolvlm", "llava_next", "llava_onevision", "molmo2"):
        texts = ["what", "what is it"]
    taught = [
        dataclasses.replace(sample, references=(text,))
        for sample, text in zip(samples, texts, strict=False)
    ]
    (batch,) = examples.evaluation_batches(vlm, taught, 2)
    end = end_token(vlm)
    assert [a.replace(" ", "") for a in answers(vlm, batch)] == [
        f"{text}{end}".replace(" ", "") for text in texts
    ]
    # The last prompt position predicts the first token of the answer.
    prompt = vlm.process([vlm.render(taught[0].prompt)], [read_image(taught[0].image)])
    row = batch.inputs["input_ids"][0]
    length = batch.lengths[0]
    np.testing.assert_array_equal(
        row[: len(row) - length][-prompt["input_ids"].shape[1] :], prompt["input_ids"][0]
    )


def test_an_epoch_shows_each_sample_once(vlm, samples):
    six = samples[:6]
    images = [read_image(s.image) for s in six]
    inputs = vlm.process([vlm.render(s.prompt) for s in six], images)
    pixels = {image.tobytes() for image in inputs["pixel_values"]}
    seen = Counter(
        image.tobytes()
        for batch in examples.batches(vlm, six, 2, seed=1, start=0, stop=6)
        for image in batch.inputs["pixel_values"]
    )
    assert set(seen) == pixels
    assert set(seen.values()) == {2}


def test_batches_follow_from_seed_and_number(vlm, samples):
    def ids(seed, start):
        made = examples.batches(vlm, samples, 3, seed=seed, start=start, stop=5)
        return [batch.inputs["input_ids"].tolist() for batch in made]

    assert ids(0, 0)[2:] == ids(0, 2)
    assert ids(0, 0) != ids(1, 0)


def test_what_a_sample_teaches(samples):
    assert examples.training_answers(samples[0]) == samples[0].references
    question = Sample("1", samples[0].image, "1", "?", ("yes", "no"), {"answer": "no"})
    assert examples.training_answers(question) == ("no",)
    with pytest.raises(ValueError, match="sample 1 has no reference to learn"):
        examples.training_answers(dataclasses.replace(question, references=(), metadata={}))


def odd(samples):
    """Returns samples: the second question contains an image's mark, the fifth has no picture."""
    refused = dataclasses.replace(samples[1], prompt="what is <image>")
    gone = dataclasses.replace(samples[4], image=samples[4].image.with_name("gone.png"))
    return [samples[0], refused, *samples[2:4], gone, *samples[5:]]


def test_samples_that_cannot_be_processed_teach_nothing(vlm, samples):
    taught = odd(samples)
    first, second = examples.evaluation_batches(vlm, taught, 4)
    assert list(first.skipped) == ["1"] and list(second.skipped) == ["4"]
    assert "the processor refuses it" in first.skipped["1"]
    assert "no such image file" in second.skipped["4"]
    good = [samples[i] for i in (0, 2, 3)]
    expected = [len(s.references[0].split()) + 1 for s in good]
    assert first.lengths.tolist() == [*expected, 0]
    (alone,) = examples.evaluation_batches(vlm, good, 4)
    np.testing.assert_array_equal(first.inputs["input_ids"], alone.inputs["input_ids"])
    with pytest.raises(ValueError, match=r"sample 1: .* refuses it"):
        list(examples.evaluation_batches(vlm, taught, 4, strict=True))


def test_a_batch_of_only_such_samples_is_replaced_by_the_next(vlm, samples):
    taught = odd(samples)
    made = list(examples.batches(vlm, taught, 1, seed=0, start=0, stop=8))
    assert all(batch.inputs and batch.lengths.all() for batch in made)
    assert {name for batch in made for name in batch.skipped} == {"1", "4"}
    with pytest.raises(
        ValueError, match=r"none of 1 samples can be processed; the first, 1: .*ref"
    ):
        list(examples.batches(vlm, taught[1:2], 1, seed=0, start=0, stop=1))


def test_samples_that_are_all_lost_are_looked_at_twice_at_most(vlm, samples, tmp_path, monkeypatch):
    lost = [dataclasses.replace(sample, image=tmp_path / "lost.png") for sample in samples]
    looked = []
    make = examples.make_batch
    monkeypatch.setattr(
        examples,
        "make_batch",
        lambda v, some, *a, **k: looked.append(some) or make(v, some, *a, **k),
    )
    with pytest.raises(ValueError, match="none of 8 samples can be processed"):
        next(examples.batches(vlm, lost, 4, 0, 1, 2))
    assert len(looked) == 4
    # Wherever it is in two epochs: a single sample that is left is found.
    for kept in range(3):
        some = [*lost[:kept], samples[kept], *lost[kept + 1 : 3]]
        (batch,) = examples.batches(vlm, some, 2, 0, 1, 2)
        assert batch.inputs
