"""Runs that are moved, with or without their data, and opened from anywhere."""

import functools
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xlvlm_jax import Concepts, Features, data
from xlvlm_jax.concepts.stage import decompose_features, ground_concepts
from xlvlm_jax.evaluation import Questions, evaluate
from xlvlm_jax.features import ExtractionSettings, extract
from xlvlm_jax.features.selection import Selection
from xlvlm_jax.features.writer import FeaturesWriter
from xlvlm_jax.report import write_report
from xlvlm_jax.storage import pictures

NORM = "language_model.model.norm"


def write(path, images, placed=True):
    """Writes features with one row per sample that name these images."""
    with FeaturesWriter(path, {}) as writer:
        root = writer.record_pictures(images) if placed else None
        rows = np.arange(len(images))
        samples = [
            {"id": str(i), "image": pictures.name_in(root, image)} for i, image in enumerate(images)
        ]
        writer.append(samples, {"norm": np.eye(4, dtype="f4")[: len(rows)]}, rows, rows, rows)
        writer.close()
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Returns a directory with data/a/0.png, data/b/1.png ..., where commands run."""
    for number, folder in enumerate("ab"):
        file = tmp_path / "here" / "data" / folder / f"{number}.png"
        file.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (10 * number,) * 3).save(file)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


TYPED = ("data/a/0.png", "data/b/1.png")


def shown(path, **options):
    """Returns the pixel values that identify pictures."""
    samples = Features.open(path, **options).samples
    return [Image.open(sample["image"]).getpixel((0, 0))[0] for sample in samples]


def test_names_by_hand():
    root = pictures.root_of(["/data/a/0.png", "/data/b/1.png"])
    assert root == Path("/data")
    assert pictures.name_in(root, "/data/a/0.png") == "a/0.png"
    assert pictures.name_in(None, "data/0.png") == "data/0.png"
    assert pictures.root_of(["/data/a/0.png"]) == Path("/data/a")
    assert pictures.root_of([]) is None
    assert pictures.root_of(["/data/0.png", "typed.png"]) is None


def test_from_another_directory_and_after_a_move(here, tmp_path, monkeypatch):
    write(here / "run" / "features", TYPED)
    lines = (here / "run" / "features" / "samples.jsonl").read_text().splitlines()
    stored = [json.loads(line) for line in lines]
    assert [sample["image"] for sample in stored] == ["a/0.png", "b/1.png"]
    monkeypatch.chdir(tmp_path)
    assert shown(here / "run" / "features") == [0, 10]
    # The run alone: its data are where they were.
    shutil.move(here / "run", tmp_path / "archive" / "deep" / "run")
    assert shown(tmp_path / "archive" / "deep" / "run" / "features") == [0, 10]
    # The run together with its data.
    shutil.move(tmp_path / "archive" / "deep" / "run", here / "run")
    shutil.move(here, tmp_path / "there")
    assert shown(tmp_path / "there" / "run" / "features") == [0, 10]
    # The data alone: they are named, by any directory that tells.
    shutil.move(tmp_path / "there" / "data", tmp_path / "pictures")
    features = tmp_path / "there" / "run" / "features"
    lost = [sample["image"] for sample in Features.open(features).samples]
    assert lost == [str(here / "data" / name) for name in ("a/0.png", "b/1.png")]
    assert pictures.missing(lost) == lost
    assert shown(features, images=tmp_path / "pictures") == [0, 10]
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (tmp_path / "pictures").rglob("*.png"):
        shutil.copy(file, flat)
    assert shown(features, images=flat) == [0, 10]
    with pytest.raises(ValueError, match=r"archive has none of the pictures of .*'a/0\.png'; pa"):
        Features.open(features, images=tmp_path / "archive")


def test_pictures_of_one_name_are_not_mixed_up(tmp_path):
    """cats/1.png is never shown for dogs/1.png, nor where most pictures are missing."""
    names = [tmp_path / "data" / folder / f"{i}.png" for folder in ("cats", "dogs") for i in (0, 1)]
    for name in names:
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(name)
    features = write(tmp_path / "features", names)
    shared = r"cats has pictures of .* by their last names alone, which several share, such as '0"
    with pytest.raises(ValueError, match=shared):
        Features.open(features, images=tmp_path / "data" / "cats")
    found = [s["image"] for s in Features.open(features, images=tmp_path / "data").samples]
    assert found == list(map(str, names))
    few = write(tmp_path / "few", names[:1] + [name.with_stem("x") for name in names[1:4:2]])
    with pytest.raises(ValueError, match=shared):
        Features.open(few, images=tmp_path / "data" / "cats")


def test_a_folder_with_some_of_the_pictures(tmp_path):
    """Their names differ, so that each is found or missing; less than half are told."""
    names = [f"{folder}/{folder}{i}.png" for folder in ("cats", "dogs") for i in range(4)]
    recorded = {"root": str(tmp_path / "gone"), "from here": "../gone"}
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in names[:4]:
        (flat / Path(name).name).touch()
    find = functools.partial(pictures.find_all, names, tmp_path, recorded, images=flat)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find() == [str(flat / Path(name).name) for name in names]
    (flat / "cats3.png").unlink()
    with pytest.warns(UserWarning, match="flat has 3 of 8 pictures of .* that were looked up; if"):
        assert len(pictures.missing(find())) == 5


def test_repaired_pictures_are_no_others():
    before = {"0": "a", "2": "b", "4": "c"}
    assert not pictures.are_others(before, {"0": "x", "2": "b", "4": "c"}, 6)
    assert pictures.are_others(before, {"0": "x", "2": "y", "4": "c"}, 6)
    # Of several pictures only one could be read both times; or it is the only one.
    assert not pictures.are_others({"0": "a", "2": "b"}, {"0": "x", "4": "c"}, 6)
    assert pictures.are_others({"0": "a"}, {"0": "x"}, 1)


def test_folders_of_earlier_versions(here, tmp_path, monkeypatch):
    """Names are as typed, relative to the command's directory or to one above the run."""
    typed = write(here / "run" / "features", TYPED, placed=False)
    absolute = write(here / "other", [here / name for name in TYPED], placed=False)
    assert shown(typed) == shown(absolute) == [0, 10]
    monkeypatch.chdir(tmp_path)
    assert shown(typed) == shown(absolute) == [0, 10]
    shutil.move(here / "data", tmp_path / "data2")
    assert Features.open(typed).samples[0]["image"] == TYPED[0]
    for path in (typed, absolute):
        assert shown(path, images=tmp_path / "data2") == [0, 10]
    with FeaturesWriter(tmp_path / "begun", {}) as writer:
        writer.append([{"id": "0", "image": "x"}], {}, *np.zeros((3, 0), int))
    with FeaturesWriter(tmp_path / "begun", {}) as writer:
        assert writer.record_pictures(["/data/x"]) is None


def test_a_damaged_record_is_one_line(here):
    features = write(here / "features", TYPED)
    for damaged in ("[", "[]", '{"root": 3}'):
        (features / "images.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"images\.json: does not say where the pictures are"):
            Features.open(features)


def test_names_that_no_file_can_have_are_unchanged(here):
    names = ["x" * 5000, "a\0b.png"]
    assert pictures.find_all(names, here, None) == names
    assert pictures.missing(names) == names
    assert pictures.find_features("x" * 5000, here) == "x" * 5000


def test_concepts_name_features_and_images_that_open_from_anywhere(
    here, tmp_path, monkeypatch, three_words
):
    write(Path("run/features"), TYPED)
    features = Features.open("run/features")
    decompose_features(features, Path("run/concepts"), 2, "kmeans")
    ground_concepts(Path("run/concepts"), three_words, features, num_images=1)
    text = (here / "run" / "concepts" / "concepts.json").read_text()
    assert json.loads(text)["source"]["features"] == "../features"
    shutil.move(here, tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    concepts = Concepts.load("there/run/concepts")
    assert Features.open(concepts.source["features"]).sites == ("norm",)
    assert pictures.missing(path for paths in concepts.images for path in paths) == []
    # Of an earlier version: as it was typed.
    old = json.loads(text)
    old["source"]["features"] = "run/features"
    (tmp_path / "there" / "run" / "concepts" / "concepts.json").write_text(json.dumps(old))
    found = Concepts.load("there/run/concepts").source["features"]
    assert found == str(tmp_path / "there" / "run" / "features")


def test_a_moved_run_through_the_command_line(xlvlm, here, tmp_path, monkeypatch):
    from xlvlm_jax.data import scenes

    scenes.write(here / "scenes", train=8, seed=3)
    extracted = ("extract", "embedded", "scenes", "--output", "run/features", "--site", NORM)
    short = ("--tokens", "index:-1", "--batch-size", 8, "--max-new-tokens", 2)
    assert xlvlm(*extracted, *short)[0] == 0
    decomposed = ("decompose", "run/features", "--output", "run/concepts", "--num-concepts", 2)
    assert xlvlm(*decomposed, "--method", "kmeans")[0] == 0
    shutil.move(here / "run", tmp_path / "run")
    monkeypatch.chdir("/")
    run = tmp_path / "run"
    status, _, errors = xlvlm("ground", run / "concepts", "--model", "embedded")
    assert (status, "images do not exist" in errors) == (0, False)
    scored = ("score", run / "concepts", "--clip", "embedded", "--output", run)
    assert xlvlm(*scored)[0] == 0
    status, _, errors = xlvlm("report", run)
    assert status == 0 and "can't be shown" not in errors
    page = (run / "report.html").read_text()
    assert page.count("data:image/jpeg") >= 5
    assert str(tmp_path) not in page
    # The data are gone, and then named.
    shutil.move(here / "scenes", tmp_path / "drawn")
    assert xlvlm("report", run)[0] == 2  # the page is there
    status, _, errors = xlvlm("report", run, "--overwrite")
    assert status == 0 and "pictures can't be shown" in errors and "--images" in errors
    page = (run / "report.html").read_text()
    assert "8 of 8 pictures can" in page and str(tmp_path) not in page
    again = ("ground", run / "concepts", "--model", "embedded", "--overwrite")
    status, _, errors = xlvlm(*again)
    assert status == 0 and "8 of 8 images do not exist" in errors.replace("\n", " ")
    assert (
        xlvlm("score", run / "concepts", "--output", tmp_path / "x", "--clip", "embedded")[0] == 2
    )
    named = ("--images", tmp_path / "drawn")
    assert xlvlm("report", run, "--overwrite", *named)[0] == 0
    assert (run / "report.html").read_text().count("data:image/jpeg") >= 5


def test_examples_of_steering_are_found_after_a_move(vlm, here, tmp_path, monkeypatch):
    from xlvlm_jax.data import scenes

    scenes.write(here / "scenes", train=2, val=0, test=0, seed=3)
    asked = data.load("vqav2", "scenes", "train")[:4]
    evaluate(vlm, asked, Questions(), "run/steering/plain", batch_size=4, max_new_tokens=1)
    lines = (here / "run/steering/plain/predictions.jsonl").read_text().splitlines()
    assert not any(json.loads(line)["image"].startswith("scenes") for line in lines)
    monkeypatch.chdir(tmp_path)
    told = []
    write_report(here / "run", tell=told.append)
    assert told == []


def test_a_resumed_run_records_where_its_pictures_are_now(vlm, here, tmp_path, monkeypatch):
    class StopHereError(Exception):
        pass

    def stop(*_):
        raise StopHereError

    from xlvlm_jax.data import scenes

    scenes.write(here / "scenes", train=4, seed=3)
    selection = Selection.parse("index:-1")
    settings = ExtractionSettings((NORM,), selection, batch_size=2, max_new_tokens=1)
    run = tmp_path / "run"
    with pytest.raises(StopHereError):
        extract(vlm, data.load("coco", "scenes", "train"), run, settings, progress=stop)
    shutil.move(here / "scenes", tmp_path / "drawn")
    monkeypatch.chdir(tmp_path)
    extract(vlm, data.load("coco", "drawn", "train"), run, settings)
    found = [sample["image"] for sample in Features.open(run).samples]
    assert pictures.missing(found) == [] and len(found) == 4
    assert all(path.startswith(str(tmp_path / "drawn")) for path in found)
