"""`xlvlm evaluate` and `xlvlm steer apply` on the embedded model."""

import json
import shutil

import pytest

from xlvlm_jax.demo import embedded


@pytest.fixture
def saved(vector, tmp_path):
    vector.save(tmp_path / "v.safetensors")
    return tmp_path / "v.safetensors"


def test_apply_chooses_on_one_split_and_steers_another(xlvlm, pictures, saved, tmp_path):
    output = tmp_path / "run" / "steering" / "yes-no"
    status, out, errors = xlvlm(
        *("steer", "apply", "embedded", pictures, "--split", "test", "--choose-on", "train"),
        *("--num-choose", 24, "--vector", saved, "--output", output, "--instruction", "Answer no."),
        *("--alpha", 0.5, "--alpha", 1, "--batch-size", 16, "--max-new-tokens", 3),
    )
    assert status == 0, errors
    assert "best of 2 trials on train" in out
    summary = json.loads((output / "summary.json").read_text())
    assert list(summary["conditions"]) == ["plain", "steered", "instruction"]
    assert summary["source"] == ["yes"]
    assert {path.name for path in output.iterdir()} == {
        "summary.json",
        "predictions.jsonl",
        "answers.svg",
        "sweep.svg",
    }
    status, _, errors = xlvlm("report", tmp_path / "run")
    assert status == 0, errors
    assert "Steering" in (tmp_path / "run" / "report.html").read_text()


def test_evaluate_without_a_vector(xlvlm, pictures, tmp_path):
    status, out, errors = xlvlm(
        *("evaluate", "embedded", pictures, "--split", "test", "--output", tmp_path / "plain"),
        *("--batch-size", 16, "--max-new-tokens", 3),
    )
    assert status == 0, errors
    assert "accuracy %" in out
    assert "unreadable" in out
    summary = json.loads((tmp_path / "plain" / "summary.json").read_text())
    assert "changes" not in summary["conditions"]["plain"]


def test_descriptions_of_amber(xlvlm, pictures, tmp_path):
    written = {
        "query/query_generative.json": [{"id": 1, "image": "AMBER_1.jpg", "query": "Describe."}],
        "annotations.json": [{"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["sea"]}],
        "relation.json": {"dog": ["puppy"], "sea": []},
    }
    (tmp_path / "amber" / "data" / "query").mkdir(parents=True)
    for name, content in written.items():
        (tmp_path / "amber" / "data" / name).write_text(json.dumps(content))
    (tmp_path / "amber" / "data" / "safe_words.txt").write_text("light\n")
    shutil.copy(next((pictures / "val2014").iterdir()), tmp_path / "amber" / "AMBER_1.jpg")
    (tmp_path / "earlier.json").write_text('{"1": "Two puppies by the sea."}')
    arguments = ("evaluate", "embedded", tmp_path / "amber", "--dataset", "amber")
    status, out, errors = xlvlm(
        *(*arguments, "--task", "chair", "--baseline", tmp_path / "earlier.json"),
        *("--output", tmp_path / "out"),
    )
    assert status == 0, errors
    assert "AMBER %" in out and "cover" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    scores = summary["conditions"]["plain"]["AMBER"]["plain"]
    assert scores == {"chair": 0.5, "cover": 1, "hal": 1, "cog": 1, "length": 5}
    for options, message in {
        ("--task", "chair", "--split", "existence"): "split generative, not existence; omit --spl",
        ("--split", "generative"): "split generative has no questions; give --task chair too",
        ("--task", "vqa", "--split", "generative"): "has no questions; give --task chair too",
    }.items():
        status, _, errors = xlvlm(*arguments, *options, "--output", tmp_path / "none")
        assert status == 2 and message in " ".join(errors.split())
    (tmp_path / "amber" / "data" / "relation.json").unlink()
    status, _, errors = xlvlm(*arguments, "--task", "chair", "--output", tmp_path / "none")
    assert status == 2 and "relation.json: no such file" in " ".join(errors.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--where", "from:now"), "expected from:INDEX"),
        (("--source", "yes", "--target", "sphinx"), "target words sphinx as its answer"),
        (
            ("--dataset", "coco", "--words", "sphinx,griffin"),
            "contains one of the words sphinx, griffin",
        ),
        (("--dataset", "coco", "--words", "sphinx"), "contains one of the words sphinx;"),
        (("--dataset", "coco", "--words", "colour"), "nearly the class of words 'colours'"),
        (("--baseline", "gone"), "gone: no such file; expected a directory of `xlvlm evaluate`"),
        (("--adapter", "nope", "--dry-run"), "has no adapter 'nope'; expected color, place"),
        (("--dataset", "coco", "--source", "yes"), "use --words for captions"),
        (("--words", "colours"), "use --source and --target for questions"),
        (("--split", "dev"), "no split 'dev'"),
        (("--java",), "--java has no effect on questions; omit it"),
        (
            ("--task", "captions", "--dataset", "scenes", "--words", "dog", "--without", "other"),
            "--without has no effect on captions; omit it",
        ),
    ],
)
def test_bad_input_is_one_line(xlvlm, pictures, saved, tmp_path, options, message):
    status, _, errors = xlvlm(
        *("evaluate", "embedded", pictures, "--split", "test", "--vector", saved),
        *("--output", tmp_path / "out", *options),
    )
    assert status == 2
    assert message in " ".join(errors.split())
    assert len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["alpha", "where", "edit"])
def test_options_of_a_vector_need_one(xlvlm, pictures, tmp_path, option):
    value = {"alpha": 1, "where": "all", "edit": "add"}[option]  # also their default
    status, _, errors = xlvlm(
        *("evaluate", "embedded", pictures, "--output", tmp_path / "out", f"--{option}", value)
    )
    assert status == 2 and f"--{option} has no effect without --vector; omit it" in errors


@pytest.mark.parametrize("option", ["wanted", "max-cost", "num-choose"])
def test_options_of_choosing_need_a_split(xlvlm, pictures, saved, tmp_path, option):
    status, _, errors = xlvlm(
        *("steer", "apply", "embedded", pictures, "--vector", saved, f"--{option}", 1),
        *("--output", tmp_path / "out"),
    )
    assert status == 2 and f"--{option} has no effect without --choose-on; omit it" in errors


def test_a_split_to_choose_on_must_hold_other_samples(xlvlm, pictures, saved, tmp_path):
    status, _, errors = xlvlm(
        *("steer", "apply", "embedded", pictures, "--split", "test", "--choose-on", "test"),
        *("--vector", saved, "--output", tmp_path / "out"),
    )
    assert status == 2
    assert "every sample in it is also evaluated" in " ".join(errors.split())


@pytest.mark.parametrize("command", ["evaluate", "apply"])
def test_what_is_not_implemented_of_generation_config(xlvlm, pictures, saved, tmp_path, command):
    model = shutil.copytree(embedded.LLAVA, tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": 3, "guidance_scale": 2.0}')
    named = ("evaluate",) if command == "evaluate" else ("steer", "apply")
    status, _, errors = xlvlm(
        *(*named, model, pictures, "--split", "test", "--output", tmp_path / "run"),
        *("--vector", saved),
    )
    assert status == 2 and len(errors.strip().splitlines()) == 1
    assert "guidance_scale is 2.0, which is not implemented" in errors
    assert "--ignore-generation-config" in errors
    assert not (tmp_path / "run").exists()
