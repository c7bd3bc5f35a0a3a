"""--dry-run: prints what a command would need, and writes nothing."""

import json
import sys

import numpy as np
import pytest

from xlvlm_jax import SteeringVector, data
from xlvlm_jax.data import scenes
from xlvlm_jax.features.writer import FeaturesWriter

NORM = "language_model.model.norm"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scenes")
    scenes.write(directory, train=6, val=3, seed=1)
    return directory


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Returns features of twelve rows of width eight, answered with yes and no."""
    path = tmp_path_factory.mktemp("run") / "features"
    samples = [{"id": str(i), "prediction": ("yes", "no")[i % 2]} for i in range(12)]
    states = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    rows = np.arange(12)
    with FeaturesWriter(path, {"model": "m"}) as writer:
        writer.append(samples, {NORM: states}, rows, rows, rows)
        writer.close()
    return path


def extraction(pictures, output):
    sites = ("--site", NORM, "--site", "language_model.model.layers.4")
    selection = ("--tokens", "index:-1", "--max-new-tokens", 3, "--batch-size", 4)
    return ("extract", "embedded", pictures, "--output", output, *sites, *selection)


def test_extract(xlvlm, pictures, tmp_path):
    status, out, errors = xlvlm(*extraction(pictures, tmp_path / "features"), "--dry-run")
    assert status == 0, errors
    assert "samples: 6\n" in out
    assert "rows: at most 6 for each of 2 sites" in out
    assert "programs: 1 among the batches checked, for prompt lengths" in out
    assert not (tmp_path / "features").exists()


def test_extract_of_two_models(xlvlm, pictures, tmp_path, monkeypatch):
    module = sys.modules["xlvlm_jax.features.preflight"]
    monkeypatch.setattr(module, "_compiled_memory", lambda *_: (10**9, 0))
    monkeypatch.setattr(module, "disk_needs", lambda *_, models: (6, models * 10**7))
    for more, disk, memory in (((), "10.0", "1.000"), (("--finetuned", "color"), "20.0", "2.000")):
        asked = (*extraction(pictures, tmp_path / "features"), *more, "--dry-run")
        status, out, errors = xlvlm(*asked)
        assert status == 0, errors
        out = " ".join(out.split())
        assert f" {disk} MB in" in out and f"parameters {memory} GB" in out
    status, _, errors = xlvlm(*asked, "--vector", tmp_path / "gone.safetensors")
    assert status == 2 and "gone.safetensors" in errors


def test_images_that_are_missing_are_counted(xlvlm, pictures, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(pictures, copy)
    gone = sorted(copy.rglob("*.png"), key=str) or sorted(copy.rglob("*.jpg"), key=str)
    train = [path for path in gone if "train" in str(path)] or gone
    train[0].unlink()
    status, out, errors = xlvlm(*extraction(copy, tmp_path / "features"), "--dry-run")
    assert status == 0, errors
    assert "1 images missing" in out
    assert f"missing: {train[0]}" in errors.replace("\n", "")


@pytest.mark.parametrize("method", ["snmf", "kmeans", "pca", "simple"])
def test_decompose(xlvlm, features, tmp_path, method):
    status, out, errors = xlvlm(
        *("decompose", features, "--output", tmp_path / "concepts", "--num-concepts", 3),
        *("--method", method, "--dry-run"),
    )
    assert status == 0, errors
    assert "[12, 8] of float32" in out and "memory per device" in out
    out = " ".join(out.split())
    assert "process memory about" in out and "streamed" not in out
    assert not (tmp_path / "concepts").exists()


def test_decompose_streamed(xlvlm, features, tmp_path):
    place = ("decompose", features, "--output", tmp_path / "concepts", "--num-concepts", 3)
    for method in ("snmf", "kmeans", "pca"):
        status, out, errors = xlvlm(*place, "--method", method, "--stream", "--dry-run")
        assert status == 0, errors
        assert "streamed: a few tiles and some columns of every row" in " ".join(out.split())
    status, _, errors = xlvlm(*place, "--method", "simple", "--stream", "--dry-run")
    assert status == 2 and "'simple' can't be streamed; expected one of snmf, kmeans" in errors
    assert not (tmp_path / "concepts").exists()


@pytest.mark.parametrize(
    "method", [("coarse", "--target", "no"), ("fine", "--num-concepts", 2)], ids=lambda m: m[0]
)
def test_steer_fit(xlvlm, features, tmp_path, method):
    status, out, errors = xlvlm(
        *("steer", "fit", features, "--output", tmp_path / "vector", "--method", *method),
        *("--source", "yes", "--dry-run"),
    )
    assert status == 0, errors
    assert "nothing, a dry run" in out
    assert not (tmp_path / "vector").exists()


@pytest.mark.parametrize("command", ["evaluate", "steer apply"])
def test_evaluate_and_apply(xlvlm, pictures, tmp_path, vlm, command):
    vector = tmp_path / "v.safetensors"
    width = vlm.site_shapes[NORM][-1]
    source = {"source": ["bird"], "target": ["red"]}
    SteeringVector(np.ones(width, np.float32), NORM, source).save(vector)
    asked = (
        *(*command.split(), "embedded", pictures, "--output", tmp_path / "out"),
        *("--split", "val", "--vector", vector, "--num-samples", 5, "--dry-run"),
    )
    status, out, errors = xlvlm(*asked)
    assert status == 0, errors
    assert "samples: 5; 10 answers, 2 conditions per batch at once" in out
    answers = {sample.id: "red" for sample in data.load("vqav2", pictures, "val")}
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    status, out, errors = xlvlm(*asked, "--baseline", tmp_path / "answers.json")
    assert status == 0, errors
    assert "samples: 5; 5 answers, 1 conditions per batch at once" in out
    assert not (tmp_path / "out").exists()
