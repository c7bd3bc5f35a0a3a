"""Existing outputs are only replaced on request; otherwise one line and status 2, at once."""

import dataclasses
import json

import numpy as np
import pytest

from xlvlm_jax import Concepts, SteeringVector
from xlvlm_jax.cli import steer_fit
from xlvlm_jax.data import scenes
from xlvlm_jax.features.writer import FeaturesWriter

SITE = "language_model.model.norm"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns a run directory: features of eight answers, two concepts with words, a vector."""
    run = tmp_path_factory.mktemp("run")
    with FeaturesWriter(run / "features", {"model": "m"}) as writer:
        rows = np.arange(8)
        answers = [{"id": str(i), "prediction": ("yes", "no")[i % 2]} for i in rows]
        writer.append(answers, {SITE: np.eye(8, 192, dtype="f4")}, rows, rows, rows)
        writer.close()
    learnt = Concepts.from_components(np.eye(2, 192), alpha=0.1)
    source = {"features": str(run / "features"), "site": SITE}
    learnt = dataclasses.replace(learnt, words=[["a"], ["b"]], source=source)
    dataclasses.replace(learnt, activations=np.eye(8, 2, dtype="f4")).save(run / "concepts")
    (run / "vectors").mkdir()
    SteeringVector(np.ones(192, "f4"), SITE, source).save(run / "vectors" / "v.safetensors")
    scenes.write(run / "scenes", train=2, val=0, test=2, seed=5)
    return run


def contents(path):
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    return {file: file.read_bytes() for file in files}


COMMANDS = {
    "decompose": ("decompose", "features", "--num-concepts", 2),
    "score": ("score", "concepts"),
    "report": ("report", "."),
    "shift": ("shift", "features", "features", "--concepts", "concepts", "--model", "embedded"),
    "export-pth": ("export-pth", "features"),
    "steer fit": ("steer", "fit", "features", "--source", "yes", "--target", "no"),
    "steer fit fine": ("steer", "fit", "features", "--method", "fine"),
    "steer rank": ("steer", "rank", "vectors", "--model", "embedded"),
    "steer apply": ("steer", "apply", "embedded", "scenes", "--vector", "vectors/v.safetensors"),
    "evaluate": ("evaluate", "embedded", "scenes", "--split", "test"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_existing_outputs_stay(xlvlm, run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(run)
    output = tmp_path / "there"
    if name in ("report", "export-pth", "steer fit", "steer rank"):
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "scores.json").write_text('{"dictionaries": []}')
    before = contents(output)
    status, out, errors = xlvlm(*COMMANDS[name], "--output", output)
    assert status == 2
    line = " ".join(errors.split())
    assert "there" in line and "--overwrite" in line
    assert len(errors.strip().splitlines()) == 1 and out == ""
    assert contents(output) == before


def test_words_and_drawn_scenes_and_a_whole_demo_stay(xlvlm, run, tmp_path):
    before = contents(run / "concepts")
    status, _, errors = xlvlm("ground", run / "concepts", "--model", "embedded")
    assert status == 2 and "already holds words; replace them with --overwrite" in errors
    assert contents(run / "concepts") == before
    status, _, errors = xlvlm("scenes", run / "scenes", "--train", 1)
    assert status == 2 and "--overwrite" in errors
    (tmp_path / "vqav2").mkdir()
    (tmp_path / "vqav2" / "dataset_coco.json").write_text('{"images": []}')
    status, _, errors = xlvlm("scenes", tmp_path / "vqav2", "--train", 1, "--overwrite")
    assert status == 2 and "only drawn scenes are replaced" in " ".join(errors.split())
    assert len(contents(tmp_path / "vqav2")) == 1
    (tmp_path / "run.json").write_text("{}")
    status, _, errors = xlvlm("demo", "--output", tmp_path)
    assert status == 2 and "run.json exists" in errors


def test_it_is_replaced_on_request(xlvlm, run, tmp_path):
    scored = ("score", run / "concepts", "--output", tmp_path)
    (tmp_path / "scores.json").write_text('{"attributes": {}}')
    assert xlvlm(*scored)[0] == 0  # joins what the file holds of others
    assert xlvlm(*scored)[0] == 2
    assert xlvlm(*scored, "--overwrite")[0] == 0
    assert set(json.loads((tmp_path / "scores.json").read_text())) == {
        *("version", "attributes", "scored on", "dictionaries"),
    }
    fit = ("steer", "fit", run / "features", "--target", "no", "--output", tmp_path / "v.st")
    assert xlvlm(*fit, "--source", "yes")[0] == 0
    first = (tmp_path / "v.st").read_bytes()
    assert xlvlm(*fit)[0] == 2 and (tmp_path / "v.st").read_bytes() == first
    assert xlvlm(*fit, "--overwrite")[0] == 0 and (tmp_path / "v.st").read_bytes() != first


def test_the_old_one_stays_where_there_is_no_new_one(xlvlm, run, tmp_path):
    (tmp_path / "mine.safetensors").touch()
    fine = ("steer", "fit", run / "features", "--method", "fine", "--num-concepts", 1)
    status, _, errors = xlvlm(*fine, "--output", tmp_path, "--overwrite")
    assert status == 2 and "num_concepts is 1; expected at least 2" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]
    shift = [*COMMANDS["shift"], "--beside", tmp_path, "--beside", tmp_path]
    shift = [run / each if each in ("features", "concepts") else each for each in shift]
    status, _, errors = xlvlm(*shift, "--output", tmp_path / "new")
    assert status == 2 and "--beside names a shift twice, or the output" in errors
    with pytest.raises(ValueError, match="there is no vector to write"):
        steer_fit._write(tmp_path, {}, several=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("score", ("--protocol", "xl-vlms")),
        ("score", ("--no-through-norm",)),
        ("score", ("--word-rules", "default")),
        ("score", ("--seeds", 3)),
    ],
    ids=str,
)
def test_options_without_effect(xlvlm, run, tmp_path, name, option):
    status, _, errors = xlvlm(name, run / "concepts", *option, "--output", tmp_path)
    option = option[0].replace("--no-", "--")
    assert status == 2 and f"{option} has no effect without --methods; omit it" in errors


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ("decompose", "features", "--dictionary", "sae", "--seed", 1, "--output", "new"),
            "--seed has no effect with --dictionary, which is not learnt",
        ),
        (
            ("explain", "concepts", "0", "--prompt", "Why?"),
            "--prompt has no effect without --concepts, as no model is run",
        ),
        (
            *(("extract", "embedded", "scenes", "--site", "layers.3", "--tokens", "all"),),
            "--any-case has no effect without --containing",
        ),
        (
            ("finetune", "embedded", "scenes", "--output", "new", "--evaluate-every", 3),
            "--evaluate-every has no effect without --evaluation-split",
        ),
        (
            ("finetune", "embedded", "scenes", "--output", "new", "--method", "full", "--rank", 3),
            "--rank has no effect with --method full",
        ),
        (
            ("map", "embedded", "--concepts", "concepts", "--prompt", "Why?"),
            "--prompt has no effect without pictures",
        ),
        (
            ("export-pth", "concepts", "--output", "new.pth", "--site", SITE),
            "--site has no effect on concepts, which are of one site",
        ),
        (
            ("evaluate", "embedded", ".", "--dataset", "mmsb", "--java", "--output", "new"),
            "--java has no effect on answers without references",
        ),
        (
            ("extract", "embedded", ".", "--dataset", "mmsb", "--annotations", "a.json"),
            "--annotations does not belong to --dataset mmsb; omit it",
        ),
        (
            ("extract", "embedded", "scenes", "--draw"),
            "--first/--draw has no effect without --num-samples; omit it",
        ),
        (("inspect", "embedded", "--image-size", "0x0"), "'0x0'; expected WIDTHxHEIGHT"),
        (("inspect", "embedded", "--batch-size", 0), "--batch-size must be at least 1, got 0"),
    ],
    ids=str,
)
def test_options_without_effect_on_other_commands(xlvlm, run, monkeypatch, command, message):
    """They were ignored, or ended in a traceback."""
    monkeypatch.chdir(run)
    if command[0] == "extract":
        command = (*command, "--output", "new")
        if "--tokens" not in command:
            command = (*command, "--site", "layers.3", "--tokens", "all")
        else:
            command = (*command, "--any-case")
    status, _, errors = xlvlm(*command)
    assert status == 2 and message in " ".join(errors.split())
    assert len(errors.strip().splitlines()) == 1 and not (run / "new").exists()


def test_a_dry_run_writes_nothing_and_is_not_refused(xlvlm, run, tmp_path):
    (tmp_path / "mine").touch()
    again = ("decompose", run / "features", "--num-concepts", 2, "--output", tmp_path)
    assert xlvlm(*again, "--dry-run")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


FINE = ("--method", "fine", "--num-concepts", 2, "--source", "yes")


def test_nothing_but_vectors_is_replaced_by_vectors(xlvlm, run, tmp_path):
    """A run directory as the output of several vectors kept its vectors alone."""
    fine = ("steer", "fit", run / "features", *FINE, "--overwrite")
    before = contents(run)
    status, _, errors = xlvlm(*fine, "--output", run)
    assert status == 2 and "features; choose a new directory" in " ".join(errors.split())
    (tmp_path / "features").mkdir()
    status, _, errors = xlvlm(*fine, "--output", tmp_path)
    line = " ".join(errors.split())
    assert status == 2 and "holds features, and only vectors (*.safetensors) are replaced" in line
    assert contents(run) == before
    file = tmp_path / "file"
    file.write_text("mine")
    status, _, errors = xlvlm(*fine, "--output", file)
    assert status == 2 and "is a file; expected a directory" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features", "file"]
    old = tmp_path / "vectors"
    old.mkdir()
    (old / "old.safetensors").touch()
    status, _, errors = xlvlm(*fine, "--output", old)
    assert status == 0, errors
    assert {path.suffix for path in old.iterdir()} == {".safetensors"}
    assert not (old / "old.safetensors").exists()


def test_a_sweep_removes_nothing_but_a_sweep(xlvlm, run, tmp_path):
    vectors = tmp_path / "out" / "vectors"
    vectors.mkdir(parents=True)
    vector = vectors / "v.safetensors"
    vector.write_bytes((run / "vectors" / "v.safetensors").read_bytes())
    sweep = (
        *("steer", "sweep", "embedded", run / "scenes", "--output", tmp_path / "out"),
        *("--choose-on", "train", "--overwrite", "--source", "yes", "--target", "no"),
    )
    status, _, errors = xlvlm(*sweep, "--vector", vector)
    line = " ".join(errors.split())
    assert status == 2 and "v.safetensors; choose a new directory" in line
    (tmp_path / "out" / "notes.txt").write_text("mine")
    status, _, errors = xlvlm(*sweep, "--vector", run / "vectors")
    assert status == 2 and "holds notes.txt, and only files of a sweep are replaced" in " ".join(
        errors.split()
    )
    assert vector.is_file()


@pytest.mark.parametrize("name", ["evaluate", "steer apply", "decompose", "shift", "score"])
def test_a_file_where_a_directory_is_written(xlvlm, run, tmp_path, monkeypatch, name):
    """It was found when all answers were there."""
    monkeypatch.chdir(run)
    (tmp_path / "there").write_text("mine")
    for output in (tmp_path / "there", tmp_path / "there" / "inside"):
        status, _, errors = xlvlm(*COMMANDS[name], "--output", output, "--overwrite")
        assert status == 2 and "is a file; expected a directory" in " ".join(errors.split())


@pytest.mark.parametrize("name", ["steer fit", "steer rank"])
def test_a_directory_where_a_file_is_written(xlvlm, run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(run)
    status, _, errors = xlvlm(*COMMANDS[name], "--output", tmp_path, "--overwrite")
    assert status == 2 and "is a directory; expected a file to write" in " ".join(errors.split())
