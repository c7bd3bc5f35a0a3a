"""From samples to directories: interrupted and not, adapters and checkpoints, messages."""

import copy
import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import peft
import pytest
import torch

import ports
from xlvlm_jax.data import scenes
from xlvlm_jax.finetune import FinetuneSettings, finetune, run
from xlvlm_jax.finetune.training import Trainer

from ...ports import helpers
from .conftest import SETTINGS

OPTIONS = {"save_every": 2, "log_every": 1, "evaluate_every": 3}


class _KilledError(Exception):
    pass


def digests(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.iterdir())
    }


@pytest.fixture(scope="module")
def trained(vlm, samples, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("adapters") / "adapter"
    finetune(vlm, samples, output, SETTINGS, evaluation=samples[:3], **OPTIONS)
    return output


def test_an_adapter_that_peft_loads(pair, vlm, samples, trained):
    assert set(digests(trained)) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    }
    inputs = helpers.make_inputs([1], [6], tokens_per_image=16)
    inputs["pixel_values"] = np.random.default_rng(0).standard_normal((1, 3, 28, 28), np.float32)
    base = helpers.transformers.LlavaForConditionalGeneration.from_pretrained(pair.directory)
    theirs = peft.PeftModel.from_pretrained(base, trained).eval()
    with torch.no_grad():
        expected = theirs(**helpers.to_torch(inputs)).logits.numpy()
    ours = ports.load(pair.directory, adapter=trained).forward(inputs).logits
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
    assert np.abs(expected - vlm.forward(inputs).logits).max() > 0.01


def test_a_record_of_the_run(pair, trained):
    record = json.loads((trained / "training.json").read_text())
    assert record["arguments"]["base model"] == str(pair.directory)
    assert record["arguments"]["rank"] == 3
    log = record["log"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5]
    assert [entry["step"] for entry in log if "evaluation" in entry] == [0, 3, 5]


def test_an_interrupted_run_ends_like_an_uninterrupted_one(vlm, samples, trained, tmp_path):
    output = tmp_path / "adapter"
    options = {**OPTIONS, "evaluation": samples[:3]}
    steps = []

    def kill(done, total, figures):
        steps.append(done)
        if done == 3:
            raise _KilledError

    with pytest.raises(_KilledError):
        finetune(vlm, samples, output, SETTINGS, progress=kill, **options)
    assert not output.exists()
    with pytest.raises(ValueError, match=r"interrupted run with rate 0\.01, now it is 0\.02"):
        finetune(vlm, samples, output, dataclasses.replace(SETTINGS, rate=0.02), **options)
    arguments = output.with_name("adapter.training") / "arguments.json"
    before = arguments.read_text()
    for damaged, message in (
        ("{", r"arguments.json: line 1, .* not JSON"),
        ("[]", "a JSON object"),
    ):
        arguments.write_text(damaged)
        with pytest.raises(ValueError, match=message):
            finetune(vlm, samples, output, SETTINGS, **options)
    arguments.write_text(before)
    steps.clear()
    finetune(vlm, samples, output, SETTINGS, progress=lambda n, *_: steps.append(n), **options)
    assert steps[0] == 3  # it went on behind the state of step 2
    assert digests(output) == digests(trained)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_saved_log_does_not_grow_with_the_run(vlm, samples, tmp_path, monkeypatch):
    """The log is written while the next steps run."""
    saved, save = [], ocp.args.JsonSave

    def remembered(log):
        saved.append(log)
        return save(log)

    monkeypatch.setattr(ocp.args, "JsonSave", remembered)
    finetune(vlm, samples, tmp_path / "adapter", SETTINGS, **OPTIONS)
    assert [log[-1]["step"] for log in saved] == [2, 4]


def test_a_finished_run_is_not_repeated(vlm, samples, trained):
    before = digests(trained)
    evaluation = {"evaluation": samples[:3]}
    summary = finetune(vlm, samples, trained, SETTINGS, **evaluation, **OPTIONS)
    assert summary.steps == 5
    assert set(summary.evaluations) == {0, 3, 5}
    assert digests(trained) == before
    other = dataclasses.replace(SETTINGS, seed=2)
    with pytest.raises(FileExistsError, match="not made with these arguments; choose another"):
        finetune(vlm, samples, trained, other, **evaluation, **OPTIONS)


@pytest.mark.slow
def test_all_parameters(pair, vlm, samples, tmp_path):
    settings = FinetuneSettings(method="full", batch_size=4, steps=2, rate=1e-3, warmup=0.0)
    output = tmp_path / "full"
    finetune(vlm, samples, output, settings)
    tuned = ports.load(output)
    kinds = [
        bool(np.any(np.asarray(a) != np.asarray(b)))
        for a, b in zip(jax.tree.leaves(vlm.params), jax.tree.leaves(tuned.params), strict=True)
    ]
    # A tower's last layers may come after the features that are used.
    assert np.mean(kinds) > 0.7
    batch = tuned.process([tuned.render("what is")], [_picture(samples[0])])
    theirs = helpers.transformers.LlavaForConditionalGeneration.from_pretrained(output).eval()
    with torch.no_grad():
        expected = theirs(**helpers.to_torch(batch)).logits.numpy()
    np.testing.assert_allclose(tuned.forward(batch).logits, expected, rtol=0, atol=1e-4)


def _picture(sample):
    from xlvlm_jax.data.images import read_image

    return read_image(sample.image)


def test_a_run_that_diverges_ends_before_it_is_saved(vlm, samples, tmp_path, monkeypatch):
    output = tmp_path / "adapter"
    update, steps = Trainer.update, []

    def diverging(self, state, group):
        state, figures = update(self, state, group)
        steps.append(1)
        if len(steps) == 4:
            figures = figures | {"norm": figures["norm"] * np.inf}
        return state, figures

    monkeypatch.setattr(Trainer, "update", diverging)
    told = r"at step 4, norm is inf; lower the learning rate.*holds the state of step 2: delete it"
    with pytest.raises(FloatingPointError, match=told):
        finetune(vlm, samples, output, SETTINGS, **OPTIONS)
    assert not output.exists()
    states = output.with_name("adapter.training") / "states"
    assert [path.name for path in states.iterdir()] == ["2"]


def test_other_pictures_or_answers_are_another_run(vlm, samples, trained, tmp_path):
    options = {**OPTIONS, "evaluation": samples[:3]}
    first = samples[0]
    corrected = dataclasses.replace(first, metadata={"answer": "w1"})
    moved = dataclasses.replace(first, image=tmp_path / first.image.name)
    for other in (corrected, moved):
        with pytest.raises(FileExistsError, match="was not made with these arguments"):
            finetune(vlm, [other, *samples[1:]], trained, SETTINGS, **options)
    # All pictures may move together.
    there = [dataclasses.replace(s, image=tmp_path / "data" / s.image.name) for s in samples]
    moved_options = {**OPTIONS, "evaluation": there[:3]}
    assert finetune(vlm, there, trained, SETTINGS, **moved_options).steps == 5
    # Runs of earlier releases did not record them, and named the model as it was given.
    record = json.loads((trained / "training.json").read_text())
    del record["arguments"]["pictures and answers digest"]
    record["arguments"]["base model"] = os.path.relpath(record["arguments"]["base model"])
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "training.json").write_text(json.dumps(record))
    assert finetune(vlm, samples, tmp_path / "earlier", SETTINGS, **options).steps == 5
    for name in ("save_every", "log_every", "evaluate_every"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1 step, got 0"):
            finetune(vlm, samples, tmp_path / "new", SETTINGS, **{name: 0})


def test_the_state_of_a_run_that_was_killed_at_its_end_is_removed(vlm, samples, trained, tmp_path):
    output = tmp_path / "adapter"
    shutil.copytree(trained, output)
    left = tmp_path / "adapter.training"
    (left / "states" / "4").mkdir(parents=True)
    finetune(vlm, samples, output, SETTINGS, evaluation=samples[:3], **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("part", ["whole", "text_config"])
def test_a_written_checkpoint_is_not_quantised(pair, tmp_path, key, part):
    """Its weights are written in the model's dtype, whatever those of the original were."""
    copied = tmp_path / "fp8"
    shutil.copytree(pair.directory, copied)
    config = json.loads((copied / "config.json").read_text())
    (config if part == "whole" else config[part])[key] = {"quant_method": "fp8"}
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "tokenizer.old").mkdir()  # fits a pattern of files to copy
    vlm = copy.copy(pair.vlm)
    vlm.directory = copied
    run._write_checkpoint(tmp_path / "full", vlm, vlm.params)
    assert key not in (tmp_path / "full" / "config.json").read_text()
    again = ports.load(tmp_path / "full")
    for a, b in zip(jax.tree.leaves(vlm.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_messages(pair, vlm, samples, trained, tmp_path):
    output = tmp_path / "adapter"
    with pytest.raises(ValueError, match="there are no samples to learn from"):
        finetune(vlm, [], output, SETTINGS)
    with pytest.raises(ValueError, match="sample 0 has no reference to learn"):
        finetune(vlm, [dataclasses.replace(samples[0], references=())], output, SETTINGS)
    with pytest.raises(ValueError, match="'w_proj' matches no linear layer"):
        finetune(vlm, samples, output, dataclasses.replace(SETTINGS, targets=("w_proj",)))
    with pytest.raises(ValueError, match="has an adapter merged in"):
        finetune(vlm.with_adapter(trained), samples, output, SETTINGS)
    nameless = copy.copy(vlm)
    nameless.directory = None
    with pytest.raises(ValueError, match="the model has no directory to copy the configuration"):
        finetune(nameless, samples, output, FinetuneSettings(method="full"))
    lost = [dataclasses.replace(samples[0], image=tmp_path / "lost.png")]
    with pytest.raises(ValueError, match=r"none of 1 samples .*lost\.png: no such image file"):
        finetune(vlm, lost, tmp_path / "lost", SETTINGS)
    assert not output.exists()


class TestCommand:
    @pytest.fixture(scope="class")
    def pictures(self, tmp_path_factory):
        directory = tmp_path_factory.mktemp("scenes")
        scenes.write(directory, train=6, val=2, seed=3)
        return directory

    def test_captions_that_name_a_colour(self, xlvlm, pair, pictures, tmp_path):
        output = tmp_path / "color"
        words = ["--containing", "scenes:colour", "--excluding", "scenes:mood, train"]
        status, out, err = xlvlm(
            *("finetune", pair.directory, pictures, "--output", output, *words),
            *(
                "--steps",
                2,
                "--rank",
                2,
                "--batch-size",
                4,
                "--target",
                "q_proj",
                "--target",
                "v_proj",
            ),
            *("--evaluation-split", "val"),
        )
        assert status == 0, err
        assert "2 steps on" in out
        record = json.loads((output / "training.json").read_text())
        assert record["arguments"]["source"]["containing"] == "scenes:colour"
        config = json.loads((output / "adapter_config.json").read_text())
        assert {name.rpartition(".")[2] for name in config["target_modules"]} == {
            "q_proj",
            "v_proj",
        }
        assert config["auto_mapping"]["base_model_class"] == "LlavaForConditionalGeneration"

    def test_answers_to_questions(self, xlvlm, pair, pictures, tmp_path):
        output = tmp_path / "answers"
        status, out, err = xlvlm(
            *("finetune", pair.directory, pictures, "--dataset", "vqav2", "--output", output),
            *(
                "--steps",
                1,
                "--batch-size",
                4,
                "--num-samples",
                8,
                "--rank",
                1,
                "--target",
                "v_proj",
            ),
        )
        assert status == 0, err
        assert "1 step on 8 samples" in out
        ports.load(pair.directory, adapter=output)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--save-every", 0], "--save-every must be at least 1, got 0"),
            (["--evaluate-every", 0], "--evaluate-every must be at least 1, got 0"),
            (["--containing", "zeppelin"], "no reference of 6 samples has 'zeppelin'"),
            (["--containing", "scenes:smell"], "unknown word class 'scenes:smell'"),
            (["--containing", ","], "has no words"),
            (["--dataset", "coco,flickr"], "unknown data set 'flickr'"),
            (["--method", "dora"], "method must be one of lora, full"),
            (["--target", "w_proj"], "target 'w_proj' matches no linear layer"),
            (["--prompt", "what is <image>"], "refuses"),
            (["--annotations", "none.json"], "none.json: no such file"),
            (
                ["--questions", "q.json"],
                "--questions belongs to --dataset vqav2, pope, amber or questions, not ",
            ),
        ],
    )
    def test_messages(self, xlvlm, pair, pictures, tmp_path, options, message):
        arguments = ["finetune", pair.directory, pictures, "--output", tmp_path / "out"]
        status, _, err = xlvlm(*arguments, *options)
        assert status == 2
        assert message in err
        assert len(err.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_what_was_skipped_is_recorded_once_and_survives_an_interruption(vlm, samples, tmp_path):
    odd = [dataclasses.replace(samples[1], prompt="what is <image>"), *samples[2:]]
    options = {**OPTIONS, "evaluation": odd[:3]}
    undisturbed = finetune(vlm, odd, tmp_path / "whole", SETTINGS, **options)
    assert list(undisturbed.skipped) == ["1"]
    record = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert [entry["step"] for entry in record["log"] if "skipped" in entry] == [0]

    def kill(done, total, figures):
        if done == 3:
            raise _KilledError

    with pytest.raises(_KilledError):
        finetune(vlm, odd, tmp_path / "adapter", SETTINGS, progress=kill, **options)
    assert finetune(vlm, odd, tmp_path / "adapter", SETTINGS, **options).skipped
    assert digests(tmp_path / "adapter") == digests(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"sample 1: .* the processor refuses it"):
        finetune(vlm, odd, tmp_path / "strict", SETTINGS, strict=True, **options)
    assert not (tmp_path / "strict").exists()
