"""`xlvlm score` on a few made-up states of drawn scenes, and its messages for bad input."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from xlvlm_jax import Concepts
from xlvlm_jax.demo import embedded

from ....ports import bert_helpers
from .conftest import SITE, WIDTH


@pytest.fixture(scope="module")
def directory(kinds, features, tmp_path_factory):
    """Returns a directory of concepts with words."""
    path = tmp_path_factory.mktemp("concepts") / "kinds"
    concepts = Concepts.from_components(np.eye(WIDTH)[: len(kinds)], alpha=0.1)
    words = [[kind, f"{kind}s"] for kind in kinds]
    source = {"site": SITE, "features": str(features.path)}
    dataclasses.replace(concepts, words=words, source=source).save(path)
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge") / "bert"
    bert_helpers.make_bert(path, "bert")
    return path


def test_directories_of_concepts(xlvlm, directory, bert, tmp_path):
    again = ("--stability", directory, "--clip", "embedded", "--bert", bert, "--bert-idf")
    status, out, _ = xlvlm("score", directory, *again, "--output", tmp_path / "run")
    assert status == 0
    assert "1 dictionary scored on 40 rows" in out.replace("\n", " ")
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    (row,) = scores["dictionaries"]
    assert row["name"] == "kinds" and row["stability"] == 1
    assert row["clip"]["1"]["mean"] > row["clip"]["1"]["random"]
    assert set(row["bert"]) == {"1", "3"}
    assert scores["scored on"]["bert layer"] == 3


def test_directories_of_one_name_are_told_apart(xlvlm, directory, tmp_path):
    """Without CLIP and BERT, which other tests score with."""
    paths = [tmp_path / name / "kinds" for name in "ab"]
    for path in paths:
        shutil.copytree(directory, path)
    status, _, errors = xlvlm("score", *paths, "--output", tmp_path / "run")
    assert status == 0, errors
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert [row["name"] for row in scores["dictionaries"]] == ["a/kinds", "b/kinds"]


def test_methods_are_compared(xlvlm, features, tmp_path):
    compared = ("--methods", "pca,simple", "--num-concepts", "2,3", "--features", features.path)
    status, out, _ = xlvlm("score", *compared, "--model", "embedded", "--output", tmp_path)
    assert status == 0 and "4 dictionaries scored" in out.replace("\n", " ")
    names = [
        row["name"] for row in json.loads((tmp_path / "scores.json").read_text())["dictionaries"]
    ]
    assert names == ["pca-2", "simple-2", "pca-3", "simple-3"]
    assert (tmp_path / "scores.svg").is_file()


@pytest.mark.wrong_types
def test_bad_input_is_one_line_and_status_2(
    xlvlm,
    directory,
    bert,
    features,
    write_features,
    tmp_path,
    monkeypatch,
):
    monkeypatch.chdir(tmp_path)
    empty = tmp_path.parent / f"{tmp_path.name}-empty"
    fewer, silent = empty / "fewer", empty / "silent"
    loaded = Concepts.load(directory)
    dataclasses.replace(loaded, components=loaded.components[1:], words=None).save(fewer)
    dataclasses.replace(loaded, source={}).save(silent)
    elsewhere = write_features(site="layers.2").path
    mute = write_features(captions=False).path
    compared = ("--methods", "pca", "--features", features.path)
    for arguments, message in (
        (
            [directory, "--clip", embedded.LLAVA],
            "model_type 'llava' is not supported; supported: c",
        ),
        ([directory, "--clip", bert], "model_type 'bert' is not supported; supported: clip"),
        ([directory, "--bert", embedded.CLIP], "model_type 'clip' is not supported; supported: be"),
        ([directory, "--bert", "nowhere"], "'nowhere' is not a local directory and could not be"),
        ([directory, "--bert", bert, "--test", mute], "40 samples have no captions, the first '0'"),
        ([directory, "--test", elsewhere], "has the sites layers.2; choose one of them"),
        ([directory, "--stability", fewer], "expected the same [K, D] for both"),
        (
            [directory, fewer, "--stability", fewer],
            "--stability needs exactly one directory of concepts, got 2",
        ),
        ([fewer, "--clip", "embedded"], "has no words to score; run `xlvlm ground` first"),
        ([silent], "does not name its features; give --test"),
        ([directory, "--bert-idf"], "need --bert; give it too"),
        ([directory, "--bert", bert, "--bert-layer", "4"], "layer is 4;"),
        ([directory, "--bert", bert, "--bert-baseline", "none"], "none: no such baseline"),
        ([], "give either directories of concepts or --methods"),
        ([directory, "--methods", "pca"], "give either directories of concepts or --methods"),
        (["--methods", "pca", "--model", "embedded"], "--methods needs --features"),
        (compared, "--methods needs --model"),
        ([*compared, "--model", "embedded", "--num-concepts", "5,x"], "--num-concepts is '5,x'"),
        ([*compared, "--model", "embedded", "--num-concepts", "99"], "99"),
    ):
        status, _, err = xlvlm("score", *arguments, "--output", "out")
        assert status == 2, (arguments, err)
        assert message in err
        assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
        assert list(tmp_path.iterdir()) == []
