"""The command line end to end on a few drawn scenes, and its messages for bad input."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xlvlm_jax import Concepts, Features
from xlvlm_jax.data import scenes
from xlvlm_jax.demo import embedded

NORM = "language_model.model.norm"
SITE = ("--output", "out", "--site", NORM)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("scenes")
    scenes.write(directory, train=16, seed=3)
    return directory


def test_from_pictures_to_a_page(xlvlm, pictures, tmp_path):
    """Runs extract, decompose, ground and report, each from the files of the one before."""
    features, concepts = tmp_path / "features", tmp_path / "concepts"
    where = ["--output", features, "--site", NORM, "--batch-size", 8]
    status, out, _ = xlvlm("extract", "embedded", pictures, *where, "--tokens", "index:-1")
    assert status == 0
    assert "16 samples, 16 rows" in out.replace("\n", " ")
    assert Features.open(features).matrix(NORM).shape == (16, 192)

    status, out, _ = xlvlm("decompose", features, "--output", concepts, "--num-concepts", 3)
    assert status == 0
    assert "snmf: 3 concepts from 16 rows" in out

    status, out, _ = xlvlm("ground", concepts, "--model", "embedded", "--num-images", 2)
    assert status == 0
    grounded = Concepts.load(concepts)
    assert len(grounded.words) == 3
    assert [len(images) for images in grounded.images] == [2, 2, 2]

    status, _, _ = xlvlm("report", tmp_path)
    assert status == 0
    assert "<html" in (tmp_path / "report.html").read_text()


def test_sites_are_listed_in_network_order(xlvlm):
    status, out, _ = xlvlm("sites", "embedded", "--pattern", "model.layers.")
    names = out.split()
    assert status == 0
    assert "language_model.model.layers.0.self_attn" in names
    assert names.index("language_model.model.layers.0") < names.index(
        "language_model.model.layers.7"
    )


def test_sites_need_no_weights(xlvlm, tmp_path):
    shutil.copy(embedded.LLAVA / "config.json", tmp_path)
    status, out, _ = xlvlm("sites", tmp_path, "--pattern", "language_model.**.layers.*")
    assert status == 0
    assert out.split() == [f"language_model.model.layers.{i}" for i in range(8)]
    status, out, _ = xlvlm("sites", tmp_path, "--pattern", "model.language_model.layers.1")
    assert (status, out.split()) == (0, ["language_model.model.layers.1"])
    status, out, _ = xlvlm("sites", tmp_path, "--pattern", "language_model.**.heads")
    assert status == 0
    assert out.split() == [f"language_model.model.layers.{i}.self_attn.heads" for i in range(8)]


def test_a_pattern_of_sites_from_pictures_to_concepts(xlvlm, pictures, tmp_path):
    features = tmp_path / "features"
    where = ["--output", features, "--num-samples", 4, "--batch-size", 4, "--max-new-tokens", 1]
    status, _, _ = xlvlm(
        "extract", "embedded", pictures, *where, "--site", "layers.?", "--tokens", "index:-1"
    )
    names = tuple(f"language_model.model.layers.{i}" for i in range(8))
    assert status == 0
    assert Features.open(features).sites == names

    def decompose(site, *options):
        options = ["--output", tmp_path / "concepts", "--num-concepts", 2, *options]
        return xlvlm("decompose", features, "--method", "simple", "--site", site, *options)

    status, _, _ = decompose("model.language_model.layers.3")  # its name in transformers
    assert status == 0
    assert Concepts.load(tmp_path / "concepts").source["site"] == names[3]
    status, out, _ = decompose("layers.*", "--dry-run")
    assert status == 0
    assert out.count("memory per device") == 8
    status, _, _ = decompose("layers.*")
    assert status == 0
    for name in names:
        assert Concepts.load(tmp_path / f"concepts-{name}").source["site"] == name
    status, _, err = xlvlm(
        "shift",
        features,
        features,
        "--site",
        "layers.*",
        "--concepts",
        tmp_path / "concepts",
        "--model",
        "embedded",
        "--output",
        tmp_path / "shift",
    )
    assert status == 2
    assert "and 3 more; choose one that both hold, got 'layers.*'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sites", "no/such/directory"], "no directory 'no/such/directory'; expected one with"),
        (["decompose", "nowhere", "--output", "out"], "nowhere: no manifest.json"),
        (["report", "nowhere"], "nowhere"),
        (["ground", "nowhere", "--model", "embedded"], "run `xlvlm decompose` first"),
        (["scenes", "out", "--train", "-1"], "-1"),
        (
            [
                "extract",
                "embedded",
                "nowhere",
                "--output",
                "out",
                "--site",
                NORM,
                "--tokens",
                "index:-1",
            ],
            "nowhere",
        ),
        (
            [
                "extract",
                "embedded",
                "nowhere",
                "--output",
                "out",
                "--site",
                NORM,
                "--tokens",
                "every:third",
            ],
            "token selection must be one of all, index, range",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(xlvlm, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = xlvlm(*arguments)
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_is_named(xlvlm):
    status, _, err = xlvlm("decompose", "x", "--concepts", "3")
    assert status == 2
    assert "--concepts" in err


def test_a_bug_is_one_line_and_status_1(xlvlm, monkeypatch):
    from xlvlm_jax import report

    def fail(run, output, **_):
        raise RuntimeError("broken\nin two lines")

    monkeypatch.setattr(report, "write_report", fail)
    status, _, err = xlvlm("report", "run")
    assert status == 1
    assert err.strip() == (
        "error: RuntimeError: broken in two lines (for a traceback: xlvlm --debug COMMAND)"
    )


def test_every_command_explains_itself():
    environment = {**os.environ, "COLUMNS": "100"}
    commands = "demo sites scenes extract decompose ground score report train-demo".split()  # noqa: SIM905
    code = (
        "from typer.testing import CliRunner; from xlvlm_jax.cli import app\n"
        f"for command in {commands!r}:\n"
        "    result = CliRunner().invoke(app, [command, '--help'])\n"
        "    assert result.exit_code == 0 and 'Usage' in result.output, command\n"
    )
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("ground gone --num-words 0", "--num-words must be at least 1, got 0"),
        ("causal gone --batch-size 0", "--batch-size must be at least 1, got 0"),
        ("lens gone gone.png --num-words 0", "--num-words must be at least 1, got 0"),
        (
            "fit-lens gone gone --output x --batch-size -1",
            "--batch-size must be at least 1",
        ),
        ("evaluate gone gone --output x --max-new-tokens 0", "--max-new-tokens must be at least 1"),
        ("explain gone 1 --concepts gone --num-concepts 0", "--num-concepts must be at least 1"),
        ("judge gone gone --batch-size 0", "--batch-size must be at least 1, got 0"),
        (
            "steer apply gone gone --vector v --output x --num-samples 0",
            "--num-samples must be at least 1, got 0",
        ),
        ("steer fit gone --output x --method l2s --batch-size 0", "--batch-size must be at least"),
        ("steer fit gone --output x --method learned --steps -1", "--steps must be at least 1"),
        (
            "steer rank gone --output x --num-targets 0",
            "--num-targets must be at least 1, got 0",
        ),
        (
            "steer rank gone --output x --max-new-tokens 0",
            "--max-new-tokens must be at least 1, got 0",
        ),
        (
            "steer sweep gone gone --output x --choose-on train --at-once 0",
            "--at-once must be at least 1, got 0",
        ),
        (
            "steer sweep gone gone --output x --choose-on train --vector v --fit-source yes",
            "--fit-source has no effect without --features; omit it",
        ),
        (
            "steer sweep gone gone --output x --choose-on train --features f --num-samples 4",
            "--num-samples has no effect without --split; omit it",
        ),
        (
            "extract gone gone --output x --site s --tokens all --alpha 2",
            "--alpha has no effect without --vector; omit it",
        ),
        ("lens gone gone --where all", "--where has no effect without --vector; omit it"),
        (
            "shift gone gone --concepts gone --output x --reduce mode",
            "--reduce is 'mode'; expected one of mean, median, trimmed_mean",
        ),
        (
            "score --methods snmf,nope --features gone --output x",
            "unknown method 'nope'; expected some of",
        ),
        (
            "score --methods snmf --num-concepts 5,0 --features gone --output x",
            "the numbers of concepts must be at least 1, got 5, 0",
        ),
    ],
)
def test_options_are_checked_before_anything_is_read(
    xlvlm, tmp_path, monkeypatch, command, message
):
    """No such directory or model exists, and none is asked for."""
    monkeypatch.chdir(tmp_path)
    words = command.split()
    needs_model = words[0] in ("ground", "causal", "shift", "score") or words[1] == "rank"
    status, _, errors = xlvlm(*words, *(("--model", "gone") if needs_model else ()))
    assert status == 2 and message in errors, errors
    assert len(errors.strip().splitlines()) == 1


def test_a_damaged_picture_is_bad_input(xlvlm, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    page = ("--output", tmp_path / "lens.html")
    status, _, errors = xlvlm("lens", "gone", tmp_path / "broken.png", *page)
    assert status == 2 and "broken.png: not an image in a known format" in errors
    assert len(errors.strip().splitlines()) == 1
