"""--dtype of commands on features: given, or that of the model that they were extracted with."""

import sys

import numpy as np
import pytest

from xlvlm_jax.cli.console import dtype_of
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.features.reader import Features
from xlvlm_jax.features.writer import FeaturesWriter

NORM = "language_model.model.norm"


def write(path, manifest):
    rows = np.arange(4)
    with FeaturesWriter(path, {"model": "m", **manifest}) as writer:
        samples = [{"id": str(i), "image": f"{i}.png", "prompt": "what?"} for i in rows]
        writer.append(samples, {NORM: np.eye(4, dtype=np.float32)}, rows, rows, rows)
        writer.close()
    return path


@pytest.fixture
def made(tmp_path):
    """Features of a model in bfloat16, concepts of them, and a picture."""
    source = {"site": NORM, "features": str(write(tmp_path / "f", {"model dtype": "bfloat16"}))}
    for name, words in (("new", None), ("grounded", [["dog"], ["sea"]])):
        concepts = Concepts(np.eye(2, 4), np.ones((4, 2), np.float32), words=words, source=source)
        concepts.save(tmp_path / name)
    (tmp_path / "picture.png").touch()
    return tmp_path


COMMANDS = {
    "ground": "ground {0}/new --model m",
    "map": "map m {0}/picture.png --concepts {0}/grounded --output {0}/maps.html",
    "explain": "explain m {0}/picture.png --concepts {0}/grounded",
    "causal": "causal {0}/grounded --model m",
    "shift": "shift {0}/f --concepts {0}/grounded --model m --output {0}/shift",
    "score": "score --methods pca --num-concepts 2 --features {0}/f --model m --output {0}/scores",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("given", [None, "float16"])
def test_models_are_loaded_as_they_were_for_the_features(command, given, made, xlvlm, monkeypatch):
    def load_model(_, dtype, **__):
        raise ValueError(f"asked for {dtype}")

    monkeypatch.setattr(sys.modules[f"xlvlm_jax.cli.{command}"], "load_model", load_model)
    options = COMMANDS[command].format(made).split() + (["--dtype", given] if given else [])
    status, _, errors = xlvlm(*options)
    assert (status, f"asked for {given or 'bfloat16'}" in errors) == (2, True), errors


def test_maps_of_pictures_need_no_features(made, xlvlm, monkeypatch):
    def load_model(_, dtype, **__):
        raise ValueError(f"asked for {dtype}")

    monkeypatch.setattr(sys.modules["xlvlm_jax.cli.map"], "load_model", load_model)
    (made / "f" / "manifest.json").write_text("{")
    _, _, errors = xlvlm(*COMMANDS["map"].format(made).split())
    assert "asked for float32" in errors


def test_features_that_do_not_name_it(tmp_path):
    unnamed = Features.open(write(tmp_path / "old", {}))
    named = Features.open(write(tmp_path / "new", {"model dtype": "float16"}))
    assert dtype_of(None) == dtype_of(None, None, unnamed) == "float32"
    assert dtype_of(None, unnamed, named) == "float16"
    assert dtype_of("bfloat16", named) == "bfloat16"


def test_it_has_no_effect_on_scores_of_concepts(made, xlvlm):
    output = ("--output", made / "scores")
    status, _, errors = xlvlm("score", made / "grounded", "--dtype", "float16", *output)
    assert status == 2 and "--dtype has no effect without --methods; omit it" in errors
